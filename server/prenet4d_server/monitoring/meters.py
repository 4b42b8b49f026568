"""How fast the service is: rates and latencies of the frames that come by."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np
import numpy.typing as npt

from prenet4d_client.messages import Latencies, Latency
from prenet4d_server.monitoring.status import Histogram, Stage

WINDOW = 2048
"""Frames over which latencies are summed up."""
RATE_OVER_S = 2.0
_GAPS = 3
"""Where frames come slowly, the rate is taken over so many times between the last two batches."""
_REFRESH_S = 0.1

Milliseconds = npt.NDArray[np.float64]
BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Upper bounds of the histograms' buckets, in seconds."""
_BOUNDS_MS = 1e3 * np.array(BOUNDS_S)


class LatencyWindow:
    """Median and 99th percentile over the last frames, and a histogram of all of them.

    Any thread may add and read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = np.empty(WINDOW)
        self._count = 0
        self._summary = Latency(p50=0.0, p99=0.0)
        self._stale_at = 0.0
        self._buckets = np.zeros(len(BOUNDS_S) + 1, np.int64)
        self._sum_s = 0.0

    def add(self, values: Milliseconds) -> None:
        """Add the latencies of some frames, in milliseconds."""
        buckets = np.searchsorted(_BOUNDS_MS, values)
        counts = np.bincount(buckets, minlength=len(self._buckets))
        total_s = float(values.sum()) / 1e3
        values = values[-WINDOW:]
        with self._lock:
            self._buckets += counts
            self._sum_s += total_s
            places = np.arange(self._count, self._count + len(values)) % WINDOW
            self._values[places] = values
            self._count += len(values)

    @property
    def histogram(self) -> Histogram:
        """Of all frames so far."""
        with self._lock:
            return Histogram(bounds=BOUNDS_S, counts=tuple(self._buckets.tolist()), sum=self._sum_s)

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
    def histograms(self) -> dict[Stage, Histogram]:
        """How often each stage took how long, over the service's life."""
        return {stage: window.histogram for stage, window in self._windows.items()}

    @property
    def frames_per_second(self) -> float:
        """The rate over the last seconds."""
        now = time.monotonic()
        with self._lock:
            gap = self._done[-1][0] - self._done[-2][0] if len(self._done) > 1 else 0.0
            since = now - max(RATE_OVER_S, _GAPS * gap)
            while self._done and self._done[0][0] < since:
                self._sum -= self._done.popleft()[1]
            if len(self._done) < 2:
                return 0.0
            # From the first batch's end: its own frames took time before it.
            elapsed = max(now - self._done[0][0], 1e-3)
            return (self._sum - self._done[0][1]) / elapsed
