"""What is claimed of centers, sigma and a usable beam, against what is true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.datasets import ODD_SHAPE, PatternSet, patterns_without_beam
from prenet4d_engines.evaluate.metrics import lengths, within_sigma, wrong_beams
from prenet4d_engines.evaluate.networks import USABLE
from prenet4d_engines.evaluate.report import Table
from prenet4d_engines.evaluate.run import Run, dose_label

Array = NDArray[np.float64]

SURE: Final = 1.0
"""A center whose sigma in px is below this on both axes is claimed to be known."""
_GROUPS: Final = 6


@dataclass(frozen=True)
class Claims:
    """What is said of the centers of n frames, and how far off they are.

    Attributes:
        deviations: (n, 2) found minus true center in px.
        sigmas: (n, 2) claimed sigma in px.
        beam: (n,) claimed probability of a usable beam.
    """

    deviations: Array
    sigmas: Array
    beam: Array

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(n,), where the corrector would use the frame."""
        return np.asarray(self.beam >= USABLE)


def sigma_table(run: Run, patterns: PatternSet, claims: list[Claims]) -> Table:
    """How many components lie within their sigma at each dose."""

    def within(factor: float) -> tuple[float, ...]:
        return tuple(100 * within_sigma(c.deviations, c.sigmas, factor) for c in claims)

    return Table(
        name=f"center.sigma.{patterns.name}",
        title=f"Center, {patterns.title}: components within their sigma, %",
        heading="within",
        columns=tuple(dose_label(dose) for dose in run.doses),
        rows=(
            ("1 sigma (calibrated: 68.3)", within(1.0)),
            ("2 sigma (calibrated: 95.4)", within(2.0)),
        ),
    )


def warning_table(run: Run, patterns: PatternSet, claims: list[Claims]) -> Table:
    """Whether frames whose center lies outside the direct beam are among those called sure."""
    every, usable, sure, both = [], [], [], []
    trusted = []
    for claim in claims:
        wrong = wrong_beams(lengths(claim.deviations), patterns.limits)
        known = (claim.sigmas < SURE).all(1)
        every.append(_share(wrong))
        usable.append(_share(wrong[claim.usable]))
        sure.append(_share(wrong[known]))
        both.append(_share(wrong[claim.usable & known]))
        trusted.append(_share(claim.usable & known))
    return Table(
        name=f"center.warned.{patterns.name}",
        title=f"Center, {patterns.title}: wrong beams among frames of which this is claimed, %",
        heading="claimed",
        columns=tuple(dose_label(dose) for dose in run.doses),
        rows=(
            ("nothing: all frames", tuple(every)),
            ("usable", tuple(usable)),
            (f"sigma below {SURE:g} px", tuple(sure)),
            ("both", tuple(both)),
            ("(frames of which both are claimed)", tuple(trusted)),
        ),
    )


def _share(chosen: NDArray[np.bool_]) -> float | None:
    """Return in percent how many are True; None of nothing."""
    return 100 * float(chosen.mean()) if chosen.size else None


def calibration_table(claims: list[Claims]) -> Table:
    """Claimed sigma against what the errors really are, in equally many components each."""
    sigma = np.concatenate([claim.sigmas.ravel() for claim in claims])
    error = np.concatenate([np.abs(claim.deviations).ravel() for claim in claims])
    groups = np.array_split(np.argsort(sigma), _GROUPS)
    return Table(
        name="center.calibration",
        title="Center, all simulated sets and doses: claimed sigma against true error, px",
        heading=f"components in order of claimed sigma, {_GROUPS} equal groups",
        columns=tuple(str(i + 1) for i in range(_GROUPS)),
        rows=(
            ("claimed sigma, median", tuple(float(np.median(sigma[g])) for g in groups)),
            (
                "error that 68.3 % stay below",
                tuple(float(np.quantile(error[g], 0.683)) for g in groups),
            ),
        ),
    )


def usable_table(run: Run, claims: Mapping[str, list[Claims]]) -> Table:
    """How often a frame is said to show a beam, with one (by the sets' titles) and without."""
    without = {}
    for h, w in ((128, 128), ODD_SHAPE):
        empty = patterns_without_beam((h, w), 2 * run.patterns, seed=run.seed)
        shares = []
        for dose in run.doses:
            _, _, beam = run.networks.centers(empty.expose(dose).frames, empty.masks)
            shares.append(100 * float((beam >= USABLE).mean()))
        shape = "" if h == w else f"{h} × {w} px, "
        without[f"{shape}without a beam: even, stray light, beam outside (wanted: 0)"] = shares
    return Table(
        name="center.usable",
        title="Center: frames said to show a usable beam, %",
        heading="frames",
        columns=tuple(dose_label(dose) for dose in run.doses),
        rows=(
            *((title, tuple(_share(c.usable) for c in of_set)) for title, of_set in claims.items()),
            *((title, tuple(shares)) for title, shares in without.items()),
        ),
    )
