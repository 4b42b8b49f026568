"""Inside the center track: where one axis is, how noisy centers are, whom most frames speak for."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

_MAX_LEAD = 6.0
"""Nats of evidence that one filter can be ahead of another."""
_HARD = 1.0
"""Claimed variance in px² from about which on a pattern is hard to read, and misread like its
neighbours."""


def shared_variance(noise: float) -> float:
    """Return the square of the unit, in px, of an error that frames share.

    Args:
        noise: the variance that a frame's center claims: the unit is its square root where the
            pattern is hard to read, and vanishes where it is easy.
    """
    return noise / (1.0 + _HARD / noise) if noise else 0.0


class Walk:
    """Random-walk Kalman filters on one axis, of several kinds, mixed by their evidence.

    Some of them take the centers to be better than they claim: where a grain makes the network
    needlessly unsure, what its frames agree on is followed and not smoothed away. Others take what
    is claimed for an error that the frames of a grain share: they hold on to where the center was
    before, however many of such frames agree with each other.

    ``mean`` and ``variance`` are the mixture's; ``walk`` is its variance per frame.

    Args:
        filters: of each filter, how far it thinks that the center may walk from one frame to the
            next, the share of the centers' claimed variances that it believes in as noise of their
            own, and the variance of an error that they share, in units of `shared_variance`.
        memory: how much of its past evidence a filter keeps from one frame to the next.
        level: where the center is.
        variance: of ``level``.
    """

    __slots__ = ("_memory", "_states", "mean", "variance", "walk")

    def __init__(
        self,
        filters: Sequence[tuple[float, float, float]],
        memory: float,
        level: float,
        variance: float,
    ):
        self._states = [_State(*each) for each in filters]
        self._memory = memory
        self.walk = sum(state.walk for state in self._states) / len(self._states)
        self.restart(level, variance)

    def restart(self, level: float, variance: float) -> None:
        """Forget where the center was, but not how fast it walks."""
        for state in self._states:
            state.restart(level, variance)
        self.mean, self.variance = level, variance

    def predict(self, step: float, frames: int, jump: float, keep: float) -> None:
        """Move on by ``frames`` frames.

        Args:
            step: how far the center is expected to go.
            frames: how many.
            jump: the variance of a jump on the way.
            keep: how much of an error that frames share is left after that.
        """
        for state in self._states:
            state.level += step
            state.variance += frames * state.walk + jump
            if state.shared:
                state.error *= keep
                state.covariance *= keep
                state.error_variance += (1 - keep * keep) * (state.shared - state.error_variance)
        self.mean += step
        self.variance += frames * self.walk + jump

    def far(self, measured: float, noise: float, slack: float) -> float:
        """Return the squared deviation in sigmas from the prediction that is nearest to it."""
        least = math.inf
        unit = math.sqrt(shared_variance(noise))
        for state in self._states:
            total = state.variance
            error = measured - state.level
            if state.shared:
                total += unit * (2 * state.covariance + unit * state.error_variance)
                error -= unit * state.error
            least = min(least, error * error / (max(total, 0.0) + noise * state.belief + slack))
        return least

    def update(self, measured: float, noise: float) -> None:
        """Take in a center of this axis with its variance."""
        unit, memory = math.sqrt(shared_variance(noise)), self._memory
        best = -math.inf
        for state in self._states:
            state.score = memory * state.score + state.update(measured, noise, unit)
            best = max(best, state.score)
        # No filter may fall so far behind that it could not take over within a few frames.
        for state in self._states:
            state.score = max(state.score, best - _MAX_LEAD)
        self._mix(best)

    def copy(self) -> Walk:
        """Return a twin that goes its own way."""
        twin = copy.copy(self)
        twin._states = [copy.copy(state) for state in self._states]
        return twin

    def _mix(self, best: float) -> None:
        total = mean = square = inner = walk = 0.0
        origin = self._states[0].level
        for state in self._states:
            w = math.exp(state.score - best)
            d = state.level - origin
            total += w
            mean += w * d
            square += w * d * d
            inner += w * state.variance
            walk += w * state.walk
        mean /= total
        self.mean = origin + mean
        self.variance = inner / total + max(square / total - mean * mean, 0.0)
        self.walk = walk / total


class _State:
    """One Kalman filter: where the center is, and the error that frames share, in their units."""

    __slots__ = (
        "belief",
        "covariance",
        "error",
        "error_variance",
        "level",
        "score",
        "shared",
        "variance",
        "walk",
    )

    def __init__(self, walk: float, belief: float, shared: float):
        self.walk, self.belief, self.shared = walk * walk, belief, shared
        self.score = 0.0

    def restart(self, level: float, variance: float) -> None:
        self.level, self.variance = level, variance
        self.error, self.covariance, self.error_variance = 0.0, 0.0, self.shared

    def update(self, measured: float, noise: float, unit: float) -> float:
        """Take in a center; return the evidence for this filter, in nats.

        Args:
            measured: the center.
            noise: its claimed variance.
            unit: what a shared error is measured in here.
        """
        own = noise * self.belief
        if not self.shared:
            total = self.variance + own
            gain = self.variance / total
            error = measured - self.level
            self.level += gain * error
            self.variance = gain * own
            return -0.5 * (error * error / total + math.log(total))
        to_level = self.variance + unit * self.covariance
        to_error = self.covariance + unit * self.error_variance
        total = max(to_level + unit * to_error, 0.0) + own  # not less by rounding
        error = measured - self.level - unit * self.error
        self.level += to_level / total * error
        self.error += to_error / total * error
        self.variance = max(self.variance - to_level * to_level / total, 0.0)
        self.covariance -= to_level * to_error / total
        self.error_variance = max(self.error_variance - to_error * to_error / total, 0.0)
        return -0.5 * (error * error / total + math.log(total))


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
