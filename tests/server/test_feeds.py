"""What a simulated detector shows."""

import numpy as np
import pytest

from prenet4d_server.errors import FileError
from prenet4d_server.feeds import Drawing, open_feed, read_expectations


@pytest.fixture
def measured(tmp_path):
    file = tmp_path / "measured.npy"
    rng = np.random.default_rng(0)
    np.save(file, rng.poisson(50.0, (3, 32, 32)).astype(np.uint16))
    return file


def frames(feed):
    return np.concatenate(list(feed.blocks()))


def test_the_same_drawing_is_the_same_scan_everywhere():
    drawing = Drawing(scan_shape=(3, 5), frame_shape=(32, 48), dose=200.0, seed=4)
    with open_feed(None, drawing) as one, open_feed(None, drawing) as other:
        assert one.scan_shape == (3, 5)
        assert one.frame_shape == (32, 48)
        assert one.n_frames == 15
        np.testing.assert_array_equal(frames(one), frames(other))
        assert frames(one).sum() / 15 == pytest.approx(200, rel=0.1)


def test_files_are_shown_as_they_are(measured):
    with open_feed(measured, Drawing()) as feed:
        np.testing.assert_array_equal(frames(feed), np.load(measured))


def test_files_are_repeated_until_the_scan_is_full(measured):
    with open_feed(measured, Drawing(scan_shape=(2, 5))) as feed:
        assert feed.n_frames == 10
        shown = frames(feed)
    np.testing.assert_array_equal(shown, np.load(measured)[np.arange(10) % 3])


def test_a_dose_draws_a_new_scan_from_the_file(measured):
    with open_feed(measured, Drawing(scan_shape=(4, 4), dose=500.0)) as feed:
        shown = frames(feed)
    assert shown.shape == (16, 32, 32)
    assert shown.sum() / 16 == pytest.approx(500, rel=0.1)


def test_camera_offset_is_taken_out(tmp_path):
    file = tmp_path / "offset.npy"
    pattern = np.full((32, 32), -100, np.int16)
    pattern[10:20, 10:20] = -40
    np.save(file, pattern)
    counts = read_expectations(file)
    assert counts.shape == (1, 32, 32)
    assert counts[0, 15, 15] == 60
    assert counts[0, 0, 0] == 0


def test_pattern_without_counts_is_refused(tmp_path):
    file = tmp_path / "empty.npy"
    np.save(file, np.zeros((2, 16, 16), np.uint16))
    with pytest.raises(FileError, match="without counts"):
        read_expectations(file)
