"""The demo itself, small: four processes, and every frame of the scan in the recording."""

import math

import numpy as np

from prenet4d_server.demo import Demo, run
from prenet4d_server.feeds import Drawing


def test_simulated_scan(tmp_path):
    said = []
    drawing = Drawing(
        scan_shape=(10, 10),
        frame_shape=(64, 64),
        dose=2000.0,
        ellipticity=(1.05, math.radians(25)),
        drift=3.0,
    )
    kept = tmp_path / "out" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    outcome = run(Demo(tmp_path / "out", drawing, rate=100.0), said.append)
    assert kept.read_text() == "mine"
    found = outcome.score.found
    assert found.received.all()
    assert found.counters["received"] == found.counters["corrected"] == 100
    assert np.isfinite(outcome.score.centers["center, tracked"].mean)
    assert abs(found.dose / outcome.score.truth.dose - 1) < 0.05
    assert outcome.picture.read_bytes().startswith(b"\x89PNG")
    assert outcome.recording.exists()
    assert any("10 × 10 frames of 64 × 64" in sentence for sentence in said)


def test_measured_patterns_have_an_ellipticity_of_their_own(tmp_path):
    y, x = np.mgrid[:64, :64] - 31.5
    r = np.hypot(y, x)
    expectation = 1e4 / (1 + np.exp(r - 4)) + 1e3 * np.exp(-(((r - 18) / 1.5) ** 2))
    data = tmp_path / "measured.npy"
    np.save(data, expectation.astype(np.float32))
    drawing = Drawing(scan_shape=(6, 6), drift=2.0, ellipticity=(1.02, 0.3))
    outcome = run(Demo(tmp_path / "out", drawing, data=data, rate=100.0), lambda _: None)
    assert outcome.score.found.received.all()
    assert outcome.intrinsic is not None
    assert outcome.score.truth.groups is not None
