"""Where every frame is: counters that always balance."""

from __future__ import annotations

import threading
from collections import Counter

from prenet4d_client.messages import Counters


class Ledger:
    """Counts what became of frames, for one acquisition or for all.

    At any time ``received = corrected + rejected + shed + in_flight``. Entries are made on the
    pipeline's thread and copied to ``total``; any thread may take a snapshot.
    """

    def __init__(self, total: Ledger | None = None) -> None:
        self._total = total
        self._lock = threading.Lock()
        self._received = self._corrected = self._shed = 0
        self._rejected: Counter[str] = Counter()

    def receive(self, frames: int) -> None:
        """Frames are in the ring now: in flight until one of the others is told of them."""
        with self._lock:
            self._received += frames
        if self._total is not None:
            self._total.receive(frames)

    def correct(self, frames: int) -> None:
        """Received frames have been corrected."""
        with self._lock:
            self._corrected += frames
        if self._total is not None:
            self._total.correct(frames)

    def reject(self, frames: int, reason: str) -> None:
        """Received frames cannot be used."""
        with self._lock:
            self._rejected[reason] += frames
        if self._total is not None:
            self._total.reject(frames, reason)

    def shed(self, frames: int) -> None:
        """Received frames are dropped because there is no time or no room for them."""
        with self._lock:
            self._shed += frames
        if self._total is not None:
            self._total.shed(frames)

    def snapshot(self) -> Counters:
        """The counters as they stand, in the form in which they are published."""
        with self._lock:
            rejected = self._rejected.total()
            return Counters(
                received=self._received,
                corrected=self._corrected,
                rejected=rejected,
                shed=self._shed,
                in_flight=self._received - self._corrected - rejected - self._shed,
                rejected_by_reason=dict(self._rejected),
            )
