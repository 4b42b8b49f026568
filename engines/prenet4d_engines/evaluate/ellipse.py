"""Reading the elliptical distortion off the mean of a scan, against classical fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.classical import ELLIPSE_METHODS
from prenet4d_engines.evaluate.datasets import held_out_scan
from prenet4d_engines.evaluate.metrics import angle_error, ratio_error, residual_ratio
from prenet4d_engines.evaluate.networks import recentered_mean
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table
from prenet4d_engines.evaluate.run import Run, Stopwatch, dose_label
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.simulate import Kind
from prenet4d_engines.tracking import CenterTracker

Array = NDArray[np.float64]

SCAN_SHAPE: Final = (16, 16)
"""256 patterns are averaged."""
KINDS: Final[tuple[Kind, ...]] = ("cbed", "spots", "rings", "grains", "amorphous")
FOUND_CENTERS: Final = f"{OURS}, its own centers"
_LEAST_RATIO: Final = 1.01
"""The angle of a smaller ratio says nothing."""
_GOAL_DOSE: Final = 1e4
_USABLE: Final = 0.5


def evaluate_ellipses(run: Run) -> Part:
    """Compare on means of 256 patterns of every kind and dose; the ratio is up to 1.12."""
    size, doses = run.sizes[0], run.scan_doses
    kinds = KINDS * run.scans
    truths = np.empty((len(kinds), 2))
    found: dict[str, Array] = {}
    watch = Stopwatch()
    for number, kind in enumerate(kinds):
        for column, dose in enumerate(doses):
            run.on_progress(
                (number + column / len(doses)) / len(kinds),
                f"ellipticity, {kind}, {dose:.0f} electrons",
            )
            scan, radius = held_out_scan(
                SCAN_SHAPE, (size, size), kind, dose=dose, seed=run.seed, number=number
            )
            truths[number] = Ellipticity(*scan.ellipticity).vector
            frames = scan.frames().astype(np.float32)
            mean = recentered_mean(frames, scan.centers)
            estimates = _classical(mean, radius, watch)
            with watch.timing(OURS):
                estimates[OURS] = run.networks.ellipse(mean)[0][None]
            own = recentered_mean(*_with_own_centers(run, frames))
            estimates[FOUND_CENTERS] = run.networks.ellipse(own)[0][None]
            for name, vectors in estimates.items():
                shape = (len(doses), len(kinds), len(vectors), 2)
                found.setdefault(name, np.zeros(shape))[column, number] = vectors
    return _part(size, doses, np.array(kinds), truths, found, watch)


def _errors(measure: Callable[[Array, Array], float], vectors: Array, truths: Array) -> Array:
    """Return (doses, scans, settings) errors of vectors (doses, scans, settings, 2)."""
    return np.array(
        [
            [
                [measure(v, truth) for v in of_scan]
                for of_scan, truth in zip(at, truths, strict=True)
            ]
            for at in vectors
        ]
    )


def _classical(mean: NDArray[np.float32], radius: float, watch: Stopwatch) -> dict[str, Array]:
    weights = np.isfinite(mean).astype(np.float64)
    image = np.nan_to_num(mean.astype(np.float64), nan=0.0)
    center = reference_center(mean.shape)
    results = {}
    for method in ELLIPSE_METHODS:
        if not method.installed:
            continue
        vectors = []
        for setting in method.settings:
            with watch.timing(method.name):
                vectors.append(method.run(image, weights, center, radius, *setting))
        results[method.name] = np.array(vectors)
    return results


def _with_own_centers(run: Run, frames: NDArray[np.float32]) -> tuple[NDArray[np.float32], Array]:
    """Return the frames that the corrector would average, and the centers it tracks."""
    centers, sigmas, usable = run.networks.centers(frames, np.ones(frames.shape, np.bool_))
    tracked, _, outlier = CenterTracker(SCAN_SHAPE).update(
        np.arange(len(frames)), centers, sigmas, usable >= _USABLE
    )
    good = (usable >= _USABLE) & ~outlier & np.isfinite(tracked).all(1)
    if not good.any():
        return frames, np.tile(reference_center(frames.shape[1:]), (len(frames), 1))
    return frames[good], tracked[good]


def _part(
    size: int,
    doses: tuple[float, ...],
    kinds: NDArray[np.str_],
    truths: Array,
    found: dict[str, Array],
    watch: Stopwatch,
) -> Part:
    """Tables of median errors; each classical method with its best setting for each cell."""
    ratio = {name: _errors(ratio_error, vectors, truths) for name, vectors in found.items()}
    left = {name: _errors(residual_ratio, vectors, truths) for name, vectors in found.items()}
    angle = {name: _errors(angle_error, vectors, truths) for name, vectors in found.items()}
    seen = np.hypot(*truths.T) >= np.log(_LEAST_RATIO)
    columns = tuple(dose_label(dose) for dose in doses)
    note = (
        "Means of 256 patterns recentered by the true center (but: 'its own centers'), several"
        " grains and a hole each; classical fits with the best of their settings for each figure."
    )

    def over_dose(
        errors: dict[str, Array], of: NDArray[np.bool_]
    ) -> tuple[tuple[str, tuple[float | None, ...]], ...]:
        return tuple(
            (name, tuple(float(np.median(e[d][of], axis=0).min()) for d in range(len(doses))))
            for name, e in errors.items()
        )

    everything = np.ones(len(kinds), np.bool_)
    tables = [
        Table(
            "ellipse.ratio",
            "Ellipticity: median |ratio error|, %",
            "method",
            columns,
            over_dose(ratio, everything),
            doses,
            note,
        ),
        Table(
            "ellipse.residual",
            "Ellipticity: median ellipticity left after correction (ratio − 1), %",
            "method",
            columns,
            over_dose(left, everything),
            doses,
            note,
        ),
        Table(
            "ellipse.angle",
            f"Ellipticity: median angle error where ratio ≥ {_LEAST_RATIO}, degrees",
            "method",
            columns,
            over_dose(angle, seen) if seen.any() else (),
            doses,
            note,
        ),
        Table(
            "ellipse.kinds",
            f"Ellipticity: median |ratio error| by kind at {columns[-1]}, %",
            "method",
            KINDS,
            tuple(
                (name, tuple(float(np.median(e[-1][kinds == k], axis=0).min()) for k in KINDS))
                for name, e in ratio.items()
            ),
        ),
        Table(
            "ellipse.time",
            "Ellipticity: time per mean on one core, ms",
            "method",
            (f"{size}²",),
            tuple((name, (watch.milliseconds(name),)) for name in found if name != FOUND_CENTERS),
        ),
    ]
    goal = f"Median ratio error on 256-pattern means at {dose_label(_GOAL_DOSE)}, %: below"
    checks = tuple(
        Check(f"{goal} 0.5 ({name})", value, 0.5)
        for name in (OURS, FOUND_CENTERS)
        if _GOAL_DOSE in doses
        and (value := tables[0].row(name)[doses.index(_GOAL_DOSE)]) is not None
    )
    return Part(tuple(tables), checks)
