"""The demo's verdict: errors are errors, constants that nobody knows are not."""

import math
from dataclasses import replace

import numpy as np
import pytest

from prenet4d_server.demo.score import (
    CENTER_OF_MASS,
    TRACKED,
    Deviation,
    Found,
    Score,
    Truth,
    center_errors,
    deviation,
)

N = 12
CENTERS = np.stack([np.linspace(10, 20, N), np.linspace(30, 25, N)], axis=1)
TRUTH = Truth((3, 4), CENTERS, None, ratio=1.05, theta=0.4, dose=1000.0)
COUNTERS = {"received": N, "corrected": N, "rejected": 0, "shed": 0, "in_flight": 0}
FOUND = Found(
    center=CENTERS,
    tracked=CENTERS,
    received=np.ones(N, bool),
    dose=1001.0,
    ratio=1.0503,
    ratio_sigma=0.001,
    theta=0.41,
    counters=COUNTERS,
    frames_per_second=100.0,
    latency_p50_ms=10.0,
    latency_p99_ms=20.0,
)


def score(truth=TRUTH, tracked=0.1, rival=2.0, **changed):
    centers = {TRACKED: Deviation(tracked, tracked, 4), CENTER_OF_MASS: Deviation(rival, rival, 4)}
    return Score(N, 1.0, truth, replace(FOUND, **changed), centers)


def test_errors_are_distances():
    off = CENTERS + np.array([3.0, 4.0])
    np.testing.assert_allclose(center_errors(off, TRUTH), 5.0)
    assert deviation(off, TRUTH).mean == pytest.approx(5.0)
    assert deviation(off, TRUTH).median == pytest.approx(5.0)
    assert deviation(off, TRUTH).frames == len(off)
    off[1:] = np.nan  # said to show no beam
    assert deviation(off, TRUTH).median == pytest.approx(5.0)
    assert deviation(off, TRUTH).frames == 1
    off[:] = np.nan
    assert deviation(off, TRUTH).frames == 0


def test_a_constant_for_each_measured_pattern_is_no_error():
    groups = np.arange(N) % 2
    truth = replace(TRUTH, groups=groups)
    found = CENTERS + np.where(groups[:, None] == 0, (3.0, 4.0), (-1.0, 0.5))
    np.testing.assert_allclose(center_errors(found, truth), 0.0, atol=1e-12)
    found[0] += 7.0
    assert center_errors(found, truth).max() == pytest.approx(7.0 * math.sqrt(2))


def test_good_result_has_no_complaints():
    assert score().complaints() == []
    assert score().ratio_error == pytest.approx(0.0003 / 1.05)
    assert score().theta_error_deg == pytest.approx(math.degrees(0.01))


def test_angles_compare_across_the_seam():
    near = score(truth=replace(TRUTH, theta=0.01), theta=math.pi - 0.01)
    assert near.theta_error_deg == pytest.approx(-math.degrees(0.02))


def test_who_stays_behind_the_drift_is_found_out():
    groups = np.arange(N) % 2
    assert score().followed == pytest.approx(1.0)
    for truth in (TRUTH, replace(TRUTH, groups=groups)):
        half = Score(N, 1.0, truth, replace(FOUND, tracked=7 + CENTERS / 2), score().centers)
        assert half.followed == pytest.approx(0.5)
        assert "The tracked center follows 50% of the drift." in half.complaints()
    still = replace(TRUTH, centers=np.full((N, 2), 3.0))
    assert math.isnan(score(truth=still).followed)
    assert score(truth=still).complaints() == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"received": np.arange(N) > 0}, "12 frames were sent; 11 were recorded."),
        ({"counters": {**COUNTERS, "corrected": 11, "rejected": 1}}, "the service counts"),
        ({"tracked": 1.5}, "The tracked center is off by 1.50 px"),
        ({"tracked": math.nan}, "The tracked center is off by nan px"),
        ({"tracked": 0.5, "rival": 0.4}, "Center of mass, off by 0.40 px (median), does better."),
        ({"ratio": 1.0}, "The ellipticity is off by -4.8 %"),
        ({"dose": 1200.0}, "The dose is off by +20.0 %"),
    ],
)
def test_what_makes_no_sense_is_said(changed, sentence):
    assert sentence in score(**changed).complaints()[0]


def test_unknown_ellipticity_is_not_judged():
    assert score(truth=replace(TRUTH, ratio=math.nan)).complaints() == []
