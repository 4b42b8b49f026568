"""What the lines of a scan have in common: the steps from column to column, and the fly-back."""

from __future__ import annotations

import copy
import math
from typing import Final

import numpy as np

Place = tuple[float, float]
"""Along y and x, pixels."""

_LEARNING: Final = 0.1
"""How fast the profile of steps follows from one line to the next."""
_FLY_BACK_PRIOR: Final = 1.0
"""Variance in px^2 of the jump at a line's start that is expected before any was seen, ..."""
_FLY_BACK_FADING: Final = 1.5
"""... and the power of the number of jumps seen that it fades with."""
_SLOPE_POINTS: Final = 64
"""Places along the first line that its slope is taken from, at most."""


class LineProfile:
    """Learns from each line what the next one will be like.

    Args:
        columns: probe positions in a line; 0 where lines are not known, and nothing is learned.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.fly_back: Place = (_FLY_BACK_PRIOR, _FLY_BACK_PRIOR)
        """Variance of the jump at a line's start, px^2."""
        self._fly_backs = 0
        # The step into each column, and the first line until they are known.
        self._steps: list[Place] = [(0.0, 0.0)] * columns
        self._first_line: list[tuple[int, float, float, int]] | None = []

    @property
    def known(self) -> bool:
        """Whether a first line was learned from, or there are no lines to learn from."""
        return self._first_line is None or not self.columns

    def copy(self) -> LineProfile:
        """Return a twin that goes its own way."""
        twin = copy.copy(self)
        twin._steps = self._steps.copy()
        twin._first_line = None if self._first_line is None else self._first_line.copy()
        return twin

    def lines_between(self, first: int, last: int) -> int:
        """Return how many lines begin after frame ``first`` and not after frame ``last``."""
        return last // self.columns - first // self.columns if self.columns else 0

    def path(self, first: int, last: int) -> Place:
        """Sum up the steps from frame ``first`` to frame ``last`` ≥ ``first``."""
        columns = self.columns
        if not columns or first == last:
            return 0.0, 0.0
        if last == first + 1:
            return self._steps[last % columns]
        whole, rest = divmod(last - first, columns)
        some = [self._steps[i % columns] for i in range(last - rest + 1, last + 1)]
        y = whole * sum(s[0] for s in self._steps) + sum(s[0] for s in some)
        x = whole * sum(s[1] for s in self._steps) + sum(s[1] for s in some)
        return y, x

    def learn_step(self, index: int, dy: float, dx: float) -> None:
        """Take in the step into frame ``index``."""
        if self.columns and self._first_line is None:
            column = index % self.columns
            sy, sx = self._steps[column]
            g = max(_LEARNING, 1 / (2 + self._fly_backs))
            self._steps[column] = (sy + g * (dy - sy), sx + g * (dx - sx))

    def learn_fly_back(self, jump: Place, expected: Place, shared: Place) -> None:
        """Take in how far a line began from where it was predicted.

        Args:
            jump: that distance.
            expected: its variance as predicted, which holds the variance of the fly-back.
            shared: the variance of what may have come to it by a pattern that is hard to read.
        """
        self._fly_backs += 1
        gain = max(_LEARNING, 1 / (self._fly_backs + 0.1))
        # One small jump says little about the next one: the expectation fades, it does not vanish.
        least = _FLY_BACK_PRIOR * self._fly_backs**-_FLY_BACK_FADING
        y, x = (
            max(known + gain * _told(known, variance + more) * (d * d - variance), least)
            for d, variance, more, known in zip(jump, expected, shared, self.fly_back, strict=True)
        )
        self.fly_back = (y, x)

    def remember(self, index: int, place: Place, restarts: int) -> None:
        """Keep a place of the first line; between different ``restarts`` there was a jump."""
        if self.columns and self._first_line is not None:
            self._first_line.append((index % self.columns, *place, restarts))

    def finish_first_line(self) -> None:
        """Take the first line's slope for the steps, and its end for the fly-back, once.

        The slope is the median of those between any two frames (Theil and Sen) without a jump
        between them: a wrong beam in a part of the line does not turn it.
        """
        if self._first_line is None:
            return
        line, self._first_line = np.array(self._first_line), None
        if len(line) >= 8:
            line = line[:: math.ceil(len(line) / _SLOPE_POINTS)]
            first, last = np.triu_indices(len(line), 1)
            rise = line[last] - line[first]
            rise = rise[(rise[:, 0] > 0) & (rise[:, 3] == 0)]
            if len(rise) == 0:
                return
            slope = np.median(rise[:, 1:3] / rise[:, :1], axis=0)
            step = (float(slope[0]), float(slope[1]))
            back = (-step[0] * (self.columns - 1), -step[1] * (self.columns - 1))
            self._steps = [back] + [step] * (self.columns - 1)


def _told(known: float, variance: float) -> float:
    """Say how much is learned of a jump where so much of a line's beginning may be something else.

    What is not told apart from noise goes with the square of the jump's share, as information does.
    """
    return min(1.0, (3.0 * known / variance) ** 2)
