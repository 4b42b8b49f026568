"""Telling troubles at a bounded rate: a flood of bad frames must not become a flood of events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from prenet4d_server.ingest.notices import Remark


@dataclass(slots=True)
class _Kind:
    told: float
    """When one of this kind was last told."""
    waiting: Remark | None = None
    times: int = 0


class Remarks:
    """Passes on the first remark of a kind at once, and sums up those that follow.

    A kind is a code within an acquisition. The sums of rejected and shed frames are exact at any
    time after ``flush(everything=True)``.
    """

    def __init__(self, tell: Callable[[Remark], None], every_s: float = 1.0) -> None:
        self._tell = tell
        self._every_s = every_s
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def add(self, remark: Remark) -> None:
        """Tell it now, or add it to those that wait."""
        key = (remark.acquisition_id, remark.code)
        kind = self._kinds.setdefault(key, _Kind(told=-1e9))
        kind.times += 1
        if kind.waiting is None:
            kind.waiting = remark
        else:
            kind.waiting = replace(
                kind.waiting,
                rejected=kind.waiting.rejected + remark.rejected,
                shed=kind.waiting.shed + remark.shed,
            )
        self._pass_on(kind, time.monotonic())

    def flush(self, *, everything: bool = False) -> None:
        """Tell what has waited long enough, or all of it."""
        now = time.monotonic()
        for kind in self._kinds.values():
            self._pass_on(kind, now, at_once=everything)
        if everything:
            self._kinds.clear()

    def _pass_on(self, kind: _Kind, now: float, *, at_once: bool = False) -> None:
        if kind.waiting is None or not (at_once or now - kind.told >= self._every_s):
            return
        more = f" (and {kind.times - 1} more like it)" if kind.times > 1 else ""
        self._tell(replace(kind.waiting, message=kind.waiting.message + more))
        kind.told, kind.waiting, kind.times = now, None, 0
