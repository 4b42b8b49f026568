"""Inside the center track: where one axis is, how noisy centers are, whom most frames speak for."""

from __future__ import annotations

import math
from collections.abc import Sequence

_MAX_LEAD = 6.0
"""Nats of evidence that one filter can be ahead of another."""


class Walk:
    """Random-walk Kalman filters on one axis, of several speeds, mixed by their evidence.

    Some of them take the centers to be better than they claim: where a grain makes the network
    needlessly unsure, what its frames agree on is followed and not smoothed away.

    ``mean`` and ``variance`` are the mixture's; ``walk`` is its variance per frame.

    Args:
        filters: of each filter, how far it thinks that the center may walk from one frame to the
            next, and the share of the centers' claimed variances that it believes in.
        memory: how much of its past evidence a filter keeps from one frame to the next.
        level: where the center is.
        variance: of ``level``.
    """

    __slots__ = (
        "_beliefs",
        "_memory",
        "_scores",
        "_variances",
        "_walks",
        "levels",
        "mean",
        "variance",
        "walk",
    )

    def __init__(
        self,
        filters: Sequence[tuple[float, float]],
        memory: float,
        level: float,
        variance: float,
    ):
        self._walks = [sigma * sigma for sigma, _ in filters]
        self._beliefs = [share for _, share in filters]
        self._memory = memory
        self._scores = [0.0] * len(self._walks)
        self.walk = sum(self._walks) / len(self._walks)
        self.restart(level, variance)

    def restart(self, level: float, variance: float) -> None:
        """Forget where the center was, but not how fast it walks."""
        self.levels = [level] * len(self._walks)
        self._variances = [variance] * len(self._walks)
        self.mean, self.variance = level, variance

    def predict(self, step: float, frames: int, jump: float) -> None:
        """Move on by ``frames`` frames; ``jump`` is the variance of a jump on the way."""
        self.levels = [level + step for level in self.levels]
        self._variances = [
            variance + frames * walk + jump
            for variance, walk in zip(self._variances, self._walks, strict=True)
        ]
        self.mean += step
        self.variance += frames * self.walk + jump

    def update(self, measured: float, noise: float) -> None:
        """Take in a center of this axis with its variance."""
        for i, (level, variance) in enumerate(zip(self.levels, self._variances, strict=True)):
            own = noise * self._beliefs[i]
            total = variance + own
            gain = variance / total
            error = measured - level
            self._scores[i] = self._memory * self._scores[i] - 0.5 * (
                error * error / total + math.log(total)
            )
            self.levels[i] = level + gain * error
            self._variances[i] = gain * own
        # No filter may fall so far behind that it could not take over within a few frames.
        least = max(self._scores) - _MAX_LEAD
        self._scores = [max(score, least) for score in self._scores]
        self._mix()

    def copy(self) -> Walk:
        """Return a twin that goes its own way."""
        twin = Walk.__new__(Walk)
        twin._walks, twin._beliefs, twin._memory = self._walks, self._beliefs, self._memory
        twin._scores = list(self._scores)
        twin.levels, twin._variances = list(self.levels), list(self._variances)
        twin.mean, twin.variance, twin.walk = self.mean, self.variance, self.walk
        return twin

    def _mix(self) -> None:
        best = max(self._scores)
        weights = [math.exp(score - best) for score in self._scores]
        total = mean = square = inner = walk = 0.0
        origin = self.levels[0]
        for w, x, p, q in zip(weights, self.levels, self._variances, self._walks, strict=True):
            d = x - origin
            total += w
            mean += w * d
            square += w * d * d
            inner += w * p
            walk += w * q
        mean /= total
        self.mean = origin + mean
        self.variance = inner / total + max(square / total - mean * mean, 0.0)
        self.walk = walk / total


class Noise:
    """What successive differences tell about the single-frame variances.

    ``scale`` ≥ 1 is how much too small they are; ``common`` is the share of them that neighbouring
    frames have in common (the same grain misleads the network in the same way) and that no filter
    can average out. Both are as near to 1 and 0 as the evidence allows.
    """

    __slots__ = ("_count", "_difference", "_evidence", "_place", "_square", "common", "scale")

    def __init__(self) -> None:
        self.scale = 1.0
        self.common = 0.0
        self._evidence = self._square = self._count = 0.0
        self.interrupt()

    def interrupt(self) -> None:
        """The next frame does not follow on the last one."""
        self._place: tuple[float, float] | None = None
        self._difference: tuple[float, float] | None = None

    def see(self, y: float, x: float, noise: Sequence[float], step: tuple[float, float]) -> None:
        """Take in the next frame's center, its claimed variances, and the step expected."""
        last, before = self._place, self._difference
        self._place = (y, x)
        if last is None:
            return
        self._difference = dy, dx = y - last[0] - step[0], x - last[1] - step[1]
        if before is None:
            return
        product = -0.5 * (dy * before[0] / noise[0] + dx * before[1] / noise[1])
        self._evidence = 0.995 * self._evidence + product
        self._square = 0.995 * self._square + product * product
        self._count = 0.995 * self._count + 1
        if self._count > 20:
            slack = 2 * math.sqrt(self._square)
            lowest = (self._evidence - slack) / self._count
            highest = (self._evidence + slack) / self._count
            self.scale = min(max(1.0, lowest), 9.0)
            self.common = min(max(1.0 - highest, 0.0), 1.0)


class Majority:
    """Whether more frames speak for the track, or for one and the same place elsewhere."""

    __slots__ = ("_against", "_credit", "_lead", "_most", "_offset")

    def __init__(self, most: float, lead: float) -> None:
        """Count at most so many frames for the track; so many more must speak against it."""
        self._most, self._lead = most, lead
        self.start_over()

    def start_over(self) -> None:
        """The track is somewhere else: no frame has spoken for that yet."""
        self._credit = self._against = 0.0
        # That place's distance to the track.
        self._offset = (0.0, 0.0)

    def agree(self) -> None:
        """One frame's center is where the track is."""
        self._credit = min(self._credit + 1, self._most)
        self._against = max(self._against - 1, 0.0)

    def contradict(
        self, offset: tuple[float, float], reach: tuple[float, float], by: float
    ) -> bool:
        """One frame's center is elsewhere.

        Args:
            offset: its distance to the track, along both axes.
            reach: squares of the distances within which it is in the same place as those before.
            by: how much the frame counts, at most 1.

        Returns:
            Whether the track is outvoted; that place then has its credit.
        """
        apart = zip(offset, self._offset, reach, strict=True)
        if not self._against or sum((one - two) ** 2 / r for one, two, r in apart) > 1:
            self._offset, self._against = offset, 0.0
        self._against += by
        if self._against <= self._credit + self._lead:
            return False
        self._credit, self._against = self._against, 0.0
        return True
