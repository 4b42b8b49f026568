"""The service on a device that works behind its back, and that fails in the middle of a scan."""

import numpy as np
import pytest
import torch
from queued import QueuedLanes

from prenet4d_server.service import Service

from ..live import balanced, listening, sender, settings, until
from .test_correction import SHAPE, disks


@pytest.fixture
def device(monkeypatch):
    """Stands in for the GPU that the service finds."""
    lanes = QueuedLanes()
    monkeypatch.setattr("prenet4d_engines.stages.lanes_for", lambda device: lanes)
    return lanes


@pytest.fixture
def service(device):
    corrector = {"backend": "torch", "precision": "float32", "threads": 1}
    with Service(settings(corrector=corrector, batch={"size": 4, "max_delay_ms": 5000})) as s:
        yield s


def start(source, n):
    source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=n)


def test_what_is_under_way_comes_out_though_nothing_follows(service, device):
    pixels, centers = disks(22)
    with listening(service) as listener, sender(service) as source:
        start(source, 22)
        source.send(pixels[:20])
        until(lambda: len(listener.indices()) == 20)
        source.send(pixels[20:])
        source.end()
        counters = listener.wait_for("acquisition_end").counters
        assert counters.corrected == 22
        assert listener.indices() == list(range(22))
        found = np.concatenate([one.center for one in listener.of("telemetry")])
        assert np.abs(found - centers).max() < 1.0
    assert device.recorded


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "corrector_rebuilt"),
        (ValueError("not enough values to unpack"), "corrector_fault"),
    ],
)
def test_a_fault_in_mid_scan_is_told_and_loses_nothing(service, device, fault, code):
    pixels, _ = disks(40)
    with listening(service) as listener, sender(service) as source:
        start(source, 40)
        source.send(pixels[:16])
        until(lambda: len(listener.indices()) == 16)
        device.fault = fault
        source.send(pixels[16:])
        source.end()
        counters = listener.wait_for("acquisition_end").counters
        assert counters.corrected == 40
        assert listener.indices() == list(range(40))
        assert "frames are done again" in listener.wait_for_event(code).message


def test_frames_of_a_device_that_is_gone_are_counted_and_the_reason_is_told(service, device):
    pixels, _ = disks(16)
    with listening(service) as listener, sender(service) as source:
        start(source, 16)
        source.send(pixels[:8])
        until(lambda: len(listener.indices()) == 8)
        device.broken = True
        source.send(pixels[8:])
        source.end()
        counters = listener.wait_for("acquisition_end").counters
        assert counters.corrected == 8
        assert counters.rejected_by_reason == {"correction_failed": 8}
        assert balanced(counters)
        assert "Start the service again" in listener.wait_for_event("gpu_failed").message
        start(source, 4)
        source.send(pixels[:4])
        source.end()
        assert listener.wait_for("acquisition_end", 2).counters.rejected == 4
        assert "No GPU works" in listener.wait_for_event("no_corrector").message
