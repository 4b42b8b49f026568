"""From recentered patterns to an ellipticity that can be trusted: the running mean and its states.

Recentered raw counts are summed in *windows* of ``ellipse_every`` patterns. A full window is merged
into the running mean, from which the ellipse network reads the distortion. While the calibration is
locked, every window is also read alone: one that contradicts the calibration is put aside, and if
several in a row do, the calibration is lost and starts over from what was put aside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prenet4d_engines.backends import Backend
from prenet4d_engines.batch import State
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.models import ellipse
from prenet4d_engines.resample import recentered_sum, resample

PASSES = 3
"""Readings of the ellipse network on one mean: each sees what the ones before have left."""

PASSES_FROM_NEAR = 2
"""As many are enough from an estimate that is already near."""

SEEN = 0.25
"""A pixel of the mean counts as seen if it was in at least this share of the patterns."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An ellipticity with one sigma of each component of its vector form."""

    ellipticity: Ellipticity
    sigma: float

    def contradicts(self, other: Reading, least: float) -> bool:
        """Tell whether two readings differ by more than four sigmas, and by more than ``least``."""
        difference = math.dist(self.ellipticity.vector, other.ellipticity.vector)
        return difference > max(4 * math.hypot(self.sigma, other.sigma), least)


class PatternSum:
    """A sum of recentered patterns; sums of different patterns merge by addition."""

    def __init__(self, frame_shape: tuple[int, int], device: torch.device):
        self.counts = torch.zeros(frame_shape, device=device)
        self.weight = torch.zeros(frame_shape, device=device)
        self.patterns = 0.0

    def add(self, frames: Tensor, shifts: Tensor, valid: Tensor | None) -> None:
        """Add raw frames (n, h, w), moved by ``shifts`` (n, 2) ``[dy, dx]`` pixels."""
        counts, weight = recentered_sum(frames, shifts, valid)
        self.counts += counts
        self.weight += weight
        self.patterns += len(frames)

    def merge(self, other: PatternSum) -> None:
        """Add another sum, which is left as it is."""
        self.counts += other.counts
        self.weight += other.weight
        self.patterns += other.patterns

    def fade(self, most: float) -> None:
        """Scale the sum down to what ``most`` patterns would weigh, if it weighs more."""
        if self.patterns > most:
            for part in (self.counts, self.weight):
                part *= most / self.patterns
            self.patterns = most

    def mean(self) -> Tensor:
        """Return the mean pattern (h, w), counts; NaN where too few patterns had a source."""
        seen = self.weight > SEEN * self.patterns
        return torch.where(seen, self.counts / self.weight, math.nan)


def read_ellipticity(
    mean: Tensor,
    reference: tuple[float, float],
    backend: Backend,
    *,
    start: Ellipticity | None = None,
) -> Reading:
    """Read the distortion of one mean pattern.

    Each pass undistorts the original mean by the estimate so far (one interpolation, never two on
    top of each other), reads the residual and composes it.

    Args:
        mean: (h, w) float32 counts centered on ``reference``; NaN where nothing was measured.
        reference: ``(cy, cx)``, pixels.
        backend: runs the ellipse network; ``mean`` lies on its device.
        start: an estimate to begin with; ``None``: the circle, and one pass more.
    """
    h, w = mean.shape
    seen = mean.isfinite()
    image = torch.where(seen, mean, 0.0)[None, None]
    valid = None if bool(seen.all()) else seen
    ellipticity, sigma = start or Ellipticity(), math.inf
    for _ in range(PASSES_FROM_NEAR if start else PASSES):
        # The network expects the center in the middle of the frame, wherever the reference is.
        upright = resample(
            image, torch.tensor([reference]), reference_center((h, w)), ellipticity, valid
        )[0, 0]
        weight = upright.isfinite().float()
        votes = backend.ellipse(ellipse.prepare(upright.nan_to_num(0.0), weight))
        residual = ellipse.decode(votes)
        v0, v1 = residual.vector[0].tolist()
        sigma = float(residual.sigma[0])
        if not math.isfinite(v0 + v1 + sigma):
            return Reading(Ellipticity(), math.inf)
        ellipticity = ellipticity.compose(Ellipticity.from_vector(v0, v1))
    return Reading(ellipticity, sigma)


class Calibrator:
    """Keeps the running mean, reads the ellipticity from it, and knows how far to trust it."""

    def __init__(
        self,
        frame_shape: tuple[int, int],
        reference: tuple[float, float],
        valid: Tensor | None,
        backend: Backend,
        config: CorrectorConfig,
    ):
        self._shape, self._reference, self._valid = frame_shape, reference, valid
        self._backend, self._config = backend, config
        self._frozen = False
        self._restart(None, "calibrating")

    def _restart(self, reading: Reading | None, state: State) -> None:
        self.reading = reading
        self._state: State = state
        self._mean = self._new_sum()
        self._aside, self._contradictions = self._new_sum(), 0
        self._window = self._new_sum()
        self._without_beam = 0
        self._last: Reading | None = None

    def _new_sum(self) -> PatternSum:
        return PatternSum(self._shape, self._backend.device)

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        return "frozen" if self._frozen else self._state

    @property
    def ellipticity(self) -> Ellipticity:
        """The distortion to take out of the next frames; none before the first good reading."""
        return self.reading.ellipticity if self.reading else Ellipticity()

    @property
    def patterns(self) -> int:
        """Patterns in the running mean."""
        return round(self._mean.patterns + self._aside.patterns + self._window.patterns)

    def mean(self) -> Tensor:
        """Return the running mean (h, w), counts; NaN where there is no source."""
        everything = self._new_sum()
        for part in (self._mean, self._aside, self._window):
            everything.merge(part)
        return everything.mean()

    def freeze(self) -> None:
        """Keep the ellipticity as it is; patterns are still averaged."""
        self._frozen = True

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._frozen = False

    def recalibrate(self) -> None:
        """Forget the mean and the ellipticity, and start over; this also unfreezes."""
        self._frozen = False
        self._restart(None, "calibrating")

    def load(self, reading: Reading) -> None:
        """Take over a reading made earlier; it holds until this scan has a mean of its own."""
        self._restart(reading, "locked")

    def recenter(self, reference: tuple[float, float]) -> None:
        """Average around another reference center: the mean starts over, the reading stays."""
        self._reference = reference
        self._restart(self.reading, self._state)

    def add(self, frames: Tensor, shifts: Tensor, which: Tensor) -> None:
        """Average frames that show a beam, and read the ellipticity whenever a window is full.

        Args:
            frames: (n, h, w) float32 raw counts.
            shifts: (n, 2) ``[dy, dx]``, pixels, that center them on the reference.
            which: (m,) numbers of those that show a beam.
        """
        every = self._config.ellipse_every
        start = 0
        while start < len(which):
            stop = start + every - round(self._window.patterns)
            self._average(frames, shifts, which[start:stop])
            start = stop
            if round(self._window.patterns) >= every:
                window, self._window = self._window, self._new_sum()
                self._close(window)

    def _average(self, frames: Tensor, shifts: Tensor, which: Tensor) -> None:
        def add_up(part: slice) -> PatternSum:
            total, few = self._new_sum(), which[part]
            total.add(frames[few], shifts[few], self._valid)
            return total

        for total in self._backend.spread(add_up, len(which)):
            self._window.merge(total)

    def see(self, beams: list[bool]) -> None:
        """Take note of which frames showed a beam; a locked calibration is lost without any."""
        for beam in beams:
            self._without_beam = 0 if beam else self._without_beam + 1
        most = self._config.lost_after * self._config.ellipse_every
        if self._state == "locked" and self._without_beam >= most:
            self._state = "lost"

    def _close(self, window: PatternSum) -> None:
        if self._frozen:
            self._merge(window)
            return
        if self._state == "locked" and self.reading:
            own = self._read(window)
            if own.contradicts(self.reading, self._config.max_ellipse_sigma):
                self._aside.merge(window)
                self._contradictions += 1
                if self._contradictions < self._config.lost_after:
                    return
                self._mean, window = self._new_sum(), self._new_sum()
                self._state = "lost"
        self._merge(window)
        self._follow()

    def _merge(self, window: PatternSum) -> None:
        """Add a window, and those put aside, to the running mean."""
        for part in (self._aside, window):
            self._mean.merge(part)
        self._aside, self._contradictions = self._new_sum(), 0
        self._mean.fade(self._config.averaging_window)

    def _follow(self) -> None:
        """Read the running mean; apply what it says, and lock if it is certain enough."""
        config = self._config
        enough = self._mean.patterns >= config.patterns_to_lock
        if self._state == "locked" and not enough:
            return  # A calibration that was loaded knows better than a few patterns.
        reading = self._read(self._mean)
        before, self._last = self._last, reading
        if reading.sigma > config.max_ellipse_sigma:
            return
        self.reading = reading
        if enough and before and reading.sigma <= config.lock_sigma:
            change = math.dist(before.ellipticity.vector, reading.ellipticity.vector)
            if change <= config.lock_sigma:
                self._state = "locked"

    def _read(self, patterns: PatternSum) -> Reading:
        start = self.reading.ellipticity if self.reading else None
        return read_ellipticity(patterns.mean(), self._reference, self._backend, start=start)
