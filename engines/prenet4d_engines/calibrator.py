"""From recentered patterns to an ellipticity that can be trusted: the running mean and its states.

Recentered raw counts are summed in *windows*, which are closed at the end of the batch in which
they hold ``ellipse_every`` patterns. A full window is merged into the running mean, from which the
ellipse network reads the distortion. While the calibration is locked, every window is also read
alone: one that contradicts the calibration is put aside, and if several in a row do, the
calibration is lost and starts over from what was put aside.

Readings are asked for when a window closes and looked at when something depends on them: a GPU
works on the next frames meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from prenet4d_engines.batch import State
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.lanes import Lanes
from prenet4d_engines.reading import SEEN, Asked, Reader, Reading


class PatternSum:
    """A sum of recentered patterns; sums of different patterns merge by addition."""

    def __init__(self, frame_shape: tuple[int, int], device: torch.device):
        self.sums = torch.zeros((2, *frame_shape), device=device)
        """(2, h, w): counts, and weights."""
        self.patterns = 0.0

    def add(self, sums: Tensor, patterns: float) -> None:
        """Add the sums (2, h, w) of so many patterns."""
        self.sums += sums
        self.patterns += patterns

    def merge(self, other: PatternSum) -> None:
        """Add another sum, which is left as it is."""
        self.add(other.sums, other.patterns)

    def fade(self, most: float) -> None:
        """Scale the sum down to what ``most`` patterns would weigh, if it weighs more."""
        if self.patterns > most:
            self.sums *= most / self.patterns
            self.patterns = most

    def mean(self) -> Tensor:
        """Return the mean pattern (h, w), counts; NaN where too few patterns had a source."""
        counts, weight = self.sums
        return torch.where(weight > SEEN * self.patterns, counts / weight, math.nan)


class Standing(NamedTuple):
    """What the calibration has come to, without its patterns."""

    reading: Reading | None
    state: State
    stands: bool
    frozen: bool


class _Closed(NamedTuple):
    """A window that was closed, and what was asked about it."""

    window: PatternSum
    everything: PatternSum
    """The running mean with this window, and with those put aside."""
    own: Asked | None
    whole: Asked | None


P = ParamSpec("P")
T = TypeVar("T")


def _in_order(
    method: Callable[Concatenate[Calibrator, P], T],
) -> Callable[Concatenate[Calibrator, P], T]:
    """Have what a method does to sums done in the order of everything else on the device."""

    @wraps(method)
    def ordered(self: Calibrator, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(), self._lanes.computing():
            return method(self, *args, **kwargs)

    return ordered


class Calibrator:
    """Keeps the running mean, reads the ellipticity from it, and knows how far to trust it.

    Args:
        frame_shape: ``(h, w)``, pixels.
        reference: ``(cy, cx)`` that patterns are centered on, pixels.
        reader: reads means.
        lanes: of the reader's device, where the sums are kept too.
        config: the corrector's.
    """

    def __init__(
        self,
        frame_shape: tuple[int, int],
        reference: tuple[float, float],
        reader: Reader,
        lanes: Lanes,
        config: CorrectorConfig,
    ):
        self._shape, self._reference = frame_shape, reference
        self._reader, self._lanes, self._config = reader, lanes, config
        self._frozen = False
        self._restart(None, "calibrating", stands=False)

    @_in_order
    def _restart(self, reading: Reading | None, state: State, *, stands: bool) -> None:
        self._reading = reading
        self._state: State = state
        self._stands = stands
        self._mean = self._new_sum()
        self._aside, self._contradictions = self._new_sum(), 0
        self._window = self._new_sum()
        self._closed: _Closed | None = None
        self._without_beam = 0
        self._last: Reading | None = None

    def _new_sum(self) -> PatternSum:
        return PatternSum(self._shape, self._lanes.device)

    def _sum_of(self, *parts: PatternSum) -> PatternSum:
        total = self._new_sum()
        for part in parts:
            total.merge(part)
        return total

    @property
    def standing(self) -> Standing:
        """What is known without asking the device, to be resumed from."""
        return Standing(self._reading, self._state, self._stands, self._frozen)

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        self.settle()
        return "frozen" if self._frozen else self._state

    @property
    def stands(self) -> bool:
        """Whether there is a reading that is frozen, or uncontradicted since it was locked."""
        self.settle()
        return self._reading is not None and (self._frozen or self._stands)

    @property
    def reading(self) -> Reading | None:
        """The last good reading."""
        self.settle()
        return self._reading

    @property
    def ellipticity(self) -> Ellipticity:
        """The distortion to take out of the next frames; none before the first good reading."""
        reading = self.reading
        return reading.ellipticity if reading else Ellipticity()

    @property
    def patterns(self) -> int:
        """Patterns in the running mean."""
        self.settle()
        return round(self._mean.patterns + self._aside.patterns + self._window.patterns)

    @_in_order
    def mean(self) -> Tensor:
        """Return the running mean (h, w), counts; NaN where there is no source."""
        self.settle()
        return self._sum_of(self._mean, self._aside, self._window).mean()

    def freeze(self) -> None:
        """Keep the ellipticity as it is; patterns are still averaged."""
        self.settle()
        self._frozen = True

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._frozen = False

    def recalibrate(self) -> None:
        """Forget the mean and the ellipticity, and start over; this also unfreezes."""
        self._frozen = False
        self._restart(None, "calibrating", stands=False)

    def load(self, reading: Reading) -> None:
        """Take over a reading made earlier; it holds until this scan knows better."""
        self._restart(reading, "locked", stands=True)

    def abandon(self, standing: Standing) -> None:
        """Go back to where it stood, and forget what was asked for, without asking the device."""
        self._closed = None
        self._reading, self._state, self._stands, self._frozen = standing

    def resume(self, standing: Standing, reference: tuple[float, float]) -> None:
        """Go on where another calibrator stood; the mean starts over."""
        self._reference, self._frozen = reference, standing.frozen
        self._restart(standing.reading, standing.state, stands=standing.stands)

    def recenter(self, reference: tuple[float, float]) -> None:
        """Average around another reference center: the mean starts over, the reading stays."""
        self.settle()
        self._reference = reference
        self._restart(self._reading, self._state, stands=self._stands)

    @_in_order
    def add(self, sums: Tensor, patterns: int) -> None:
        """Add up the patterns of a batch that show a beam; close the window if it is full.

        Args:
            sums: (2, h, w) their counts and weights, recentered (`resample.recentered_sum`).
            patterns: how many they are.
        """
        self.settle()
        self._window.add(sums, patterns)
        if self._window.patterns >= self._config.ellipse_every:
            window, self._window = self._window, self._new_sum()
            self._close(window)

    def see(self, beams: list[bool]) -> None:
        """Take note of which frames showed a beam; a locked calibration is lost without any."""
        self.settle()
        most = self._config.lost_after * self._config.ellipse_every
        for beam in beams:
            self._without_beam = 0 if beam else self._without_beam + 1
            if self._state == "locked" and self._without_beam >= most:
                self._state = "lost"

    def settle(self) -> None:
        """Look at the readings that were asked for, and decide what follows from them."""
        if self._closed is not None:
            closed, self._closed = self._closed, None
            self._decide(closed)

    @_in_order
    def _decide(self, closed: _Closed) -> None:
        if closed.own is not None and self._reading is not None:
            own = closed.own.wait()
            if own.contradicts(self._reading, self._config.max_ellipse_sigma):
                self._contradicted(closed.window)
                return
            self._state = "locked"  # again, where the beam had gone
        self._take(closed.everything)
        if closed.whole is not None:
            self._follow(closed.whole)

    def _close(self, window: PatternSum) -> None:
        """Ask for everything that a full window may have to tell."""
        everything = self._sum_of(self._mean, self._aside, window)
        everything.fade(self._config.averaging_window)
        if self._frozen:
            self._take(everything)
            return
        # A calibration that was loaded knows better than a few patterns, wherever the beam was.
        follows = not self._stands or everything.patterns >= self._config.patterns_to_lock
        self._closed = _Closed(
            window,
            everything,
            self._ask(window) if self._stands else None,
            self._ask(everything) if follows else None,
        )

    def _take(self, everything: PatternSum) -> None:
        self._mean = everything
        self._aside, self._contradictions = self._new_sum(), 0

    def _contradicted(self, window: PatternSum) -> None:
        """Put a window aside; after several in a row, start over from them."""
        self._aside.merge(window)
        self._contradictions += 1
        if self._contradictions >= self._config.lost_after:
            self._state, self._stands = "lost", False
            self._aside.fade(self._config.averaging_window)
            self._take(self._aside)
            self._follow(self._ask(self._mean))

    def _follow(self, asked: Asked) -> None:
        """Apply what the running mean says, and lock if it is certain enough."""
        config, reading = self._config, asked.wait()
        before, self._last = self._last, reading
        if reading.sigma > config.max_ellipse_sigma:
            return
        if self._stands and self._reading is not None and self._reading.knows_better(reading):
            return
        self._reading = reading
        enough = self._mean.patterns >= config.patterns_to_lock
        if enough and before and reading.sigma <= config.lock_sigma:
            change = math.dist(before.ellipticity.vector, reading.ellipticity.vector)
            if change <= config.lock_sigma:
                self._state, self._stands = "locked", True

    def _ask(self, patterns: PatternSum) -> Asked:
        return self._reader.ask(patterns.mean(), self._reference)
