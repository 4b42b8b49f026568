"""Reading the elliptical distortion off the mean of a scan, against classical fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.classical import ELLIPSE_METHODS
from prenet4d_engines.evaluate.metrics import (
    angle_error,
    ratio_error,
    ring_nonuniformity,
    within_sigma,
)
from prenet4d_engines.evaluate.networks import recentered_mean
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table, most_of_the_best
from prenet4d_engines.evaluate.run import Run, Stopwatch, dose_label
from prenet4d_engines.evaluate.scans import held_out_scan
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.simulate import Kind

Array = NDArray[np.float64]

SCAN_SHAPE: Final = (16, 16)
"""256 patterns are averaged."""
KINDS: Final[tuple[Kind, ...]] = ("cbed", "spots", "rings", "grains", "amorphous")
RING_KINDS: Final[tuple[Kind, ...]] = ("rings", "grains", "amorphous")
"""What has rings whose radius one could look at."""
FOUND_CENTERS: Final = f"{OURS}, its own centers"
BEFORE: Final = "before correction"
_LEAST_RATIO: Final = 1.01
"""The angle of a smaller ratio says nothing."""
_GOAL_DOSE: Final = 1e4
_LEFT: Final = 0.1
"""What may be left of the rings' non-uniformity."""


def evaluate_ellipses(run: Run) -> Part:
    """Compare on means of 256 patterns of every kind and dose; the ratio is up to 1.12."""
    size, doses = run.sizes[0], run.scan_doses
    kinds = KINDS * run.scans
    truths = np.empty((len(kinds), 2))
    found: dict[str, Array] = {}
    sigmas = {name: np.empty((len(doses), len(kinds))) for name in (OURS, FOUND_CENTERS)}
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
                readings = {OURS: run.networks.ellipse(mean)}
            own = recentered_mean(*_with_own_centers(run, frames))
            readings[FOUND_CENTERS] = run.networks.ellipse(own)
            for name, (vector, sigma) in readings.items():
                estimates[name], sigmas[name][column, number] = vector[None], sigma
            for name, vectors in estimates.items():
                shape = (len(doses), len(kinds), len(vectors), 2)
                found.setdefault(name, np.zeros(shape))[column, number] = vectors
    part = _part(size, doses, np.array(kinds), truths, found, watch)
    return replace(part, tables=(*part.tables, _sigma_table(doses, truths, found, sigmas)))


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
    track = run.networks.track(frames, SCAN_SHAPE)
    if not track.good.any():
        return frames, np.tile(reference_center(frames.shape[1:]), (len(frames), 1))
    return frames[track.good], track.tracked[track.good]


def _part(
    size: int,
    doses: tuple[float, ...],
    kinds: NDArray[np.str_],
    truths: Array,
    found: dict[str, Array],
    watch: Stopwatch,
) -> Part:
    """Tables of median errors; each classical method with its best setting for each cell."""
    ratio, angle, ring = (
        {name: _errors(measure, vectors, truths) for name, vectors in found.items()}
        for measure in (ratio_error, angle_error, ring_nonuniformity)
    )
    uncorrected = np.zeros((len(doses), len(kinds), 1, 2))
    ring = {BEFORE: _errors(ring_nonuniformity, uncorrected, truths), **ring}
    columns = tuple(dose_label(dose) for dose in doses)
    seen = np.hypot(*truths.T) >= np.log(_LEAST_RATIO)
    note = (
        "Means of 256 patterns recentered by the true center (but: 'its own centers'), several"
        " grains and a hole each; classical fits with the best of their settings for each figure."
    )

    def over_dose(name: str, title: str, errors: dict[str, Array], of: NDArray[np.bool_]) -> Table:
        rows = tuple(
            (method, tuple(_median(e[d, of]) for d in range(len(doses))))
            for method, e in errors.items()
        )
        return Table(name, f"Ellipticity: {title}", "method", columns, rows, doses, note)

    def over_kind(name: str, title: str, errors: dict[str, Array]) -> Table:
        rows = tuple(
            (method, tuple(_median(e[-1, kinds == kind]) for kind in KINDS))
            for method, e in errors.items()
        )
        title = f"Ellipticity: {title} by kind at {columns[-1]}, %"
        return Table(name, title, "method", KINDS, rows)

    everything = np.ones(len(kinds), np.bool_)
    ratio_table = over_dose("ellipse.ratio", "median |ratio error|, %", ratio, everything)
    angle_table = over_dose(
        "ellipse.angle", f"median angle error where ratio ≥ {_LEAST_RATIO}, degrees", angle, seen
    )
    ring_table = over_dose(
        "ellipse.ring",
        f"median non-uniformity of the ring radius ({', '.join(RING_KINDS)}), %",
        ring,
        np.isin(kinds, RING_KINDS),
    )
    time_table = Table(
        "ellipse.time",
        "Ellipticity: time per mean on one core, ms",
        "method",
        (f"{size}²",),
        tuple((name, (watch.milliseconds(name),)) for name in found if name != FOUND_CENTERS),
    )
    return Part(
        (
            ratio_table,
            angle_table,
            ring_table,
            over_kind("ellipse.kinds", "median |ratio error|", ratio),
            over_kind("ellipse.ring.kinds", "median non-uniformity of a ring's radius", ring),
            time_table,
        ),
        (*_goal_checks(doses, ratio_table, angle_table), *_ring_checks(doses, ring_table)),
    )


def _sigma_table(
    doses: tuple[float, ...], truths: Array, found: dict[str, Array], sigmas: dict[str, Array]
) -> Table:
    """How many components of the vector form lie within their sigma at each dose."""
    rows = []
    for name, claimed in sigmas.items():
        deviations = found[name][:, :, 0] - truths  # (doses, scans, 2)
        within = zip(deviations, claimed, strict=True)
        rows.append((name, tuple(100 * within_sigma(d, s[:, None]) for d, s in within)))
    return Table(
        name="ellipse.sigma",
        title="Ellipticity: components within one sigma (calibrated: 68.3), %",
        heading="method",
        columns=tuple(dose_label(dose) for dose in doses),
        rows=tuple(rows),
        note=f"Of {len(truths)} means at each dose.",
    )


def _median(errors: Array) -> float | None:
    """Return the median over scans of errors (scans, settings) with the best setting.

    None where there is no scan: of all that were drawn, none may be elliptical enough.
    """
    return float(np.median(errors, axis=0).min()) if len(errors) else None


def _goal_checks(doses: tuple[float, ...], ratio: Table, angle: Table) -> Iterator[Check]:
    column = doses.index(_GOAL_DOSE)
    for table, what, limit in ((ratio, "ratio error, %", 0.1), (angle, "angle error, °", 2.0)):
        for name in (OURS, FOUND_CENTERS):
            value = table.row(name)[column]
            if value is not None:
                goal = f"Ellipticity of 256-pattern means at {dose_label(_GOAL_DOSE)}: median"
                yield Check(f"{goal} {what} ({name})", value, limit)
    rivals = [name for name, _ in ratio.rows if name not in (OURS, FOUND_CENTERS)]
    for name in (OURS, FOUND_CENTERS):
        goal = "Ellipticity of 256-pattern means: share of the best rival's ratio error"
        yield Check(
            f"{goal}, at the worst dose ({name})", most_of_the_best(ratio, name, rivals), 1.0
        )


def _ring_checks(doses: tuple[float, ...], table: Table) -> Iterator[Check]:
    """At most a tenth of the non-uniformity may be left, at every dose."""
    for name in (OURS, FOUND_CENTERS):
        for dose, before, after in zip(doses, table.row(BEFORE), table.row(name), strict=True):
            if before is not None and after is not None:
                goal = f"Non-uniformity of rings left at {dose_label(dose)}, share of before"
                yield Check(f"{goal}: at most {_LEFT} ({name})", after / before, _LEFT)
