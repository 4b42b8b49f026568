"""What outlives an acquisition: each camera mode's calibration, and whether it is frozen."""

import numpy as np
import pytest

from prenet4d_client import ControlClient
from prenet4d_engines.calibration import Calibration
from prenet4d_server.service import Service

from ..live import listening, sender, settings

CORRECTOR = {
    "backend": "torch", "precision": "float32", "threads": 1, "ellipse_every": 8,
    "patterns_to_lock": 16, "lost_after": 2,
}  # fmt: skip
SMALL, LARGE = (48, 48), (64, 64)


def disks(n, shape, seed=0):
    """(n, h, w) a bright disk about the middle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    middle = (shape[0] - 1) / 2
    expected = 20.0 / (1 + np.exp((np.hypot(y - middle, x - middle) - 8) / 0.7)) + 0.01
    return rng.poisson(np.broadcast_to(expected, (n, *shape))).astype(np.uint16)


def given(shape, ratio):
    middle = (shape[0] - 1) / 2
    return Calibration(
        ratio=ratio, theta=0.4, frame_shape=shape, reference_center=(middle, middle)
    ).model_dump(mode="json")


@pytest.fixture
def service():
    with Service(settings(corrector=CORRECTOR, batch={"size": 8})) as running:
        yield running


def scan(service, frames):
    """How a scan began and ended: (state, ratio) of its first and last batch; what was told."""
    with listening(service) as listener:
        with sender(service) as source:
            source.start(frame_shape=frames.shape[1:], dtype="uint16", scan_shape=(1, len(frames)))
            source.send(frames)
            source.end()
        listener.wait_for("acquisition_end")
        batches = listener.of("telemetry")
        ends = [(b.state, pytest.approx(b.ellipticity.ratio)) for b in (batches[0], batches[-1])]
        return *ends, listener.codes()


def test_each_camera_mode_keeps_its_calibration_and_whether_it_is_frozen(service):
    with ControlClient(service.endpoints["control"], timeout=30) as client:
        client.load_calibration(given(LARGE, 1.03))
        scan(service, disks(8, LARGE))
        client.freeze()
        began, ended, told = scan(service, disks(8, LARGE))
        assert began == ended == ("frozen", 1.03)
        assert "calibration_unused" not in told

        began, _, told = scan(service, disks(8, SMALL))
        assert began[0] == "calibrating"
        assert "calibration_unused" in told
        client.load_calibration(given(SMALL, 1.05))
        began, _, _ = scan(service, disks(8, SMALL))
        assert began == ("locked", 1.05)

        began, _, told = scan(service, disks(8, LARGE))
        assert began == ("frozen", 1.03)
        assert "calibration_unused" not in told


def test_a_scan_that_ends_without_a_beam_leaves_its_calibration_to_the_next(service):
    with ControlClient(service.endpoints["control"], timeout=30) as client:
        client.load_calibration(given(LARGE, 1.03))
        blank = np.zeros((24, *LARGE), np.uint16)
        _, ended, _ = scan(service, np.concatenate([disks(4, LARGE), blank]))
        assert ended == ("lost", 1.03)
        began, _, _ = scan(service, disks(8, LARGE))
        assert began == ("locked", 1.03)


def test_a_calibration_that_a_scan_contradicted_is_not_used_in_the_next(service):
    with ControlClient(service.endpoints["control"], timeout=30) as client:
        client.load_calibration(given(LARGE, 1.5))
        began, ended, _ = scan(service, disks(16, LARGE))
        assert began == ("locked", 1.5)
        assert ended[0] == "lost"
        began, _, _ = scan(service, disks(8, LARGE))
        assert began == ("calibrating", 1.0)


def test_what_was_frozen_before_anything_was_found_stays_frozen_and_is_no_calibration(service):
    with ControlClient(service.endpoints["control"], timeout=30) as client:
        scan(service, disks(4, LARGE))
        client.freeze()
        began, ended, _ = scan(service, disks(8, LARGE))
        assert began == ended == ("frozen", 1.0)
        assert client.save_calibration()["ratio_sigma"] is None
