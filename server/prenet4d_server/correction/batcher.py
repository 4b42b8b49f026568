"""The batcher: gathers frames from the ring into batches, starts and ends in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from prenet4d_client.wire import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES
from prenet4d_server.config import BatchSettings
from prenet4d_server.ingest.inlet import Inlet
from prenet4d_server.ingest.notices import Ended, Started
from prenet4d_server.ingest.ring import Pixels, Slots, wait_readable
from prenet4d_server.sources.base import Indices


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of one acquisition, as views into the ring: valid until they are released."""

    acquisition: Started
    slots: Slots

    @property
    def frames(self) -> Pixels:
        """(n, h, w) raw counts."""
        return self.slots.frames

    @property
    def indices(self) -> Indices:
        """(n,) each frame's number within the acquisition."""
        return self.slots.indices

    def __len__(self) -> int:
        return len(self.slots.indices)


class Batcher:
    """Closes a batch when it is full or when its oldest frame has waited long enough.

    A batch never holds frames of two acquisitions. It also closes where the ring's memory ends,
    so that its frames are neighbours and need no copy.
    """

    def __init__(self, inlet: Inlet, settings: BatchSettings) -> None:
        self._inlet = inlet
        self._settings = settings
        self._acquisition: Started | None = None
        self.position = 0
        """Frames before this one have been handed out."""

    @property
    def arrived(self) -> int:
        """Frames before this position have come and belong to the present acquisition or before."""
        marks, committed = self._inlet.marks, self._inlet.ring.committed
        return min(committed, marks[0].at) if marks else committed

    @property
    def backlog(self) -> int:
        """Frames that wait in the ring."""
        return self._inlet.ring.committed - self.position

    def next(
        self, timeout_s: float, wake: Sequence[int] = (), *, hurry: bool = False
    ) -> Started | Ended | Batch | None:
        """What comes next.

        Args:
            timeout_s: how long to wait for it.
            wake: descriptors that end the waiting when they become readable.
            hurry: close a batch as soon as there is a frame.

        Returns:
            The start or the end of an acquisition, a batch to be given to :meth:`release`, or
            ``None`` where nothing came in time.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._inlet.update()
            marks = self._inlet.marks
            if marks and marks[0].at == self.position:
                mark = marks.popleft()
                if isinstance(mark, Started):
                    self._acquisition = mark
                    self._inlet.ring.lay(mark.layout)
                return mark
            closes = until
            if waiting := self.arrived - self.position:
                batch, full = self._gather(waiting)
                closes = float(batch.slots.arrived[0]) + self._settings.max_delay_ms / 1e3
                if full or hurry or closes <= time.monotonic():
                    self.position += len(batch)
                    return batch
            now = time.monotonic()
            if now >= until:
                return None
            woken = wait_readable([*self._inlet.descriptors, *wake], min(until, closes) - now)
            if not set(woken).isdisjoint(wake):
                return None

    def release(self, batch: Batch) -> None:
        """Free the batch's slots; its views must not be used any more."""
        self._inlet.ring.release(len(batch))

    def _gather(self, waiting: int) -> tuple[Batch, bool]:
        """The batch that could be closed now, and whether waiting would not make it larger."""
        assert self._acquisition is not None
        # Half the ring at most: the other half fills while this one is worked on.
        size = min(self._settings.size, self._acquisition.slots // 2, self._told_at_once())
        capacity = len(self._inlet.ring.view(self.position, size).indices)
        slots = self._inlet.ring.view(self.position, min(capacity, waiting))
        marks = self._inlet.marks
        full = waiting >= capacity or bool(marks and marks[0].at == self.position + waiting)
        return Batch(self._acquisition, slots), full

    def _told_at_once(self) -> int:
        """Frames whose patterns, in float32, are no larger than what receivers accept."""
        assert self._acquisition is not None
        h, w = self._acquisition.frame_shape
        each = h * w * 4 + 8  # and its index
        return max(1, (MAX_MESSAGE_BYTES - MAX_HEADER_BYTES) // each)
