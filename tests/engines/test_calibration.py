"""The calibration as a document."""

import json
import math
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.descan import Descan
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.geometry import Ellipticity

axes = st.lists(st.floats(-5, 5), min_size=6, max_size=6).map(tuple)
sigmas = st.lists(st.floats(0, 1e-3), min_size=6, max_size=6).map(tuple)
fits = st.builds(
    Descan,
    coefficients_y=axes,
    coefficients_x=axes,
    sigma_y=sigmas,
    sigma_x=sigmas,
    residual=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    outliers=st.floats(0, 1),
)
calibrations = st.builds(
    Calibration,
    ratio=st.floats(1, 2),
    theta=st.floats(0, math.pi, exclude_max=True),
    ratio_sigma=st.none() | st.floats(0, 1),
    theta_sigma=st.none() | st.floats(0, 1),
    reference_center=st.tuples(st.floats(-0.5, 63.5), st.floats(-0.5, 63.5)),
    frame_shape=st.tuples(st.integers(64, 8192), st.integers(64, 8192)),
    detector=st.text(max_size=20),
    patterns=st.integers(0, 10**9),
    how=st.text(max_size=40),
    # Fixed offsets: Python holds a time in a change of the clocks for unlike the same elsewhere.
    date=st.datetimes(
        datetime(1900, 1, 1),
        timezones=st.integers(-12, 14).map(lambda hours: timezone(timedelta(hours=hours))),
    ),
    descan=st.none() | fits,
)


@given(calibrations)
def test_json_round_trip_loses_nothing(calibration: Calibration):
    text = calibration.to_json()
    assert Calibration.from_json(text) == calibration
    assert Calibration.from_json(text.encode()) == calibration
    assert Calibration.from_document(json.loads(text)) == calibration
    assert Calibration.from_document(calibration.model_dump()) == calibration


def test_it_stands_for_an_ellipticity():
    calibration = Calibration(
        ratio=1.03, theta=0.4, reference_center=(63.5, 63.5), frame_shape=(128, 128)
    )
    assert calibration.ellipticity == Ellipticity(1.03, 0.4)
    assert calibration.date.tzinfo is not None


GOOD = {"ratio": 1.02, "theta": 0.3, "reference_center": [3, 4], "frame_shape": [8, 9]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.9}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"theta": 4}, "theta"),
        ({"ratio_sigma": -1}, "ratio_sigma"),
        ({"reference_center": [1, math.inf]}, "reference_center"),
        ({"reference_center": [1]}, "reference_center"),
        ({"frame_shape": [0, 8]}, "frame_shape"),
        ({"reference_center": [8, 4]}, "frame of 8 × 9 pixels"),
        ({"reference_center": [-1, 4]}, "frame of 8 × 9 pixels"),
        ({"version": 2}, "version 2; this prenet4d reads version 1"),
        ({"version": "new"}, "its version is wrong"),
        ({"date": "2026-01-01T00:00:00"}, "date"),
        ({"descan": {"residual": [0, 0]}}, "descan.coefficients_y"),
        ({"rotation": 3}, "rotation"),
        ({"date": "yesterday"}, "date"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str):
    assert Calibration.from_document(GOOD).frame_shape == (8, 9)
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_document(GOOD | change)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"ratio": 1.0}', b"\xff\xfe", "🙂"])
def test_other_text_is_refused(text: str | bytes):
    with pytest.raises(CalibrationError, match="not a calibration"):
        Calibration.from_json(text)


@given(st.text() | st.binary())
def test_wild_text_is_refused_by_name(text: str | bytes):
    with pytest.raises(CalibrationError):
        Calibration.from_json(text)
