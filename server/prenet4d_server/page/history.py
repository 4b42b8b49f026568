"""The last hour of what has a trend, one row a second, in memory that never grows."""

from __future__ import annotations

import math
import threading
import time
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_client.wire import Message

ROWS = 3600
"""An hour."""
GAP_S = 5.0
"""A longer silence breaks the curves: two rows without values stand at its ends."""
COLUMNS = (
    "time", "center_y", "center_x", "sigma_y", "sigma_x", "ratio", "ratio_sigma", "theta",
    "theta_sigma", "dose", "frames_per_second", "p50", "p99", "backlog",
)  # fmt: skip
"""``time`` in seconds since the epoch, pixels, degrees, electrons, milliseconds, frames."""

Rows: TypeAlias = dict[str, npt.NDArray[np.float64]]


class History:
    """Sums up the telemetry of each second; one thread adds, any may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table = np.full((ROWS, len(COLUMNS)), math.nan)
        self._count = 0
        self._second = 0
        self._silence: list[float] = []
        """The ends of the silence before the second that has begun."""
        self._waiting: list[npt.NDArray[np.float64]] = []

    @property
    def count(self) -> int:
        """Rows entered so far, those that have been forgotten included."""
        return self._count

    def add(self, telemetry: Message) -> None:
        """Enter a batch's telemetry; a row appears when its second is over."""
        second = int(telemetry.time)
        if second != self._second:
            self.flush()
            if self._count and second - self._second > GAP_S:
                self._silence = [self._second + 1.0, second - 1.0]
            self._second = second
        self._waiting.append(_values(telemetry))

    def flush(self) -> None:
        """Enter the second that has begun, because nothing more is expected of it."""
        if self._waiting:
            row = _mean(np.array(self._waiting))
            row[0] = self._second
            nothing = [math.nan] * (len(COLUMNS) - 1)
            self._append(*(np.array([end, *nothing]) for end in self._silence), row)
            self._waiting.clear()
            self._silence.clear()

    def flush_if_over(self) -> None:
        """Enter the second that has begun, if the clock says that it is over."""
        if self._second < int(time.time()):
            self.flush()

    def after(self, count: int) -> tuple[Rows, int]:
        """The rows from number ``count`` on that are still known, and the number to ask with next.

        Columns are (n,) float64, by name; NaN where a value is not known.
        """
        with self._lock:
            first = max(count, self._count - ROWS)
            rows = self._table[np.arange(first, self._count) % ROWS]
            return dict(zip(COLUMNS, rows.T.copy(), strict=True)), self._count

    def _append(self, *rows: npt.NDArray[np.float64]) -> None:
        with self._lock:
            for row in rows:
                self._table[self._count % ROWS] = row
                self._count += 1


def _values(telemetry: Message) -> npt.NDArray[np.float64]:
    ellipticity, latency = telemetry.ellipticity, telemetry.latency.total
    sigma = ellipticity.ratio_sigma, ellipticity.theta_sigma
    ratio_sigma, theta_sigma = (math.nan if value is None else value for value in sigma)
    return np.array(
        [
            telemetry.time,
            *_mean(telemetry.tracked),
            *_mean(telemetry.tracked_sigma),
            ellipticity.ratio,
            ratio_sigma,
            math.degrees(ellipticity.theta),
            math.degrees(theta_sigma),
            *_mean(telemetry.dose[:, None]),
            telemetry.frames_per_second,
            latency.p50,
            latency.p99,
            telemetry.backlog,
        ]
    )


def _mean(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The mean of each column's finite values; NaN where there are none."""
    good = np.isfinite(rows)
    sums = np.where(good, rows, 0.0).sum(axis=0, dtype=np.float64)
    counts = good.sum(axis=0)
    means: npt.NDArray[np.float64] = np.full(sums.shape, math.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
