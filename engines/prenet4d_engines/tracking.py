"""Tracking the center over a scan: a causal, robust filter that knows lines and fly-back.

What descan drift looks like, and what is done about it:

* It repeats from line to line (the plane of a tilted scan, bows, fly-back transients). So the step
  from one probe position to the next is predicted by the steps at the same columns of the lines
  before, learned as a *profile* of steps; the step into column 0 is the fly-back.
* It wanders, slowly or fast. So around the profile each axis runs a few random-walk Kalman filters
  that differ in how fast the center may walk and in how much of the claimed sigmas they believe,
  weighted by how well each predicted of late.
* It jumps: at line starts, by an amount that is learned; anywhere else, rarely. And single-frame
  centers are sometimes plainly wrong. A center far off its prediction is therefore an *outlier*
  unless the next ones agree with it; where that turned out to be a jump more often than not, it is
  followed at once.
* Successive differences tell the true noise, Cov(d_t, d_{t-1}) = −σ². Where it exceeds the sigmas
  of the single-frame centers, these are scaled up; where it stays below, the rest of the sigmas is
  an error that neighbouring frames share, and remains in the sigma of the track.

Frames are filtered one by one in the order of their indices, so the result does not depend on how
they were batched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.filtering import Noise, Walk

Array: TypeAlias = "npt.NDArray[np.floating]"
Estimate: TypeAlias = tuple[float, float, float, float]
"""cy, cx and their variances."""

_LEAST_OWN = 0.01
"""Share of a center's claimed variance that is its own noise, at least."""
_SLOPE_POINTS = 64
"""Places along the first line that its slope is taken from, at most."""
_LATE = 256
"""Frames up to this far behind the newest one are late; farther, the scan has started over."""


@dataclass(frozen=True, slots=True)
class TrackerConfig:
    """Constants of the filter; lengths in pixels."""

    filters: tuple[tuple[float, float], ...] = (
        (0.001, 1.0),
        (0.01, 1.0),
        (0.1, 1.0),
        (0.1, 0.03),
        (0.3, 0.003),
    )
    """Of each filter, how far the center may walk from one frame to the next, and the share of the
    claimed variances that it believes in."""
    memory: float = 0.98
    """How much of its past evidence a filter keeps from one frame to the next."""
    gate: float = 25.0
    """Squared deviation of both axes in sigmas beyond which a center is an outlier."""
    slack: float = 0.2
    """A center is no outlier for a deviation of a few times this, however sure the track is."""
    jump_frames: int = 3
    """As many outliers in a row that agree with each other are a jump."""
    most_outliers: int = 6
    """After as many outliers in a row, agreeing or not, it is the track that is wrong."""
    fly_back_prior: float = 1.0
    """Variance in px^2 of the jump at a line's start that is expected before any was seen, ..."""
    fly_back_fading: float = 1.5
    """... and the power of the number of jumps seen that it fades with."""
    learning: float = 0.1
    """How fast the profile of steps follows from one line to the next."""
    min_sigma: float = 0.003
    """No single-frame center is trusted more than this."""


class CenterTracker:
    """Fuses each frame's center with those of the scan before it.

    Args:
        scan_shape: ``(ny, nx)``; frame ``i`` lies at ``(i // nx, i % nx)``. ``None`` where it is
            not known: the scan then counts as one endless line.
        config: the filter's constants.
    """

    def __init__(
        self, scan_shape: tuple[int, int] | None = None, config: TrackerConfig | None = None
    ):
        self._config = config or TrackerConfig()
        self._nx = scan_shape[1] if scan_shape and scan_shape[1] > 2 else 0
        self._axes: tuple[Walk, Walk] | None = None
        self._index = 0
        self._noise = Noise()
        self._shared = (0.0, 0.0)
        # The profile: (y, x) step into each column, and the first line until it is known.
        self._steps = [(0.0, 0.0)] * self._nx
        self._first_line: list[tuple[int, float, float, int]] | None = []
        # Jumps at line starts: variance of each axis, and how many were seen.
        self._fly_back = (self._config.fly_back_prior, self._config.fly_back_prior)
        self._fly_backs = 0
        # Outliers in a row: their mean distance to the prediction, and how many.
        self._suspect = (0.0, 0.0)
        self._suspects = 0
        # Outliers in a row, whether they agree or not.
        self._distrusted = 0
        # How often the track started anew elsewhere.
        self._restarts = 0
        # What big deviations turned out to be, the recent ones counting most.
        # Where fly-back is not known, jumps must be expected.
        self._jumps, self._outliers = (0.0 if self._nx else 0.75), 0.5
        # The track as it was before a jump that was followed at once, in case it was none.
        self._before_jump: tuple[Walk, Walk] | None = None
        self._since_jump = 0

    def update(
        self,
        indices: npt.NDArray[np.integer],
        centers: Array,
        sigmas: Array,
        usable: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Track frames in the order of their indices.

        A frame that comes late (its index lies before one that came earlier) is fused with the
        track as it stands and leaves it alone.

        Args:
            indices: (n,) of the frames in the scan.
            centers: (n, 2) ``[cy, cx]`` single-frame centers, pixels.
            sigmas: (n, 2) one sigma of each, pixels.
            usable: (n,) ``False`` where a frame has no center; its track is the prediction.

        Returns:
            tracked (n, 2), sigma (n, 2), outlier (n,) bool: the center was not trusted. NaN and
            infinity as long as no frame was usable.
        """
        tracked = np.empty((len(indices), 4))
        outlier = np.zeros(len(indices), dtype=bool)
        places = np.asarray(centers, dtype=np.float64)
        variances = np.maximum(np.asarray(sigmas, dtype=np.float64), self._config.min_sigma) ** 2
        good = np.isfinite(places).all(axis=1) & np.isfinite(variances).all(axis=1)
        if usable is not None:
            good &= usable
        numbers, flags = indices.tolist(), good.tolist()
        measured, noise = places.tolist(), variances.tolist()
        for i in np.argsort(indices, kind="stable").tolist():
            tracked[i], outlier[i] = self._frame(numbers[i], measured[i], noise[i], flags[i])
        return tracked[:, :2], np.sqrt(tracked[:, 2:]), outlier

    def copy(self) -> CenterTracker:
        """Return a twin that goes its own way."""
        twin = copy.copy(self)
        twin._axes, twin._before_jump = (
            axes and (axes[0].copy(), axes[1].copy()) for axes in (self._axes, self._before_jump)
        )
        twin._noise = copy.copy(self._noise)
        twin._steps = self._steps.copy()
        twin._first_line = None if self._first_line is None else self._first_line.copy()
        return twin

    def _frame(
        self, index: int, measured: Sequence[float], noise: Sequence[float], usable: bool
    ) -> tuple[Estimate, bool]:
        y, x = measured
        # What neighbouring frames have in common moves with the track; only the rest is its noise.
        own = self._noise.scale * max(1.0 - self._noise.common, _LEAST_OWN)
        ry, rx = noise[0] * own, noise[1] * own
        if self._axes is None:
            if not usable:
                return (math.nan, math.nan, math.inf, math.inf), False
            self._axes = (self._walk(y, ry), self._walk(x, rx))
            self._index = index
            self._remember_first_line(index)
            return (y, x, ry, rx), False
        vertical, horizontal = self._axes
        if index <= self._index:
            if self._index - index <= max(self._nx, _LATE):
                return self._late(index, measured, (ry, rx), usable)
            # The scan started over.
            self._index = index - 1
        before = (vertical.mean, horizontal.mean)
        restarts = self._restarts
        adjacent = index == self._index + 1
        fly_back = self._advance(index)
        outlier = False
        if usable:
            dy, dx = y - vertical.mean, x - horizontal.mean
            if fly_back and adjacent:
                self._learn_fly_back(dy, dx, ry, rx)
            slack = self._config.slack**2
            far = dy * dy / (vertical.variance + ry + slack)
            far += dx * dx / (horizontal.variance + rx + slack)
            if far > self._config.gate:
                outlier = self._deviation(y, x, ry, rx)
            else:
                vertical.update(y, ry)
                horizontal.update(x, rx)
                if self._suspects:
                    self._suspects = self._distrusted = 0
                    self._jumps, self._outliers = 0.8 * self._jumps, 0.8 * self._outliers + 1
            if outlier or not adjacent or fly_back:
                self._noise.interrupt()
            else:
                self._noise.see(y, x, noise, self._path(index - 1, index))
        vertical, horizontal = self._axes
        # A jump inside a line, or back from a wrong beam, is no step that the next line repeats.
        jumped = self._restarts > restarts and not fly_back
        if adjacent and not outlier and not jumped:
            self._learn_step(index, vertical.mean - before[0], horizontal.mean - before[1])
        self._remember_first_line(index)
        if usable:
            self._shared = (self._noise.common * noise[0], self._noise.common * noise[1])
        vy, vx = vertical.variance + self._shared[0], horizontal.variance + self._shared[1]
        return (vertical.mean, horizontal.mean, vy, vx), outlier

    def _walk(self, level: float, variance: float) -> Walk:
        return Walk(self._config.filters, self._config.memory, level, variance)

    def _deviation(self, y: float, x: float, ry: float, rx: float) -> bool:
        """Decide about a center far from the prediction; return whether it is an outlier."""
        assert self._axes is not None
        vertical, horizontal = self._axes
        offset = (y - vertical.mean, x - horizontal.mean)
        gate = self._config.gate
        if self._before_jump:
            old_y, old_x = self._before_jump
            back = (y - old_y.mean) ** 2 / (old_y.variance + ry) + (x - old_x.mean) ** 2 / (
                old_x.variance + rx
            )
            if back <= gate:
                # The jump was none: one center was wrong, and the track is where it was.
                self._axes, self._before_jump = self._before_jump, None
                self._axes[0].update(y, ry)
                self._axes[1].update(x, rx)
                self._jumps, self._outliers = 0.8 * self._jumps - 1, 0.8 * self._outliers + 1
                return False
        if self._jumps > self._outliers:
            self._before_jump, self._since_jump = (vertical.copy(), horizontal.copy()), 0
            self._jumped(y, x, ry, rx)
            return False
        n = self._suspects
        sy, sx = self._suspect
        # Between two frames the center walks; where it walks far, suspects differ by that.
        spread = 1 + 1 / max(n, 1)
        vy, vx = ry * spread + vertical.walk, rx * spread + horizontal.walk
        apart = (offset[0] - sy) ** 2 / vy + (offset[1] - sx) ** 2 / vx
        n = n + 1 if n and apart <= gate else 1
        sy, sx = (s + (o - s) / n if n > 1 else o for s, o in zip((sy, sx), offset, strict=True))
        self._suspect, self._suspects = (sy, sx), n
        self._distrusted += 1
        if n < self._config.jump_frames and self._distrusted < self._config.most_outliers:
            return True
        self._jumped(vertical.mean + sy, horizontal.mean + sx, ry / n, rx / n)
        return False

    def _jumped(self, y: float, x: float, vy: float, vx: float) -> None:
        assert self._axes is not None
        self._restarts += 1
        self._axes[0].restart(y, vy)
        self._axes[1].restart(x, vx)
        self._suspects = self._distrusted = 0
        self._jumps, self._outliers = 0.8 * self._jumps + 1, 0.8 * self._outliers

    def _late(
        self, index: int, measured: Sequence[float], noise: Sequence[float], usable: bool
    ) -> tuple[Estimate, bool]:
        """Fuse a frame that lies behind with the track as it stands."""
        assert self._axes is not None
        steps = self._path(index, self._index)
        frames = self._index - index
        places, variances, far = [], [], 0.0
        for axis, step, z, r in zip(self._axes, steps, measured, noise, strict=True):
            place, variance = axis.mean - step, axis.variance + frames * axis.walk
            if usable:
                far += (z - place) ** 2 / (variance + r)
                gain = variance / (variance + r)
                place, variance = place + gain * (z - place), gain * r
            places.append(place)
            variances.append(variance)
        outlier = far > self._config.gate
        if outlier:
            places = [axis.mean - step for axis, step in zip(self._axes, steps, strict=True)]
            variances = [axis.variance + frames * axis.walk for axis in self._axes]
        return (places[0], places[1], variances[0], variances[1]), outlier

    def _advance(self, index: int) -> bool:
        """Predict the center of frame ``index``; return whether a new line has begun since."""
        assert self._axes is not None
        frames = index - self._index
        lines = index // self._nx - self._index // self._nx if self._nx else 0
        if lines and self._first_line is not None:
            self._finish_first_line()
        steps = self._path(self._index, index)
        jumps = min(lines, 4)
        for axis, step, jump in zip(self._axes, steps, self._fly_back, strict=True):
            axis.predict(step, frames, jumps * jump)
        if self._before_jump:
            self._since_jump += frames
            if self._since_jump > 2:
                self._before_jump = None
            else:
                for axis, step in zip(self._before_jump, steps, strict=True):
                    axis.predict(step, frames, 0.0)
        self._index = index
        return lines > 0

    def _path(self, first: int, last: int) -> tuple[float, float]:
        """Sum up the profile's steps from frame ``first`` to frame ``last`` ≥ ``first``."""
        nx = self._nx
        if not nx or first == last:
            return 0.0, 0.0
        if last == first + 1:
            return self._steps[last % nx]
        whole, rest = divmod(last - first, nx)
        columns = [(first + i) % nx for i in range(1, rest + 1)]
        y = whole * sum(s[0] for s in self._steps) + sum(self._steps[c][0] for c in columns)
        x = whole * sum(s[1] for s in self._steps) + sum(self._steps[c][1] for c in columns)
        return y, x

    def _learn_step(self, index: int, dy: float, dx: float) -> None:
        if self._nx and self._first_line is None:
            column = index % self._nx
            sy, sx = self._steps[column]
            g = max(self._config.learning, 1 / (2 + self._fly_backs))
            self._steps[column] = (sy + g * (dy - sy), sx + g * (dx - sx))

    def _learn_fly_back(self, dy: float, dx: float, ry: float, rx: float) -> None:
        assert self._axes is not None
        self._fly_backs += 1
        gain = max(self._config.learning, 1 / (self._fly_backs + 0.1))
        # One small jump says little about the next one: the expectation fades, it does not vanish.
        least = self._config.fly_back_prior * self._fly_backs**-self._config.fly_back_fading
        jumps = []
        for d, r, axis, jump in zip((dy, dx), (ry, rx), self._axes, self._fly_back, strict=True):
            expected = axis.variance - jump + r
            jumps.append(max(jump + gain * (d * d - expected - jump), least))
        self._fly_back = (jumps[0], jumps[1])

    def _remember_first_line(self, index: int) -> None:
        if self._nx and self._first_line is not None and self._axes:
            vertical, horizontal = self._axes
            place = (vertical.mean, horizontal.mean)
            self._first_line.append((index % self._nx, *place, self._restarts))

    def _finish_first_line(self) -> None:
        """One line is known: take its slope for the profile, and its end for the fly-back.

        The slope is the median of those between any two frames (Theil and Sen) without a jump
        between them: a wrong beam in a part of the line does not turn it.
        """
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
            back = (-step[0] * (self._nx - 1), -step[1] * (self._nx - 1))
            self._steps = [back] + [step] * (self._nx - 1)
