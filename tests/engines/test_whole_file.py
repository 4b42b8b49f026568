"""Files are there whole or not at all, and may be read by whom they should."""

import os
import stat

import pytest

from prenet4d_engines.whole_file import write_whole


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_a_file_is_written_and_replaced_for_those_who_may_read_it(tmp_path, private, mode):
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        for data in (b"once", b"twice"):
            write_whole(path, data, private=private)
            assert path.read_bytes() == data
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == [path]


def test_where_it_cannot_be_written_nothing_is_left(tmp_path):
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(path, b"data")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "nowhere" / "file", b"data")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
