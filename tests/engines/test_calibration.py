"""The calibration as a document."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.geometry import Ellipticity

finite = st.floats(-1e4, 1e4)
calibrations = st.builds(
    Calibration,
    ratio=st.floats(1, 2),
    theta=st.floats(0, math.pi, exclude_max=True),
    ratio_sigma=st.none() | st.floats(0, 1),
    theta_sigma=st.none() | st.floats(0, 1),
    reference_center=st.tuples(finite, finite),
    frame_shape=st.tuples(st.integers(1, 8192), st.integers(1, 8192)),
    detector=st.text(max_size=20),
    patterns=st.integers(0, 10**9),
    how=st.text(max_size=40),
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
        ({"version": 2}, "version"),
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
