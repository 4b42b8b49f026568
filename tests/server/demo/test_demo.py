"""The demo itself, small: four processes, and every frame of the scan in the recording."""

import math

import numpy as np
import pytest

from prenet4d_server.demo import Demo, run
from prenet4d_server.errors import FileError
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


@pytest.mark.parametrize("name", ["scan.h5", "demo.png", "mine.npy"])
def test_what_no_demo_has_made_is_not_lost_to_one(tmp_path, name):
    data = tmp_path / "mine.npy"
    np.save(data, np.ones((1, 2, 16, 16), np.uint16))
    kept = tmp_path / name
    if name == "mine.npy":  # an earlier demo's folder, and the data in it under the demo's name
        (tmp_path / "service.log").touch()
        kept = data = data.rename(tmp_path / "scan.h5")
    elif name != data.name:
        kept.write_bytes(b"mine")
    with pytest.raises(FileError, match="name another --out"):
        run(Demo(tmp_path, Drawing(), data=data, rate=100.0), lambda _: None)
    assert kept.exists()


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
