"""Which messages were missed, read from their sequence numbers."""

from __future__ import annotations

from prenet4d_client.messages import Header


class GapCounter:
    """Counts the holes in the sequence of every message type.

    A changed publisher is a service that was started again and counts anew: that is no gap.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._last: dict[str, tuple[str, int]] = {}

    def gap_before(self, header: Header) -> int:
        """Return how many messages are missing between the last one of this type and this one."""
        publisher, sequence = self._last.get(header.type, ("", -1))
        self._last[header.type] = (header.publisher, header.sequence)
        if publisher != header.publisher or sequence < 0:
            return 0
        gap = max(0, header.sequence - sequence - 1)
        self.missed += gap
        return gap
