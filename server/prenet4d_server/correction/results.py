"""Corrected batches as they are told: telemetry, patterns, the running mean, previews."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prenet4d_client import messages
from prenet4d_engines.batch import CorrectedBatch, Float32
from prenet4d_server.config import StreamSettings
from prenet4d_server.correction.batcher import Batch
from prenet4d_server.ingest.notices import Started
from prenet4d_server.monitoring.meters import Meters
from prenet4d_server.publishing import outgoing
from prenet4d_server.publishing.publisher import Publisher

_UNSEEN_PREVIEW_S = 2.0
"""Previews that nobody sees yet are made no more often than this."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown of a batch, in memory of its own: the batch's slots may be released."""

    started: Started
    result: CorrectedBatch
    arrived: npt.NDArray[np.float64]
    """(n,) when each frame arrived, seconds of the monotonic clock."""
    corrected: Float32 | None
    """(n, h, w) counts; ``None``: nobody wants them."""
    aligned: Float32 | None
    """(n, h, w) counts; ``None``: nobody wants them."""
    preview: outgoing.Outgoing | None


class Results:
    """Hands batches to the publisher; what people look at, at a bounded rate.

    Args:
        publisher: where to.
        settings: how often.
        meters: are told how long a frame took until it was sent.
    """

    def __init__(self, publisher: Publisher, settings: StreamSettings, meters: Meters) -> None:
        self._publisher, self._settings, self._meters = publisher, settings, meters
        self._batches = 0
        self._next_mean = self._next_preview = 0.0
        self._last_preview: outgoing.Outgoing | None = None
        self._looked_at = False

    def take(self, result: CorrectedBatch, batch: Batch) -> Shown:
        """Take what is to be shown, before the batch is released."""
        corrected, aligned = self._patterns(result, batch)
        preview = self._preview(result, batch)
        arrived = batch.slots.arrived.copy()
        return Shown(batch.acquisition, result, arrived, corrected, aligned, preview)

    def publish(self, shown: Shown, *, backlog: int, counters: messages.Counters) -> None:
        """Hand a batch to the publisher; waits while a receiver holds the pipeline back."""
        started, result = shown.started, shown.result
        number, indices = self._batches, result.indices
        self._batches += 1
        if number == 0:  # later ones are entered once they are sent
            self._enter_latency(shown.arrived)
        self._publisher.publish(
            outgoing.telemetry(
                started,
                result,
                number,
                latencies=self._meters.latencies,
                frames_per_second=self._meters.frames_per_second,
                backlog=backlog,
                counters=counters,
            ),
            outgoing.patterns(messages.Corrected, started, number, indices, shown.corrected),
            outgoing.patterns(messages.Aligned, started, number, indices, shown.aligned),
            on_sent=(lambda: self._enter_latency(shown.arrived)) if number else None,
        )
        if shown.preview is not None:
            self._publisher.publish(shown.preview)

    def tell_state(self, result: CorrectedBatch, acquisition_id: str) -> None:
        """Say where the calibration stands now."""
        ellipticity = result.ellipticity
        found = f"{result.state}: ratio {ellipticity.ratio:.4f}, long axis at "
        found += f"{math.degrees(ellipticity.theta):.1f}°"
        self._publisher.event(
            "warning" if result.state == "lost" else "info",
            f"calibration_{result.state}",
            f"The calibration is {'under way' if result.state == 'calibrating' else found}.",
            acquisition_id,
        )

    def mean_is_due(self) -> bool:
        """Whether it is time to publish the running mean again, and somebody wants it."""
        return time.monotonic() >= self._next_mean and self._publisher.wants("mean")

    def publish_mean(
        self, acquisition_id: str, mean: tuple[Float32, int], ellipticity: messages.Ellipticity
    ) -> None:
        """Publish the running mean.

        Args:
            acquisition_id: whose.
            mean: (h, w) counts, and of how many patterns.
            ellipticity: read from it.
        """
        self._next_mean = time.monotonic() + self._settings.mean_every_s
        self._publisher.publish(outgoing.mean(acquisition_id, *mean, ellipticity))

    def _patterns(
        self, result: CorrectedBatch, batch: Batch
    ) -> tuple[Float32 | None, Float32 | None]:
        """The batch's corrected and aligned patterns.

        A corrector that corrects nothing returns the frames as they lie in the ring; they are
        converted and copied only if somebody wants them.
        """
        if not np.may_share_memory(result.corrected, batch.frames):
            return result.corrected, result.aligned
        if not (self._publisher.wants("corrected") or self._publisher.wants("aligned")):
            return None, None
        copied = batch.frames.astype(np.float32)
        return copied, copied

    def show_last_preview(self) -> None:
        """Publish the last preview again where somebody has begun to look, between scans too."""
        before, self._looked_at = self._looked_at, self._publisher.wants("preview")
        if not before and self._looked_at:
            self._next_preview = 0.0
            if self._last_preview is not None:
                self._publisher.publish(self._last_preview)

    def _preview(self, result: CorrectedBatch, batch: Batch) -> outgoing.Outgoing | None:
        """The batch's last frame for people to look at, where one is due and somebody looks.

        Where nobody looks, one is kept now and then for who comes later.
        """
        now = time.monotonic()
        if now < self._next_preview:
            return None
        looked_at = self._publisher.wants("preview")
        every_s = self._settings.preview_every_s
        self._next_preview = now + (every_s if looked_at else max(every_s, _UNSEEN_PREVIEW_S))
        self._last_preview = outgoing.preview(
            batch.acquisition, result, batch.frames[-1], self._settings.preview_pixels
        )
        if not looked_at:
            return None
        self._looked_at = True
        return self._last_preview

    def _enter_latency(self, arrived: npt.NDArray[np.float64]) -> None:
        self._meters.latency("total", time.monotonic() - arrived)
