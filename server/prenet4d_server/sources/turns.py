"""Several senders on one socket: one's acquisition ends before the next one's begins.

ZeroMQ reads its connections in turn. So the first messages of a sender that has just connected come
between the last ones of the sender before it, which is done and gone, but not yet read: without
this, its last frames would be refused, as those of an acquisition that another has ended.
"""

from __future__ import annotations

import math

from prenet4d_server.errors import SequenceError
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault, SourceEvent

PATIENCE_S, MOST_PATIENCE_S = 1.0, 60.0
_GAPS = 5
"""A sender of which nothing was read, while others waited, for so many times the longest time
between two of its frames is gone: within these bounds."""


class Turns:
    """Holds a sender's events back while the acquisition of another is still being read.

    Args:
        most_bytes: where so much is held back, the other goes on beside it and is not waited for.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._running: str | None = None
        self._silence = 0.0
        """How long nothing of the running sender was read."""
        self._longest = 0.0
        """The longest time between two of its messages, without the one before its first frame."""
        self._waited = 0.0
        """How much of its silence others have been waiting."""
        self._held: list[tuple[str, SourceEvent, int]] = []
        self._held_bytes = 0
        self._held_s = 0.0

    def take(self, sender: str, event: SourceEvent, size: int) -> list[SourceEvent]:
        """Return the events whose turn it is now that this one has come.

        Args:
            sender: who sent it.
            event: what was sent.
            size: bytes of memory that it holds.
        """
        if sender == self._running:
            self._longest = max(self._longest, self._silence)
            self._silence = self._waited = 0.0
            if not isinstance(event, AcquisitionEnd):
                return [event]
            return [event, *self._release()]
        if self._running is not None and (self._held or isinstance(event, AcquisitionStart)):
            self._held.append((sender, event, size))
            self._held_bytes += size
            return self._release() if self._held_bytes > self._most_bytes else []
        if isinstance(event, AcquisitionStart):
            # How long it takes to its first frame says nothing of its pace.
            self._running, self._silence = sender, -math.inf
            self._longest = self._waited = 0.0
        return [event]

    def pass_time(self, seconds: float) -> list[SourceEvent]:
        """Return the events whose turn it is after the socket was looked at for so long."""
        self._silence += seconds
        if not self._held:
            return []
        self._waited += seconds
        patience = min(max(PATIENCE_S, _GAPS * self._longest), MOST_PATIENCE_S)
        if self._waited >= patience:
            return self._release()
        before, self._held_s = self._held_s, self._held_s + seconds
        first = self._held[0][1]
        if not before < PATIENCE_S <= self._held_s or not isinstance(first, AcquisitionStart):
            return []
        why = SequenceError(
            f"Series {first.series} waits for its turn: another sender's is still being read. It "
            f"begins when that one has ended, or has been silent for {patience:.0f} s."
        )
        return [Fault(why)]

    def _release(self) -> list[SourceEvent]:
        held, self._held, self._held_bytes = self._held, [], 0
        self._running, self._held_s = None, 0.0
        return [event for each in held for event in self.take(*each)]
