"""What the demo found, held against what was true."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
TRACKED, CENTER_OF_MASS = "center, tracked", "center of mass"
"""Names of the two methods that the demo's verdict is about."""
LEAST_DRIFT_PX = 0.5
"""Where centers drift by less from their mean, on average, nothing can be said of following it."""


@dataclass(frozen=True)
class Truth:
    """What was drawn into the scan."""

    scan_shape: tuple[int, int]
    """``(ny, nx)``."""
    centers: Array
    """(n, 2) px, ``[cy, cx]``; without the measured pattern's own center where that is unknown."""
    groups: Array | None
    """(n,) int: frames drawn from the same measured pattern, whose own center nobody knows, so that
    centers compare up to one constant a group; ``None``: the centers are absolute."""
    ratio: float
    theta: float
    """Ellipticity, radians; ``nan`` where it is not known."""
    dose: float
    """Mean electrons a pattern."""


@dataclass(frozen=True)
class Found:
    """What the service said, as the recorder wrote it."""

    center: Array
    """(n, 2) px, from each frame alone."""
    tracked: Array
    """(n, 2) px, followed over the scan."""
    received: Array
    """(n,) bool: positions whose pattern arrived."""
    dose: float
    """Mean electrons a pattern."""
    ratio: float
    ratio_sigma: float
    theta: float
    counters: dict[str, int]
    """``received``, ``corrected``, ``rejected``, ``shed``, ``in_flight`` of the service."""
    frames_per_second: float
    latency_p50_ms: float
    latency_p99_ms: float


@dataclass(frozen=True, slots=True)
class Deviation:
    """Distances from the true center over the scan, in px."""

    mean: float
    median: float
    frames: int
    """How many frames have such a center; the others are said to show no beam."""


@dataclass(frozen=True)
class Score:
    """The demo's result: figures for people, and what a check has to complain about."""

    frames: int
    most_px: float
    """A larger median error of the tracked center makes no sense."""
    truth: Truth
    found: Found
    centers: dict[str, Deviation] = field(default_factory=dict)
    """Method → how far it is from the truth."""

    @property
    def ratio_error(self) -> float:
        """Relative error of the axes' ratio."""
        return self.found.ratio / self.truth.ratio - 1

    @property
    def theta_error_deg(self) -> float:
        """Error of the major axis' angle in degrees, in (−90, 90]."""
        turn = math.degrees(self.found.theta - self.truth.theta)
        return (turn + 90) % 180 - 90

    @property
    def followed(self) -> float:
        """The share of the true drift that the tracked center follows; ``nan`` where there is none.

        It is the slope of the found centers over the true ones: 1 where they go along, and less
        where they stay behind, which a median error over a slow drift need not show.
        """
        true = self.truth.centers - self.truth.centers.mean(axis=0)
        if not np.hypot(*true.T).mean() > LEAST_DRIFT_PX:
            return math.nan
        found = np.asarray(self.found.tracked, np.float64).copy()
        groups = self.truth.groups
        for group in np.unique(groups) if groups is not None else [None]:
            member = slice(None) if groups is None else groups == group
            for centers in (true, found):
                centers[member] -= centers[member].mean(axis=0)
        return float((found * true).sum() / (true * true).sum())

    def complaints(self) -> list[str]:
        """What must not be so, one sentence each: frames lost, or values that make no sense."""
        told: list[str] = []
        counters, arrived = self.found.counters, int(self.found.received.sum())
        if counters["received"] != self.frames or counters["corrected"] != self.frames:
            told.append(f"{self.frames} frames were sent; the service counts {counters}.")
        if arrived != self.frames:
            told.append(f"{self.frames} frames were sent; {arrived} were recorded.")
        tracked = self.centers[TRACKED].median
        if not tracked < self.most_px:
            told.append(
                f"The tracked center is off by {tracked:.2f} px (median; at most {self.most_px:g})."
            )
        if not math.isnan(self.followed) and not abs(self.followed - 1) < 0.2:
            told.append(f"The tracked center follows {self.followed:.0%} of the drift.")
        rival = self.centers[CENTER_OF_MASS].median
        # Up to a constant, a measured pattern that drift hardly cuts gives it an easy life.
        if self.truth.groups is None and not tracked < rival:
            told.append(f"Center of mass, off by {rival:.2f} px (median), does better.")
        if math.isfinite(self.truth.ratio) and not abs(self.ratio_error) < 0.02:
            told.append(f"The ellipticity is off by {100 * self.ratio_error:+.1f} % (at most 2).")
        dose = self.found.dose / self.truth.dose - 1
        if not abs(dose) < 0.1:
            told.append(f"The dose is off by {100 * dose:+.1f} % (at most 10).")
        return told


def center_errors(found: Array, truth: Truth) -> Array:
    """Distance of each found center from the true one, in px.

    Args:
        found: (n, 2), ``[cy, cx]``; NaN where there is none.
        truth: where ``groups`` says that centers compare up to a constant, the median difference
            of each group is taken out first.

    Returns:
        (n,) px; NaN where there is no center.
    """
    difference = np.asarray(found, np.float64) - truth.centers
    if truth.groups is not None:
        for group in np.unique(truth.groups):
            member = (truth.groups == group) & np.isfinite(difference).all(axis=1)
            if member.any():
                difference[member] -= np.median(difference[member], axis=0)
    return np.asarray(np.hypot(difference[:, 0], difference[:, 1]))


def deviation(found: Array, truth: Truth) -> Deviation:
    """Mean and median of :func:`center_errors` over the frames that have a center."""
    errors = center_errors(found, truth)
    errors = errors[np.isfinite(errors)]
    if not errors.size:
        return Deviation(math.nan, math.nan, 0)
    return Deviation(float(errors.mean()), float(np.median(errors)), errors.size)
