"""One message of every type, with values that are told apart easily."""

import numpy as np

from prenet4d_client import messages as m
from prenet4d_client.wire import Array

_common = {"publisher": "p1", "acquisition_id": "scan-7", "sequence": 3, "time": 1700000000.25}
_indices = np.array([4, 5, 9], dtype=np.int64)
_ellipticity = m.Ellipticity(ratio=1.03, theta=0.5, ratio_sigma=0.001, theta_sigma=None)
_counters = m.Counters(
    received=10, corrected=6, rejected=1, shed=1, in_flight=2, rejected_by_reason={"corrupt": 1}
)
_latency = m.Latency(p50=1.5, p99=4.0)


def _ramp(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8


_patterns = _ramp(3, 8, 9)
_patterns[:, 0, 0] = np.nan
_maps = _ramp(2, 2, 3)
_maps[:, 1, 2] = np.nan

EXAMPLES: dict[str, tuple[m.Header, dict[str, Array]]] = {
    header.type: (header, arrays)
    for header, arrays in [
        (
            m.AcquisitionStart(
                **_common,
                frame_shape=(8, 9),
                dtype="uint16",
                scan_shape=(2, 5),
                expected_frames=10,
                saturation_value=4095.0,
                gain=2.5,
                detector="camera 1",
                metadata={"voltage_kV": 300, "sample": "Si", "α": 1.5, "live": True, "note": None},
            ),
            {"pixel_mask": np.arange(72).reshape(8, 9) % 7 != 0},
        ),
        (
            m.Frames(**_common),
            {"indices": _indices, "frames": np.arange(216, dtype=np.uint16).reshape(3, 8, 9)},
        ),
        (
            m.AcquisitionEnd(
                **_common, aborted=True, reason="stage moved", frames=9, counters=_counters
            ),
            {},
        ),
        (
            m.Telemetry(
                **_common,
                batch=2,
                frame_shape=(8, 9),
                scan_shape=(2, 5),
                expected_frames=None,
                reference_center=(3.5, 4.0),
                ellipticity=_ellipticity,
                state="locked",
                patterns_averaged=256,
                latency=m.Latencies(queue=_latency, compute=_latency, total=_latency),
                frames_per_second=812.5,
                backlog=12,
                counters=_counters,
            ),
            {
                "indices": _indices,
                "center": _ramp(3, 2),
                "center_sigma": _ramp(3, 2) + 1,
                "tracked": _ramp(3, 2) + 2,
                "tracked_sigma": _ramp(3, 2) + 3,
                "shift": _ramp(3, 2) + 4,
                "dose": _ramp(3),
                "flags": np.array([0, 1, 24], dtype=np.uint8),
            },
        ),
        (
            m.Corrected(**_common, batch=2, scan_shape=(2, 5)),
            {"indices": _indices, "patterns": _patterns},
        ),
        (
            m.Aligned(**_common, batch=2, scan_shape=None),
            {"indices": _indices, "patterns": _patterns + 1},
        ),
        (m.Mean(**_common, patterns=64, ellipticity=_ellipticity), {"mean": _ramp(8, 9)}),
        (
            m.Preview(
                **_common,
                index=9,
                scan_shape=(2, 5),
                frame_shape=(16, 19),
                binning=2,
                center=(7.25, 9.5),
                reference_center=(7.5, 9.0),
                ellipticity=_ellipticity,
                dose=1500.5,
            ),
            {"raw": _ramp(8, 9), "corrected": _patterns[0]},
        ),
        (
            m.Maps(
                **_common,
                scan_shape=(4, 6),
                region=(1, 2, 2, 3),
                names=("bright_field", "com_y"),
                detectors=m.DetectorRadii(
                    bright_field_radius=2.5, annular_inner=2.75, annular_outer=3.5, automatic=True
                ),
                frames=11,
                descan=m.Descan(
                    coefficients_y=(3.5, 0.25, -0.5),
                    coefficients_x=(4.0, -0.125, 0.75),
                    sigma_y=(0.01, 0.02, 0.03),
                    sigma_x=(0.04, 0.05, 0.06),
                    residual=(0.0625, 0.125),
                    outliers=0.03125,
                ),
            ),
            {"values": _maps},
        ),
        (
            m.Event(
                **_common,
                level="warning",
                code="frame_rejected",
                message="Frame 3 has NaN counts.",
                details={"index": 3, "reason": "bad_counts"},
            ),
            {},
        ),
        (m.Register(**_common, name="recorder", topics=("corrected", "event"), credit=64), {}),
        (m.Registered(**_common, heartbeat_s=2.0), {}),
        (m.Credit(**_common, credit=32), {}),
        (m.Heartbeat(**_common), {}),
        (m.Goodbye(**_common, reason="it lagged"), {}),
        (
            m.ControlRequest(
                **_common, command="load_calibration", arguments={"calibration": {"ratio": 1.03}}
            ),
            {},
        ),
        (
            m.ControlReply(**_common, ok=True, error="", result={"state": "locked", "n": [1, 2]}),
            {"mean": _ramp(8, 9)},
        ),
    ]
}
