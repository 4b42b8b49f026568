"""What users do with the patterns: how precisely the lattice can be measured on them.

One crystal is exposed over and over, each time strained a little otherwise. In every exposure each
strong reflection is found by correlating its disk near where it is without strain, and a lattice is
fitted to them. How much the fitted strain scatters around the true one, in units of how much of the
true one it shows, is the precision: the noise of a strain map. Without the strain, a filter that
blurs neighbouring reflections into one would pass for precise: nothing moves there any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from prenet4d_engines.evaluate.classical import DENOISE_METHODS
from prenet4d_engines.evaluate.datasets import FIRST_SEED
from prenet4d_engines.evaluate.report import OURS, Part, Table
from prenet4d_engines.evaluate.run import Run, dose_label
from prenet4d_engines.simulate import HELD_OUT, Kind, draw_optics, draw_pattern, render
from prenet4d_engines.simulate.pattern import RADIUS, Pattern, X, Y

Array = NDArray[np.float64]

RAW: Final = "raw"
_SHAPE: Final = (128, 128)
_KINDS: Final[tuple[Kind, ...]] = ("spots", "cbed")
_LEAST, _MOST = 5, 12
"""Reflections that a lattice is fitted to."""
_REACH: Final = 3
"""A reflection is looked for within so many pixels of its place without strain."""
_ROUNDING: Final = 1e-9
"""Of a correlation's largest value: what is less was left by its arithmetic."""
_LARGEST: Final = 0.02
"""Strains are drawn up to here, either way."""


@dataclass(frozen=True)
class Crystal:
    """A pattern without strain, its reflections' places (k, 2) in pixels, and its disk."""

    pattern: Pattern
    places: Array
    template: Array

    def strained(self, strains: Array) -> Array:
        """Return what is expected, (n, h, w) with sum 1 each, under normal strains (n, 2)."""
        patterns = []
        for strain in strains:
            disks = self.pattern.disks.copy()
            disks[:, [Y, X]] *= 1 + strain
            patterns.append(replace(self.pattern, disks=disks))
        return render(patterns, _SHAPE).double().numpy()


def evaluate_strain(run: Run) -> Part:
    """Measure the noise of the fitted strain, raw, with the classical filters, and with ours."""
    crystals = [
        crystal
        for kind in _KINDS
        for crystal in _crystals(kind, 1 if run.scans == 1 else 2, run.seed)
    ]
    exposures = max(12, run.patterns // 2)
    noise: dict[str, list[list[float]]] = {}
    steps = len(crystals) * len(run.scan_doses)
    for number, crystal in enumerate(crystals):
        for column, dose in enumerate(run.scan_doses):
            run.on_progress(
                (number * len(run.scan_doses) + column) / steps,
                f"strain, crystal {number + 1} of {len(crystals)}, {dose:.0f} electrons",
            )
            rng = np.random.default_rng([FIRST_SEED + run.seed, 7, number, round(dose)])
            strains = rng.uniform(-_LARGEST, _LARGEST, (exposures, 2))
            frames = rng.poisson(dose * crystal.strained(strains)).astype(np.float64)
            ours = run.networks.denoise(frames.astype(np.float32), np.ones(frames.shape, np.bool_))
            results = {RAW: [strain_noise(frames, strains, crystal)]}
            for method in DENOISE_METHODS:
                if method.installed:
                    results[method.name] = [
                        strain_noise(
                            np.stack([method.run(frame, *setting) for frame in frames]),
                            strains,
                            crystal,
                        )
                        for setting in method.settings
                    ]
            results[OURS] = [strain_noise(ours.astype(np.float64), strains, crystal)]
            for name, found in results.items():
                columns = noise.setdefault(name, [[] for _ in run.scan_doses])
                columns[column].append(min(found))
    rows = tuple(
        (name, tuple(float(np.exp(np.mean(np.log(c)))) for c in columns))
        for name, columns in noise.items()
    )
    table = Table(
        name="strain.precision",
        title=f"Noise of the strain fitted to crystals strained by up to {100 * _LARGEST:.0f} %, %",
        heading="frames",
        columns=tuple(dose_label(dose) for dose in run.scan_doses),
        rows=rows,
        doses=run.scan_doses,
        note=f"{len(crystals)} crystals of held-out materials, {exposures} exposures each,"
        " geometric mean; classical filters with the best of their settings for each; inf: the"
        " fitted strain of one does not follow the true one.",
    )
    return Part((table,))


def strain_noise(frames: Array, strains: Array, crystal: Crystal) -> float:
    """Return the noise in % of the normal strains that are fitted to frames.

    Args:
        frames: (n, h, w), the crystal under each of the strains.
        strains: (n, 2) true normal strains, [yy, xx].
        crystal: which it is.

    Returns:
        Half the width of the middle 68.3 % of what a straight line through fitted against true
        strains leaves over, so that a few failed fits do not decide it, over the line's slope;
        both averaged over the components. Infinite where the fitted strain does not follow at all.
    """
    fitted = np.array([fitted_strain(frame, crystal) for frame in frames])
    scatter, slope = 0.0, 0.0
    for true, found in zip(strains.T, fitted.T, strict=True):
        line = np.polynomial.Polynomial.fit(true, found, 1).convert()
        low, high = np.quantile(found - line(true), (0.1585, 0.8415))
        scatter, slope = scatter + float(high - low) / 2, slope + float(line.coef[1])
    return 100 * scatter / slope if slope > 0 else float("inf")


def fitted_strain(frame: Array, crystal: Crystal) -> Array:
    """Return the normal strains (2,), [yy, xx], of the lattice found in a frame (h, w)."""
    correlation = fftconvolve(frame, crystal.template, mode="same")
    peaks = np.array([_peak(correlation, place) for place in crystal.places])
    seen = peaks[:, 2] > 0  # where nothing was counted, nothing is known
    middle = crystal.places.mean(0)
    design = np.column_stack([np.ones(len(peaks)), crystal.places - middle])
    lattice = np.linalg.lstsq(design[seen], peaks[seen, :2], rcond=None)[0][1:]
    return np.asarray(np.diag(lattice) - 1.0, np.float64)


def _peak(image: Array, place: Array) -> Array:
    """Return y, x and height of the highest place near another one, by parabolas.

    What is no more than a convolution's rounding has no height.
    """
    y, x = np.round(place).astype(int)
    near = image[y - _REACH : y + _REACH + 1, x - _REACH : x + _REACH + 1]
    dy, dx = np.unravel_index(int(near.argmax()), near.shape)
    y, x = y - _REACH + int(dy), x - _REACH + int(dx)

    def vertex(before: float, top: float, after: float) -> float:
        curvature = before - 2 * top + after
        return float(np.clip(0.5 * (before - after) / curvature, -0.5, 0.5)) if curvature else 0.0

    return np.array(
        [
            y + vertex(image[y - 1, x], image[y, x], image[y + 1, x]),
            x + vertex(image[y, x - 1], image[y, x], image[y, x + 1]),
            image[y, x] if image[y, x] > _ROUNDING * image.max() else 0.0,
        ]
    )


def _crystals(kind: Kind, n: int, seed: int) -> list[Crystal]:
    """Draw crystals with enough reflections that stand alone to fit a lattice to."""
    rng = np.random.default_rng([FIRST_SEED + seed, *_SHAPE, 6, len(kind)])
    materials = list(HELD_OUT.values())
    chosen: list[Crystal] = []
    while len(chosen) < n:
        material = materials[rng.integers(len(materials))]
        center = ((_SHAPE[0] - 1) / 2, (_SHAPE[1] - 1) / 2)
        pattern = draw_pattern(
            rng,
            _SHAPE,
            kind=kind,
            material=material,
            center=center,
            ellipticity=(1.0, 0.0),
            optics=draw_optics(rng, kind, material, _SHAPE),
        )
        radius = float(pattern.disks[0, RADIUS])
        expected = render([pattern], _SHAPE)[0].double().numpy()
        places = _separate(pattern.disks[:, [Y, X]] + center, expected, radius)
        if len(places) >= _LEAST and np.linalg.cond((places - places.mean(0)).T) < 5:
            chosen.append(Crystal(pattern, places, _disk(radius)))
    return chosen


def _separate(places: Array, expected: Array, radius: float) -> Array:
    """Return the brightest reflections inside the frame that no other one touches.

    One that a neighbour overlaps is not where the lattice says, with or without noise. Neighbours
    of a hundredth of its brightness do no harm.
    """
    places = np.unique(np.round(places, 3), axis=0)
    border = radius + _REACH + 2
    inside = np.minimum(places, np.array(_SHAPE) - 1 - places).min(1) > border
    power = fftconvolve(expected, _disk(radius), mode="same")
    y, x = np.clip(np.round(places).astype(int), 0, np.array(_SHAPE) - 1).T
    bright = power[y, x]
    apart = np.hypot(*(places[:, None] - places).transpose(2, 0, 1))
    touched = (apart <= 2 * radius + _REACH) & (bright > 0.01 * bright[:, None])
    alone = touched.sum(1) == 1  # by itself
    good = np.flatnonzero(inside & alone & (bright > 0.01 * bright.max()))
    return places[good[np.argsort(bright[good])[::-1][:_MOST]]]


def _disk(radius: float) -> Array:
    """Return a soft disk on an odd square: what reflections are correlated with."""
    half = int(np.ceil(radius)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disk = 1 / (1 + np.exp((np.hypot(y, x) - radius) / 0.5))
    return np.asarray(disk, np.float64)
