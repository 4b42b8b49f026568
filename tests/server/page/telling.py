"""What a service would say, as the page's feed gets it from the wire."""

from __future__ import annotations

from typing import Any

import numpy as np

from prenet4d_client import messages as m
from prenet4d_client.wire import Message, decode, encode

LATENCY = m.Latency(p50=10.0, p99=30.0)


def telemetry(at: float = 1000.0, frames: int = 4, **fields: Any) -> Message:
    """One batch's telemetry; ``tracked`` and ``dose`` may be given too."""
    given = {name: fields.pop(name) for name in ("tracked", "dose") if name in fields}
    pairs = np.full((frames, 2), 7.5, np.float32)
    arrays = {
        "indices": np.arange(frames, dtype=np.int64),
        "flags": np.zeros(frames, np.uint8),
        "dose": np.full(frames, 500.0, np.float32),
        **dict.fromkeys(("center", "tracked", "shift"), pairs),
        **dict.fromkeys(("center_sigma", "tracked_sigma"), np.full_like(pairs, 0.25)),
        **given,
    }
    header = {
        "acquisition_id": "scan",
        "time": at,
        "batch": 0,
        "frame_shape": (16, 16),
        "scan_shape": (4, 5),
        "expected_frames": 20,
        "reference_center": (7.5, 7.5),
        "ellipticity": m.Ellipticity(ratio=1.03, theta=0.5, ratio_sigma=0.002, theta_sigma=0.1),
        "state": "calibrating",
        "patterns_averaged": 83,
        "latency": m.Latencies(queue=LATENCY, compute=LATENCY, total=LATENCY),
        "frames_per_second": 250.0,
        "backlog": 3,
        "counters": m.Counters(received=10, corrected=7, rejected=1, shed=0, in_flight=2),
    }
    return sent(m.Telemetry(**(header | fields)), arrays)


def event(message: str, at: float = 1000.0, level: str = "warning") -> Message:
    return sent(m.Event(level=level, code="something", message=message, time=at), {})


def start(acquisition_id: str = "scan") -> Message:
    header = m.AcquisitionStart(
        acquisition_id=acquisition_id,
        frame_shape=(16, 16),
        dtype="uint16",
        scan_shape=(4, 5),
        expected_frames=20,
        detector="<camera>",
        time=990.0,
    )
    return sent(header, {})


def sent(header: m.Header, arrays: dict[str, Any]) -> Message:
    """The message as it comes out of the wire."""
    return decode([bytes(part) for part in encode(header, arrays)])
