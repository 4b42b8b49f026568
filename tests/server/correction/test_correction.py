"""The service with the real corrector: what it finds reaches those who listen and the operator."""

import subprocess
import sys

import numpy as np
import pytest

from prenet4d_client import ControlClient
from prenet4d_client.messages import FrameFlag
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, balanced, listening, sender, settings, subscriber

SHAPE = (64, 64)


def disks(n, seed=0, dose=20_000.0):
    """(n, 64, 64) a soft disk that wanders about the middle, and where its center is."""
    rng = np.random.default_rng(seed)
    centers = 31.5 + rng.uniform(-3, 3, (n, 2))
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    radius = np.hypot(y - centers[:, 0, None, None], x - centers[:, 1, None, None])
    expected = 1 / (1 + np.exp((radius - 8) / 0.7)) + 1e-3
    expected *= dose / expected.sum((1, 2), keepdims=True)
    return rng.poisson(expected).astype(np.uint16), centers


@pytest.fixture(scope="module")
def service():
    corrector = {"backend": "torch", "precision": "float32", "threads": 1, "ellipse_every": 8,
                 "patterns_to_lock": 16}  # fmt: skip
    with Service(
        settings(corrector=corrector, batch={"size": 8}, stream={"mean_every_s": 0.05})
    ) as s:
        yield s


def test_centers_patterns_and_means_come_out(service):
    pixels, centers = disks(24)
    pixels[5] = 0
    pixels[6, 10:13, 10:13] = 60_000
    topics = ("telemetry", "corrected", "aligned", "mean", "acquisition_end", "event")
    with listening(service, topics) as listener:
        with sender(service) as source:
            source.start(
                frame_shape=SHAPE, dtype="uint16", scan_shape=(4, 6), saturation_value=60_000
            )
            source.send(pixels)
            source.end()
        end = listener.wait_for("acquisition_end")
        telemetry = listener.of("telemetry")
        found = np.concatenate([one.center for one in telemetry])
        flags = np.concatenate([one.flags for one in telemetry])
        dose = np.concatenate([one.dose for one in telemetry])
        assert end.counters.corrected == 24
        good = np.ones(24, bool)
        good[5:7] = False
        assert np.abs(found - centers)[good].max() < 1.0
        assert flags[5] & FrameFlag.BLANK
        assert flags[6] & FrameFlag.SATURATED
        np.testing.assert_allclose(dose, pixels.sum((1, 2)), rtol=1e-4)
        assert {one.batch for one in telemetry} == {one.batch for one in listener.of("corrected")}
        for one in (*listener.of("corrected"), *listener.of("aligned")):
            assert one.patterns.shape == (len(one.indices), *SHAPE)
            assert one.scan_shape == (4, 6)
        mean = listener.of("mean")[-1]
        assert mean.mean.shape == SHAPE
        assert mean.patterns == telemetry[-1].patterns_averaged
        assert "calibration_calibrating" in listener.codes()


def test_a_mask_that_leaves_nothing_rejects_its_frames_and_no_others(service):
    pixels, _ = disks(8)
    with listening(service) as listener:
        with sender(service) as source:
            source.start(
                frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 4),
                pixel_mask=np.zeros(SHAPE, bool),
            )  # fmt: skip
            source.send(pixels)
            source.end()
        counters = listener.wait_for("acquisition_end").counters
        assert counters.rejected_by_reason == {"correction_failed": 8}
        assert balanced(counters)
        assert "mask" in listener.wait_for_event("no_corrector").message
        with sender(service) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 4))
            source.send(pixels)
            source.end()
        assert listener.wait_for("acquisition_end", 2).counters.corrected == 8


def test_a_calibration_is_used_in_this_scan_and_the_next_until_it_is_forgotten(service):
    calibration = {
        "ratio": 1.04, "theta": 0.5, "frame_shape": SHAPE, "reference_center": [31.5, 31.5],
    }  # fmt: skip
    pixels, _ = disks(8)
    address = service.endpoints["control"]
    with (
        ControlClient(address, timeout=TIMEOUT_S) as client,
        subscriber(service, "telemetry") as stream,
    ):

        def scan():
            with sender(service) as source:
                source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 4))
                source.send(pixels)
                source.end()
            return stream.receive()

        scan()
        client.load_calibration(calibration)
        client.freeze()
        assert client.status()["state"] == "frozen"
        assert client.save_calibration()["ratio"] == pytest.approx(1.04)
        for _ in range(2):
            telemetry = scan()
            assert telemetry.state == "frozen"
            assert telemetry.ellipticity.ratio == pytest.approx(1.04)
        snapshot = client.snapshot()
        assert snapshot.header.result["ellipticity"]["ratio"] == pytest.approx(1.04)
        assert snapshot.mean.shape == SHAPE
        client.recalibrate()
        assert client.status()["state"] == "calibrating"
        telemetry = scan()
        assert telemetry.state != "frozen"
        assert telemetry.ellipticity.ratio == 1.0


@pytest.mark.parametrize("module", ["prenet4d_server.ingest.process", "prenet4d_server.service"])
def test_torch_is_imported_only_where_something_is_corrected(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
