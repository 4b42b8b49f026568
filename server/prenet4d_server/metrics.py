"""How the service is doing: measured rates and latencies, and the status that shows them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from prenet4d_client.messages import Counters, Ellipticity, Latencies, Latency, State
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict

WINDOW = 2048
"""Frames over which latencies are summed up."""
RATE_OVER_S = 2.0
_REFRESH_S = 0.1

Milliseconds = npt.NDArray[np.float64]
Stage = Literal["queue", "compute", "total"]


class LatencyWindow:
    """Median and 99th percentile over the last frames; any thread may add and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = np.empty(WINDOW)
        self._count = 0
        self._summary = Latency(p50=0.0, p99=0.0)
        self._stale_at = 0.0

    def add(self, values: Milliseconds) -> None:
        """Add the latencies of some frames, in milliseconds."""
        values = values[-WINDOW:]
        with self._lock:
            places = np.arange(self._count, self._count + len(values)) % WINDOW
            self._values[places] = values
            self._count += len(values)

    def read(self) -> Latency:
        """The summary, at most a tenth of a second old; zeros before the first frame."""
        now = time.monotonic()
        with self._lock:
            if now >= self._stale_at and self._count:
                known = self._values[: min(self._count, WINDOW)]
                p50, p99 = np.percentile(known, (50, 99))
                self._summary = Latency(p50=float(p50), p99=float(p99))
                self._stale_at = now + _REFRESH_S
            return self._summary


class Meters:
    """Frames per second and latencies of the pipeline."""

    def __init__(self) -> None:
        self._windows: dict[Stage, LatencyWindow] = {
            "queue": LatencyWindow(),
            "compute": LatencyWindow(),
            "total": LatencyWindow(),
        }
        self._lock = threading.Lock()
        self._done: deque[tuple[float, int]] = deque()
        self._sum = 0

    def latency(self, stage: Stage, seconds: npt.NDArray[np.float64]) -> None:
        """Some frames took so long."""
        self._windows[stage].add(seconds * 1e3)

    def done(self, frames: int) -> None:
        """Some frames have been corrected just now."""
        with self._lock:
            self._done.append((time.monotonic(), frames))
            self._sum += frames

    @property
    def latencies(self) -> Latencies:
        """Where a frame's time goes."""
        return Latencies(**{stage: window.read() for stage, window in self._windows.items()})

    @property
    def frames_per_second(self) -> float:
        """The rate over the last seconds."""
        now = time.monotonic()
        with self._lock:
            while self._done and self._done[0][0] < now - RATE_OVER_S:
                self._sum -= self._done.popleft()[1]
            if len(self._done) < 2:
                return 0.0
            # From the first batch's end: its own frames took time before it.
            elapsed = max(now - self._done[0][0], 1e-3)
            return (self._sum - self._done[0][1]) / elapsed


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class AcquisitionStatus(_Part):
    """The acquisition that is running."""

    acquisition_id: str
    series: str
    detector: str
    frame_shape: tuple[int, int]
    dtype: str
    scan_shape: tuple[int, int] | None
    expected_frames: int | None
    gain: float
    saturation_value: float | None
    metadata: dict[str, str | int | float | bool | None]
    counters: Counters


class SourceStatus(_Part):
    """The detector's side."""

    kind: str
    address: str
    ready: bool
    """Its socket or file is open."""
    restarts: int
    """How often the ingest process had to be started again."""


class AlarmStatus(_Part):
    """An alarm that stands."""

    code: str
    """The same as the code of the event that raised it."""
    subject: str
    """Whom it is about, where there are several, such as a receiver's name; else empty."""
    message: str
    """In words, with the value as it is now."""
    since: float
    """When it was raised, in seconds since the epoch."""
    value: float
    threshold: float
    """Of the value; the alarm is cleared well below it."""


class RecordingStatus(_Part):
    """The recording that the operator starts and stops."""

    state: Literal["idle", "starting", "recording", "stopping"]
    directory: str
    """Where all recordings go."""
    free_bytes: int
    """On its disk."""
    name: str
    """Of the recording that runs, or ran last; empty before the first."""
    files: tuple[str, ...]
    """Their names, in the order in which they were begun."""
    patterns: int
    """Probe positions that have a pattern, over all files."""
    started: float | None
    """In seconds since the epoch."""
    complete: bool
    """Whether every acquisition is in its file to its regular end, so far."""
    reason: str
    """Why not."""


class Status(_Part):
    """What the service is doing, for the operator, the status command and the metrics."""

    version: str
    publisher: str
    """This service's life: the same as in its messages."""
    healthy: bool
    """Its threads and processes run."""
    ready: bool
    """Networks loaded, source open: frames are welcome."""
    uptime_s: float
    engine: str
    """What corrects, and where it runs."""
    endpoints: dict[str, str]
    source: SourceStatus
    state: State | None
    """The calibration's; ``None`` before the first batch."""
    ellipticity: Ellipticity | None
    reference_center: tuple[float, float] | None
    patterns_averaged: int
    frames_per_second: float
    backlog: int
    """Frames waiting in the ring."""
    latency: Latencies
    counters: Counters
    """Over the service's life."""
    acquisition: AcquisitionStatus | None
    receivers: tuple[str, ...]
    """Who is registered on the lossless path."""
    receivers_behind_s: dict[str, float]
    """Receiver → how old the oldest message is that waits for its credit, in seconds."""
    alarms: tuple[AlarmStatus, ...]
    """Those that stand, oldest first."""
    recording: RecordingStatus | None
    """``None`` where ``recording.directory`` is not configured."""
    recent_events: tuple[str, ...]
    """The last events, oldest first."""


class ServiceCollector(Collector):
    """Turns the status into Prometheus' families when it is asked to."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand."""
        now = self._status()
        yield InfoMetricFamily(
            "prenet4d", "The service.", {"version": now.version, "engine": now.engine}
        )
        counted = now.counters
        frames = CounterMetricFamily(
            "prenet4d_frames", "Frames, by what became of them.", labels=["outcome"]
        )
        for outcome in ("received", "corrected", "rejected", "shed"):
            frames.add_metric([outcome], getattr(counted, outcome))
        yield frames
        rejected = CounterMetricFamily(
            "prenet4d_frames_rejected", "Frames that could not be used.", labels=["reason"]
        )
        for reason, count in counted.rejected_by_reason.items():
            rejected.add_metric([reason], count)
        yield rejected
        latency = GaugeMetricFamily(
            "prenet4d_latency_seconds",
            "Where a frame's time goes, over the last frames.",
            labels=["stage", "quantile"],
        )
        for stage in ("queue", "compute", "total"):
            summary: Latency = getattr(now.latency, stage)
            latency.add_metric([stage, "0.5"], summary.p50 / 1e3)
            latency.add_metric([stage, "0.99"], summary.p99 / 1e3)
        yield latency
        state = GaugeMetricFamily(
            "prenet4d_state", "1 for the calibration's state.", labels=["state"]
        )
        for name in ("calibrating", "locked", "frozen", "lost"):
            state.add_metric([name], float(now.state == name))
        yield state
        yield CounterMetricFamily(
            "prenet4d_ingest_restarts",
            "How often the ingest process had to be started again.",
            value=now.source.restarts,
        )
        ellipticity = now.ellipticity or Ellipticity()
        gauges = {
            "frames_in_flight": ("Frames received and not yet accounted for.", counted.in_flight),
            "backlog_frames": ("Frames waiting in the ring.", now.backlog),
            "frames_per_second": ("Frames corrected a second.", now.frames_per_second),
            "ellipticity_ratio": ("Distortion in use, a/b.", ellipticity.ratio),
            "ellipticity_theta_radians": ("Direction of the major axis.", ellipticity.theta),
            "patterns_averaged": ("Patterns in the running mean.", now.patterns_averaged),
            "lossless_receivers": ("Registered receivers.", len(now.receivers)),
            "uptime_seconds": ("Since the service started.", now.uptime_s),
            "healthy": ("1 while its threads and processes run.", now.healthy),
            "ready": ("1 while frames are welcome.", now.ready),
        }
        for name, (documentation, value) in gauges.items():
            yield GaugeMetricFamily(f"prenet4d_{name}", documentation, value=float(value))


def exposition(status: Callable[[], Status]) -> Callable[[], bytes]:
    """What ``/metrics`` answers, made from the status whenever it is asked for."""
    registry = CollectorRegistry()
    registry.register(ServiceCollector(status))
    return lambda: generate_latest(registry)
