"""What a recording tells of where its patterns come from."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np

from prenet4d_client import ControlClient, Subscriber
from prenet4d_engines import weights
from prenet4d_engines.calibration import Calibration
from prenet4d_server.config_file import load_settings
from prenet4d_server.processes import reserved_addresses
from prenet4d_server.publishing.provenance import provenance
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, listening, sender, settings


def test_versions_weights_and_configuration_are_told() -> None:
    chosen = load_settings(batch={"size": 7}, security={"insecure": True})
    told = provenance(chosen, "torch on a CPU")
    assert told["versions"]["prenet4d"] == version("prenet4d")
    assert told["weights"].keys() == {"denoise", "center", "refine", "ellipse"}
    assert told["weights"]["center"] == weights.card("center")["sha256"]
    assert told["configuration"]["batch"]["size"] == 7
    assert "security" not in told["configuration"]
    assert provenance(settings(), "identity")["weights"] == {}


def test_every_acquisition_is_announced_with_it_and_with_its_calibration() -> None:
    calibration = {
        "ratio": 1.05, "theta": 0.3, "frame_shape": [16, 24], "reference_center": [7.5, 11.5],
    }  # fmt: skip
    with (
        Service(settings()) as service,
        ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
        listening(service) as listener,
        sender(service) as source,
    ):
        client.load_calibration(calibration)
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3))
        told = listener.wait_for("acquisition_start").provenance
        source.end()
    assert told["engine"] == service.status().engine
    assert told["configuration"]["corrector"]["backend"] == "identity"
    assert told["calibration"]["reference_center"] == [7.5, 11.5]


def test_a_service_that_is_started_with_a_calibration_has_it_before_the_first_frame(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "raw.npy", np.ones((2, 3, 16, 24), np.uint16))
    calibration = Calibration(
        ratio=1.05, theta=0.3, frame_shape=(16, 24), reference_center=(8.5, 10.25)
    )
    with reserved_addresses(1) as (address,), Subscriber(
        address, "acquisition_start", timeout=TIMEOUT_S
    ) as stream:  # fmt: skip
        stream._open()  # there before the service, whose file begins at once
        source = {"kind": "replay", "path": tmp_path / "raw.npy", "address": None}
        with Service(settings(source=source, stream={"address": address}), calibration):
            told = stream.receive().provenance
    assert told["calibration"]["reference_center"] == [8.5, 10.25]
