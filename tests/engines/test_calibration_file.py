"""Calibrations in files: nothing is lost, a person can read them, and what is none is told."""

import os
import stat
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import GOOD, calibrations

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.calibration_file import (
    check_target,
    read_calibration,
    to_toml,
    write_calibration,
)
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.toml_text import toml_value

KNOWN = Calibration.from_document(GOOD | {"detector": "camera 1", "patterns": 256})


@given(calibrations, st.sampled_from([".toml", ".json", ".TOML"]))
def test_writing_and_reading_loses_nothing(calibration, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"today{suffix}"
        write_calibration(calibration, path)
        assert read_calibration(path) == calibration
        assert list(Path(folder).iterdir()) == [path]


def test_a_person_can_read_it(tmp_path):
    text = to_toml(KNOWN)
    assert "# Ellipticity a/b.\nratio = 1.02\n" in text
    assert "radians from +x toward +y" in text
    assert "``" not in text
    assert tomllib.loads(text)["detector"] == "camera 1"
    assert "sigma" not in tomllib.loads(text)


def test_a_person_can_write_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("ratio = 1.02\ntheta = 0.3\nreference_center = [3, 4]\nframe_shape = [8, 9]\n")
    assert read_calibration(path).ratio == 1.02


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_an_editor_may_begin_it_with_a_byte_order_mark(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    calibration = Calibration(**GOOD)
    write_calibration(calibration, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_calibration(path) == calibration


@given(st.text() | st.lists(st.booleans() | st.integers(-(2**63), 2**63 - 1)) | st.floats(-9, 9))
def test_any_value_is_toml(value):
    assert tomllib.loads(f"it = {toml_value(value)}") == {"it": value}


def test_a_file_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "today.toml"
    write_calibration(KNOWN, path)
    other = KNOWN.model_copy(update={"ratio": 1.5})
    with pytest.raises(CalibrationError, match="already"):
        write_calibration(other, path)
    assert read_calibration(path) == KNOWN
    write_calibration(other, path, overwrite=True)
    assert read_calibration(path) == other


def test_a_folder_that_may_not_be_written_into_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(CalibrationError, match=f"You may not write into {tmp_path}"):
        check_target(tmp_path / "today.toml")


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_calibration(KNOWN, tmp_path / "today.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "today.json").stat().st_mode) == 0o640


def test_where_it_cannot_be_written_nothing_is_left(tmp_path):
    (tmp_path / "today.toml").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_calibration(KNOWN, tmp_path / "today.toml", overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "today.toml"]


@pytest.mark.parametrize("name", ["today", "today.h5", "today.toml.bak"])
def test_another_suffix_is_refused(tmp_path, name):
    for act in (lambda p: write_calibration(KNOWN, p), read_calibration):
        with pytest.raises(CalibrationError, match=r"\.toml or a \.json"):
            act(tmp_path / name)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not"),
        (b"\xff\xfe\x00", "holds no text"),
        (b"\x89PNG\r\n", "holds no text"),
        (b"[source]\nkind = 'native'\n", "is not"),
        (b'{"name": "something else"}', "is not"),
        (b"ratio = 1.02\nthe", "is not"),
        (b"[" * 100_000, "is not"),
    ],
)
def test_what_is_none_is_told_in_one_sentence(tmp_path, suffix, content, why):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=why) as told:
        read_calibration(path)
    assert path.name in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@given(share=st.floats(0, 0.99))
def test_a_half_written_file_is_refused_or_has_all_that_matters(suffix, share):
    """A file cut short never passes for another calibration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"today{suffix}"
        write_calibration(KNOWN, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        try:
            found = read_calibration(path)
        except CalibrationError:
            return
        told = found.model_dump(exclude={"detector", "date", "patterns", "how"})
        assert told == KNOWN.model_dump(exclude={"detector", "date", "patterns", "how"})


def test_one_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        read_calibration(tmp_path / "nowhere.toml")
