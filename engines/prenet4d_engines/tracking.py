"""Tracking the center over a scan: a causal, robust filter that knows lines and fly-back.

What descan drift looks like, and what is done about it:

* It repeats from line to line (the plane of a tilted scan, bows, fly-back transients). So the step
  from one probe position to the next is predicted by the steps at the same columns of the lines
  before, learned as a *profile* of steps; the step into column 0 is the fly-back.
* It wanders, slowly or fast. So around the profile each axis runs a few random-walk Kalman filters
  that differ in how fast the center may walk and in how much of the claimed sigmas they believe,
  weighted by how well each predicted of late.
* Where patterns are hard to read, the network errs the same way in all frames of a grain, by more
  than it claims. So some of the filters know of an error that neighbouring frames share, the larger
  the more they claim: frames that claim much cannot draw the track away together.
* It jumps: at line starts, by an amount that is learned; anywhere else, rarely. And single-frame
  centers are sometimes plainly wrong. A center far off its prediction is therefore an *outlier*
  unless the next ones agree with it; where that turned out to be a jump more often than not, it is
  followed at once.
* Dynamical diffraction empties the direct beam in whole grains, and the network then takes another
  for it in every frame. It also names other beams that the direct one may be. Where one of them is
  where the track expects it, that one is followed, until the frames that prefer another place
  outvote those that agreed with the track, each by how sure the network is.
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
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.filtering import Majority, Noise, Walk, shared_variance
from prenet4d_engines.lines import LineProfile

Array: TypeAlias = "npt.NDArray[np.floating]"
Estimate: TypeAlias = tuple[float, float, float, float]
"""cy, cx and their variances."""
Beam: TypeAlias = Sequence[float]
"""cy, cx, sigma, and how likely it is in units of the frame's center."""

_SHARED: Final = 25.0
"""Variance of the error that a grain's frames may share, in units of `shared_variance`."""
_FILTERS: Final = (
    *((0.003, 1.0, 0.0), (0.03, 1.0, 0.0), (0.1, 1.0, 0.0)),
    *((0.003, 1.0, _SHARED), (0.03, 1.0, _SHARED), (0.1, 0.03, _SHARED), (0.3, 0.003, _SHARED)),
)
"""Of each filter, how far the center may walk from one frame to the next, in pixels, the share of
the claimed variances that it believes in as a frame's own noise, and the variance of an error that
frames share. (Where lines are not known, that cannot be told from the jump at a fly-back: 0.)"""
_GRAIN: Final = 25.0
"""Frames over which such an error fades; it does not outlive the line."""
_MEMORY: Final = 0.98
"""How much of its past evidence a filter keeps from one frame to the next."""
_GATE: Final = 25.0
"""Squared deviation of both axes in sigmas beyond which a center is an outlier."""
_SLACK: Final = 0.2
"""A center is no outlier for a deviation of a few times this, in pixels, however sure the track
is."""
_JUMP_FRAMES: Final = 3
"""As many outliers in a row that agree with each other are a jump."""
_MOST_OUTLIERS: Final = 6
"""After as many outliers in a row, agreeing or not, it is the track that is wrong."""
_OTHER_GATE: Final = 9.0
"""As ``_GATE``: up to there another beam than the likeliest is the one that was expected."""
_LEAST_ODDS: Final = 1e-5
"""Beams that are less likely than this, in units of the likeliest, are none."""
_MOST_CREDIT: Final = 64.0
"""So many frames that agreed with the track count, at most, against those that do not, ..."""
_LEAD: Final = 8.0
"""... which must be so many more to outvote it."""
_MIN_SIGMA: Final = 0.003
"""No single-frame center is trusted more than this, in pixels."""
_LEAST_OWN: Final = 0.01
"""Share of a center's claimed variance that is its own noise, at least."""
_LATE: Final = 256
"""Frames up to this far behind the newest one are late; farther, the scan has started over."""


class CenterTracker:
    """Fuses each frame's center with those of the scan before it.

    Args:
        scan_shape: ``(ny, nx)``; frame ``i`` lies at ``(i // nx, i % nx)``. ``None`` where it is
            not known: the scan then counts as one endless line.
    """

    def __init__(self, scan_shape: tuple[int, int] | None = None):
        columns = scan_shape[1] if scan_shape and scan_shape[1] > 2 else 0
        # Of the scan.
        self._frames = scan_shape[0] * scan_shape[1] if scan_shape else math.inf
        self._filters = [(w, own, shared if columns else 0.0) for w, own, shared in _FILTERS]
        self._axes: tuple[Walk, Walk] | None = None
        self._index = 0
        self._noise = Noise()
        self._shared = (0.0, 0.0)
        self._lines = LineProfile(columns)
        self._majority = Majority(_MOST_CREDIT, _LEAD)
        # Outliers in a row: their mean distance to the prediction, and how many.
        self._suspect = (0.0, 0.0)
        self._suspects = 0
        # Outliers in a row, whether they agree or not.
        self._distrusted = 0
        # How often the track started anew elsewhere.
        self._restarts = 0
        # What big deviations turned out to be, the recent ones counting most.
        # Where fly-back is not known, jumps must be expected.
        self._jumps, self._outliers = (0.0 if columns else 0.75), 0.5
        # The track as it was before a jump that was followed at once, in case it was none.
        self._before_jump: tuple[Walk, Walk] | None = None
        self._since_jump = 0

    def update(
        self,
        indices: npt.NDArray[np.integer],
        centers: Array,
        sigmas: Array,
        usable: npt.NDArray[np.bool_] | None = None,
        others: Array | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Track frames in the order of their indices.

        A frame that comes late (its index lies before one that came earlier) is fused with the
        track as it stands and leaves it alone.

        Args:
            indices: (n,) of the frames in the scan.
            centers: (n, 2) ``[cy, cx]`` single-frame centers, pixels.
            sigmas: (n, 2) one sigma of each, pixels.
            usable: (n,) ``False`` where a frame has no center; its track is the prediction.
            others: (n, k, 4) ``[cy, cx, sigma, odds]`` of beams that may be the direct one instead,
                pixels, and how likely each is in units of the one in ``centers``.

        Returns:
            tracked (n, 2), sigma (n, 2), outlier (n,) bool: the center was not trusted. NaN and
            infinity as long as no frame was usable.
        """
        tracked = np.empty((len(indices), 4))
        outlier = np.zeros(len(indices), dtype=bool)
        places = np.asarray(centers, dtype=np.float64)
        variances = np.maximum(np.asarray(sigmas, dtype=np.float64), _MIN_SIGMA) ** 2
        good = np.isfinite(places).all(axis=1) & np.isfinite(variances).all(axis=1)
        if usable is not None:
            good &= usable
        numbers, flags = indices.tolist(), good.tolist()
        measured, noise = places.tolist(), variances.tolist()
        beams = [[]] * len(numbers) if others is None else _finite(others).tolist()
        for i in np.argsort(indices, kind="stable").tolist():
            tracked[i], outlier[i] = self._frame(
                numbers[i], measured[i], noise[i], flags[i], beams[i]
            )
        return tracked[:, :2], np.sqrt(tracked[:, 2:]), outlier

    def copy(self) -> CenterTracker:
        """Return a twin that goes its own way."""
        twin = copy.copy(self)
        twin._axes, twin._before_jump = (
            axes and (axes[0].copy(), axes[1].copy()) for axes in (self._axes, self._before_jump)
        )
        twin._noise, twin._majority = copy.copy(self._noise), copy.copy(self._majority)
        twin._lines = self._lines.copy()
        return twin

    def _frame(
        self,
        index: int,
        measured: Sequence[float],
        noise: Sequence[float],
        usable: bool,
        others: Sequence[Beam],
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
            self._lines.remember(index, (y, x), self._restarts)
            return (y, x, ry, rx), False
        vertical, horizontal = self._axes
        ahead = index - self._index
        if -max(self._lines.columns, _LATE) <= ahead <= 0:
            return self._late(index, measured, (ry, rx), usable)
        if not 0 < ahead <= self._frames:
            # The scan started over; or the index is none of it, and tells of no step.
            self._index = index - 1 if 0 <= index < self._frames else index
        before = (vertical.mean, horizontal.mean)
        restarts = self._restarts
        adjacent = index == self._index + 1
        fly_back = self._advance(index)
        outlier = False
        if usable:
            dy, dx = y - vertical.mean, x - horizontal.mean
            other = self._expected(dy, dx, ry, rx, others)
            if other is not None:
                # "It may be another beam", which the center's own sigma says, does not hold for it.
                noise = (other[2] ** 2,) * 2
            if fly_back and adjacent:
                self._learn_fly_back((y, x, ry, rx) if other is None else (*other[:2], *noise))
            if other is not None:
                outlier = self._follow(other, dy, dx, ry, rx)
            elif self._far(dy, dx, ry, rx) > _GATE and self._beyond_doubt(y, x, ry, rx):
                outlier = self._deviation(y, x, ry, rx)
            else:
                self._majority.agree()
                vertical.update(y, ry)
                horizontal.update(x, rx)
                if self._suspects:
                    self._suspects = self._distrusted = 0
                    self._jumps, self._outliers = 0.8 * self._jumps, 0.8 * self._outliers + 1
            if outlier or not adjacent or fly_back or self._restarts > restarts:
                self._noise.interrupt()
            else:
                self._noise.see(y, x, noise, self._lines.path(index - 1, index))
        vertical, horizontal = self._axes
        place = (vertical.mean, horizontal.mean)
        # A jump inside a line, or back from a wrong beam, is no step that the next line repeats.
        jumped = self._restarts > restarts and not fly_back
        if adjacent and not outlier and not jumped:
            self._lines.learn_step(index, place[0] - before[0], place[1] - before[1])
        self._lines.remember(index, place, self._restarts)
        if usable:
            self._shared = (self._noise.common * noise[0], self._noise.common * noise[1])
        vy, vx = vertical.variance + self._shared[0], horizontal.variance + self._shared[1]
        return (*place, vy, vx), outlier

    def _learn_fly_back(self, found: Sequence[float]) -> None:
        """Learn from where a line begins: cy, cx and their variances."""
        assert self._axes is not None
        vertical, horizontal = self._axes
        y, x, ry, rx = found
        self._lines.learn_fly_back(
            (y - vertical.mean, x - horizontal.mean),
            (vertical.variance + ry, horizontal.variance + rx),
            (_SHARED * shared_variance(ry), _SHARED * shared_variance(rx)),
        )

    def _far(self, dy: float, dx: float, ry: float, rx: float) -> float:
        """Return the squared deviation from the prediction in sigmas."""
        assert self._axes is not None
        vertical, horizontal = self._axes
        slack = _SLACK**2
        far = dy * dy / (vertical.variance + ry + slack)
        return far + dx * dx / (horizontal.variance + rx + slack)

    def _beyond_doubt(self, y: float, x: float, ry: float, rx: float) -> bool:
        """Say whether a center is far from where every filter expects it.

        In the first line there is nothing to hold on to: the track may have begun on a wrong beam.
        """
        assert self._axes is not None
        if not self._lines.known:
            return True
        vertical, horizontal = self._axes
        slack = _SLACK**2
        return vertical.far(y, ry, slack) + horizontal.far(x, rx, slack) > _GATE

    def _expected(
        self, dy: float, dx: float, ry: float, rx: float, others: Sequence[Beam]
    ) -> Beam | None:
        """Return the likeliest other beam that is where the track expects the direct one.

        There is none where the likeliest beam of all is there itself.
        """
        assert self._axes is not None
        vertical, horizontal = self._axes
        found, odds = None, _LEAST_ODDS
        for other in others:
            cy, cx, sigma, likely = other
            r = sigma * sigma
            # The center's own sigma may say "it may be another beam": how far is it off as a beam?
            if (
                likely > odds
                and self._far(cy - vertical.mean, cx - horizontal.mean, r, r) <= _OTHER_GATE
                and self._far(dy, dx, min(ry, r), min(rx, r)) > _GATE
            ):
                found, odds = other, likely
        return found

    def _follow(self, other: Beam, dy: float, dx: float, ry: float, rx: float) -> bool:
        """Follow another beam than the likeliest, unless too many frames speak against it.

        Returns:
            Whether it was followed, and the likeliest is an outlier.
        """
        assert self._axes is not None
        vertical, horizontal = self._axes
        cy, cx, sigma, likely = other
        r = sigma * sigma
        reach = (_GATE * (vertical.variance + ry + r), _GATE * (horizontal.variance + rx + r))
        if self._majority.contradict((dy, dx), reach, max(0.0, 1 - likely)):
            self._restarts += 1
            vertical.restart(vertical.mean + dy, ry)
            horizontal.restart(horizontal.mean + dx, rx)
            return False
        vertical.update(cy, r)
        horizontal.update(cx, r)
        return True

    def _walk(self, level: float, variance: float) -> Walk:
        return Walk(self._filters, _MEMORY, level, variance)

    def _deviation(self, y: float, x: float, ry: float, rx: float) -> bool:
        """Decide about a center far from the prediction; return whether it is an outlier."""
        assert self._axes is not None
        vertical, horizontal = self._axes
        offset = (y - vertical.mean, x - horizontal.mean)
        if self._before_jump:
            old_y, old_x = self._before_jump
            back = (y - old_y.mean) ** 2 / (old_y.variance + ry) + (x - old_x.mean) ** 2 / (
                old_x.variance + rx
            )
            if back <= _GATE:
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
        n = n + 1 if n and apart <= _GATE else 1
        sy, sx = (s + (o - s) / n if n > 1 else o for s, o in zip((sy, sx), offset, strict=True))
        self._suspect, self._suspects = (sy, sx), n
        self._distrusted += 1
        # In the first line nothing tells a steep descan from outliers, but that they are a few.
        most = _MOST_OUTLIERS if self._lines.known else _JUMP_FRAMES
        if n < _JUMP_FRAMES and self._distrusted < most:
            return True
        self._majority.start_over()
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
        steps = self._lines.path(index, self._index)
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
        outlier = far > _GATE
        if outlier:
            places = [axis.mean - step for axis, step in zip(self._axes, steps, strict=True)]
            variances = [axis.variance + frames * axis.walk for axis in self._axes]
        vy, vx = (own + shared for own, shared in zip(variances, self._shared, strict=True))
        return (places[0], places[1], vy, vx), outlier

    def _advance(self, index: int) -> bool:
        """Predict the center of frame ``index``; return whether a new line has begun since."""
        assert self._axes is not None
        frames = index - self._index
        lines = self._lines.lines_between(self._index, index)
        if lines:
            self._lines.finish_first_line()
        steps = self._lines.path(self._index, index)
        jumps = min(lines, 4)
        keep = 0.0 if lines else math.exp(-frames / _GRAIN)
        for axis, step, jump in zip(self._axes, steps, self._lines.fly_back, strict=True):
            axis.predict(step, frames, jumps * jump, keep)
        if self._before_jump:
            self._since_jump += frames
            if self._since_jump > 2:  # it was one
                self._before_jump = None
                self._majority.start_over()
            else:
                for axis, step in zip(self._before_jump, steps, strict=True):
                    axis.predict(step, frames, 0.0, keep)
        self._index = index
        return lines > 0


def _finite(others: Array) -> Array:
    """Give beams (n, k, 4) of which something is not a number no odds."""
    known = np.isfinite(others).all(axis=2, keepdims=True)
    return np.where(known, others, np.zeros_like(others))
