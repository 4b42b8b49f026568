"""The intake: what cannot be is refused by name, and what can be is let through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_server.config import MAX_FRAMES
from prenet4d_server.errors import (
    BadStart,
    DuplicateFrame,
    IndexOutsideScan,
    ScanMismatch,
    SequenceError,
    UnknownAcquisition,
)
from prenet4d_server.ingest.intake import Intake
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart


def start(series="1", **options):
    return AcquisitionStart(series, (16, 16), np.dtype("uint16"), **options)


def index(*numbers):
    return np.array(numbers, dtype=np.int64)


def refused(refusals):
    return [(type(error), frames) for error, frames in refusals]


def test_a_scan_runs_from_its_start_to_its_end():
    intake = Intake()
    assert intake.start(start(scan_shape=(2, 3))) == (None, [])
    good, refusals = intake.admit("1", index(0, 1, 2, 3, 4, 5))
    assert good.tolist() == [0, 1, 2, 3, 4, 5]
    assert refusals == []
    assert intake.running.complete
    closed = intake.end(AcquisitionEnd("1"))
    assert not closed.aborted
    assert intake.running is None


def test_frames_before_a_start_after_an_end_and_of_another_series_are_refused():
    intake = Intake()
    for says in ("start the scan anew", "is over"):
        good, ((error, frames),) = intake.admit("1", index(0, 1))
        assert (len(good), frames) == (0, 2)
        assert isinstance(error, UnknownAcquisition)
        assert says in str(error)
        intake.start(start())
        good, ((error, _),) = intake.admit("2", index(0))
        assert "series 1 is running" in str(error)
        intake.end(AcquisitionEnd("1"))


def test_indices_outside_the_scan_and_seen_before_are_refused():
    intake = Intake()
    intake.start(start(scan_shape=(2, 2)))
    good, refusals = intake.admit("1", index(3, -1, 0, 4, 0, 1 << 60))
    assert good.tolist() == [0, 2]
    assert refused(refusals) == [(IndexOutsideScan, 3), (DuplicateFrame, 1)]
    good, refusals = intake.admit("1", index(3, 1))
    assert good.tolist() == [1]
    assert refused(refusals) == [(DuplicateFrame, 1)]


def test_a_frame_that_turned_out_unusable_may_come_again():
    intake = Intake()
    intake.start(start(scan_shape=(2, 2)))
    intake.admit("1", index(0, 1, 2, 3))
    intake.forget(index(2))
    assert not intake.running.complete
    assert intake.admit("1", index(2))[1] == []
    assert intake.running.complete


def test_an_end_without_a_start_is_refused():
    intake = Intake()
    with pytest.raises(SequenceError, match="its start never came"):
        intake.end(AcquisitionEnd("1"))
    intake.start(start())
    with pytest.raises(SequenceError, match="series 1 is running"):
        intake.end(AcquisitionEnd("0"))
    assert intake.running is not None


def test_a_start_that_is_said_twice_changes_nothing():
    intake = Intake()
    intake.start(start())
    running = intake.running
    with pytest.raises(SequenceError, match="started twice"):
        intake.start(start())
    assert intake.running is running


@pytest.mark.parametrize("series", ["1", "2"])
def test_a_detector_restarted_in_mid_scan_ends_the_old_acquisition(series):
    intake = Intake()
    intake.start(start(scan_shape=(2, 2)))
    intake.admit("1", index(0))
    old = intake.running.id
    closed, (told,) = intake.start(start(series))
    assert (closed.id, closed.aborted) == (old, True)
    assert isinstance(told, SequenceError)
    assert intake.running.id != old
    assert intake.admit(series, index(0))[1] == []
    intake.end(AcquisitionEnd(series))
    ((late, _),) = intake.admit("1", index(0))[1]
    assert "is over" in str(late)


def test_a_complete_scan_without_an_end_counts_as_ended():
    intake = Intake()
    intake.start(start(expected_frames=2))
    intake.admit("1", index(0, 1))
    closed, (told,) = intake.start(start("2"))
    assert not closed.aborted
    assert "its end never came" in str(told)


def test_the_configured_scan_serves_a_detector_that_does_not_know_it():
    intake = Intake(scan_shape=(2, 2))
    _, (told,) = intake.start(start(expected_frames=6))
    assert isinstance(told, ScanMismatch)
    assert intake.running.start.scan_shape == (2, 2)
    assert intake.running.start.expected_frames == 4
    assert refused(intake.admit("1", index(4))[1]) == [(IndexOutsideScan, 1)]


@pytest.mark.parametrize(
    ("announced", "says"), [(6, "frames beyond it are refused"), (3, "the scan stays empty")]
)
def test_what_follows_from_an_announcement_that_is_not_the_scan_is_said(announced, says):
    _, (told,) = Intake(scan_shape=(2, 2)).start(start(expected_frames=announced))
    assert says in str(told)
    assert "--scan" in str(told)


def test_a_scan_that_cannot_be_numbered_is_refused():
    intake = Intake()
    with pytest.raises(BadStart, match="at most"):
        intake.start(start(expected_frames=MAX_FRAMES + 1))
    assert intake.running is None


@pytest.mark.parametrize(
    "metadata", [{"log": "x" * (1 << 18)}, {str(number): number for number in range(1 << 17)}]
)
def test_metadata_that_are_too_large_are_left_out_and_the_scan_runs(metadata):
    intake = Intake()
    _, (told,) = intake.start(start(metadata=metadata))
    assert str(told).startswith("The metadata of series 1 are left out. These metadata take ")
    assert intake.running.start.metadata == {}
    assert intake.admit("1", index(0))[1] == []


def says(intake, series):
    ((error, _),) = intake.admit(series, index(0))[1]
    return str(error)


def test_frames_whose_start_was_refused_are_told_why():
    intake = Intake()
    intake.start(start("1"))
    intake.refuse(BadStart("Too large: make it smaller."), "2")
    assert says(intake, "2") == (
        "Frames of series 2 came, but its start was refused: Too large: make it smaller."
    )
    assert "series 1 is running" in says(intake, "3")
    intake.refuse(BadStart("It is no start at all."))
    assert "the last start was refused: It is no start at all." in says(intake, "3")
    intake.start(start("3"))
    assert "series 3 is running" in says(intake, "4")
    assert "its start was refused" in says(intake, "2")
    intake.start(start("2"))
    intake.end(AcquisitionEnd("2"))
    assert "is over" in says(intake, "2")


def test_only_the_last_refused_starts_are_remembered():
    intake = Intake()
    for number in range(100):
        intake.refuse(BadStart("No."), str(number))
    assert "never came" in says(intake, "0")
    assert "was refused" in says(intake, "99")


def test_giving_up_says_why_and_is_harmless_when_nothing_runs():
    intake = Intake()
    assert intake.abort("stopped") is None
    intake.start(start())
    closed = intake.abort("stopped")
    assert (closed.aborted, closed.reason) == (True, "stopped")


@given(
    blocks=st.lists(st.lists(st.integers(-3, 12), max_size=8), max_size=8),
    limit=st.integers(1, 10),
)
def test_every_index_is_admitted_exactly_once_and_every_frame_answered_for(blocks, limit):
    intake = Intake()
    intake.start(start(expected_frames=limit))
    admitted: list[int] = []
    for block in blocks:
        good, refusals = intake.admit("1", np.array(block, dtype=np.int64))
        assert len(good) + sum(frames for _, frames in refusals) == len(block)
        assert (np.diff(good) > 0).all()
        admitted += [block[number] for number in good]
    assert len(admitted) == len(set(admitted))
    assert set(admitted) == {i for block in blocks for i in block if 0 <= i < limit}
