"""How soon a process that died is started again."""

from __future__ import annotations

from typing import Final

LONGEST_PAUSE_S: Final = 30.0
SOUND_S: Final = 10.0
"""A process that dies younger than this may do so again at once."""


class Pauses:
    """The pauses before a process is started again: each twice as long while it dies young.

    Args:
        first_s: the first one, and that after a process which lived for long.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._next_s = first_s

    def after(self, lived_s: float) -> float:
        """Return how many seconds to wait after a process lived so long."""
        pause_s = self._first_s if lived_s > SOUND_S else self._next_s
        self._next_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s
