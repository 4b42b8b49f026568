"""What several sentences say in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def counted(n: int, thing: str) -> str:
    """So many of a thing: ``1 frame``, ``1,024 frames``."""
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def counted_of(n: int, absent: int, thing: str) -> str:
    """The same beside those that should be there: ``1,024 of 4,096 frames``, or ``1 frame``."""
    return f"{n:,} of {counted(n + absent, thing)}" if absent else counted(n, thing)


def foremost(reasons: Mapping[str, int]) -> str:
    """The reason that frames were rejected for most often, in words; empty where none was."""
    return "".join(reason.replace("_", " ") for reason, _ in Counter(reasons).most_common(1))


def frame_rate(per_second: float) -> str:
    """Frames per second, slow ones with a decimal: ``1,024 frames/s``, ``0.3 frames/s``."""
    return f"{per_second:,.{0 if per_second >= 100 else 1}f} frames/s"
