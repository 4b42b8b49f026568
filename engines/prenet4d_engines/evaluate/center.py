"""Finding the center of single frames, against the classical methods, on the same counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.bound import BOUND, bounding_errors
from prenet4d_engines.evaluate.claims import (
    Claims,
    calibration_table,
    sigma_table,
    usable_table,
    warning_table,
)
from prenet4d_engines.evaluate.classical import CENTER_METHODS
from prenet4d_engines.evaluate.datasets import PatternSet
from prenet4d_engines.evaluate.metrics import lengths, wrong_beams
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table, largest, most_of_the_best
from prenet4d_engines.evaluate.run import Run, Stopwatch, dose_label, time_table, within

Array = NDArray[np.float64]

_STATISTICS: Final[dict[str, tuple[str, Callable[[Array], Array]]]] = {
    "median": ("median error, px", lambda e: np.asarray(np.median(e, axis=-1))),
    "mean": ("mean error, px", lambda e: np.asarray(np.mean(e, axis=-1))),
    "p95": ("error that 5 % exceed, px", lambda e: np.asarray(np.quantile(e, 0.95, axis=-1))),
}
NETWORK_ALONE: Final = f"{OURS}, network alone"
"""Before its answer is refined."""
_Figures = tuple[float | None, float | None, float | None]
"""Share of wrong beams in %, mean and RMS in px of the other errors; None where nobody can say."""
_GROUPS: Final = 4
_GOAL_DOSE: Final = 10_000


@dataclass(frozen=True)
class _Found:
    """What was found on one set.

    Attributes:
        errors: Of each method, for each dose the distances from the truth, (settings, n), px.
        bounds: For each dose what they would be at the Cramér-Rao bound, (1, draws), px; empty
            where it is not known.
        claims: For each dose what we say of our centers.
    """

    errors: dict[str, list[Array]]
    bounds: list[Array]
    claims: list[Claims]


def evaluate_centers(run: Run, sets: list[PatternSet]) -> Part:
    """Compare at every dose on every set; goals are judged on the first."""
    tables: list[Table] = []
    watches = {patterns.name: Stopwatch() for patterns in sets}
    claims: dict[str, list[Claims]] = {}
    for number, patterns in enumerate(sets):
        of_set = within(run, number / len(sets), 1 / len(sets))
        found = _find(of_set, patterns, watches[patterns.name])
        claims[patterns.title] = found.claims
        tables += _error_tables(run, patterns, found)
        tables += _wrong_beam_tables(run, patterns, found)
        tables.append(warning_table(run, patterns, found.claims))
        tables.append(sigma_table(run, patterns, found.claims))
        if _GOAL_DOSE in run.doses:
            tables.append(_kinds_table(patterns, found.errors, run.doses.index(_GOAL_DOSE)))
            tables += _parameter_tables(patterns, found.errors, run.doses.index(_GOAL_DOSE))
    exact = [c for patterns in sets if patterns.groups is None for c in claims[patterns.title]]
    tables += [calibration_table(exact), usable_table(run, claims)]
    tables.append(time_table("center", sets, watches, (*(m.name for m in CENTER_METHODS), OURS)))
    return Part(tuple(tables), tuple(_checks(run, sets[0], tables)))


def _find(run: Run, patterns: PatternSet, watch: Stopwatch) -> _Found:
    found = _Found({}, [], [])
    for step, dose in enumerate(run.doses):
        run.on_progress(step / len(run.doses), f"centers, {patterns.title}, {dose:.0f} electrons")
        frames = patterns.expose(dose).frames
        errors = _classical(patterns, frames, watch)
        with watch.timing(OURS, len(patterns)):
            centers, sigmas, beam = run.networks.centers(frames, patterns.masks)
        claims = Claims(patterns.deviations(centers), sigmas, beam)
        alone, _, _ = run.networks.centers(frames, patterns.masks, refined=False)
        errors[OURS] = lengths(claims.deviations)[None]
        errors[NETWORK_ALONE] = lengths(patterns.deviations(alone))[None]
        for name, of_method in errors.items():
            found.errors.setdefault(name, []).append(of_method)
        found.claims.append(claims)
        if patterns.moved is not None:
            found.bounds.append(bounding_errors(patterns, dose)[None])
    return found


def _classical(
    patterns: PatternSet, frames: NDArray[np.float32], watch: Stopwatch
) -> dict[str, Array]:
    """Return each method's distances from the truth, (settings, patterns), in px."""
    inputs = patterns.without_masks(frames)
    results = {}
    for method in CENTER_METHODS:
        errors = []
        for counts, setting in product(inputs, method.settings):
            with watch.timing(method.name, len(patterns)):
                found = [
                    method.run(frame, radius, *setting)
                    for frame, radius in zip(counts, patterns.radii, strict=True)
                ]
            errors.append(lengths(patterns.deviations(np.array(found))))
        results[method.name] = np.array(errors)
    return results


def _error_tables(run: Run, patterns: PatternSet, found: _Found) -> list[Table]:
    shown = found.errors | ({BOUND: found.bounds} if found.bounds else {})
    return [
        Table(
            name=f"center.{statistic}.{patterns.name}",
            title=f"Center, {patterns.title}: {title}",
            heading="method",
            columns=tuple(dose_label(dose) for dose in run.doses),
            rows=tuple(
                (name, tuple(float(reduce(at_dose).min()) for at_dose in of_method))
                for name, of_method in shown.items()
            ),
            doses=run.doses,
            note="Classical methods with the best of their settings at each dose, chosen on the"
            " truth, and the beam's true radius given; ours on each frame alone. The bound is"
            " that of one who knows the noise-free pattern.",
        )
        for statistic, (title, reduce) in _STATISTICS.items()
    ]


def _wrong_beam_tables(run: Run, patterns: PatternSet, found: _Found) -> list[Table]:
    """How often another beam is taken for the direct one, and the errors of the other frames."""
    limits = patterns.limits
    chosen = {
        name: [best_setting(errors, limits) for errors in of_method]
        for name, of_method in found.errors.items()
    }
    rows: dict[str, list[_Figures]] = {
        name: [apart_from_wrong_beams(errors, limits) for errors in of_method]
        for name, of_method in chosen.items()
    }
    bounds: list[_Figures] = [
        (None, float(e.mean()), float(np.sqrt(np.mean(e * e)))) for e in found.bounds
    ]
    columns = tuple(dose_label(dose) for dose in run.doses)
    title = f"Center, {patterns.title}"
    note = (
        "Wrong: outside the direct disk, or nearer to another reflection where that is known, and"
        " over 3 px off (128² frames; others in proportion). Classical methods with the setting"
        " whose mean error is least if a wrong beam counts as that limit."
    )
    fewer = " Methods that are wrong more often are averaged over fewer and easier patterns."
    wrong = Table(
        name=f"center.wrong.{patterns.name}",
        title=f"{title}: another beam taken for the direct one, %",
        heading="method",
        columns=columns,
        rows=tuple((name, tuple(share for share, _, _ in each)) for name, each in rows.items()),
        doses=run.doses,
        note=note,
    )
    right = [
        Table(
            name=f"center.right.{name}.{patterns.name}",
            title=f"{title}: {words} error where the direct beam is taken, px",
            heading="method",
            columns=columns,
            rows=tuple(
                (method, tuple(at_dose[which] for at_dose in each))
                for method, each in (*rows.items(), (BOUND, bounds))
                if each
            ),
            doses=run.doses,
            note=note + fewer,
        )
        for which, name, words in ((1, "mean", "mean"), (2, "rms", "root mean square"))
    ]
    same = Table(
        name=f"center.right.same.{patterns.name}",
        title=f"{title}: our mean error over the method's, on frames where both take the direct"
        " beam",
        heading="method",
        columns=columns,
        rows=tuple(
            (
                method.name,
                tuple(
                    common_ratio(ours, its, limits)
                    for ours, its in zip(chosen[OURS], chosen[method.name], strict=True)
                ),
            )
            for method in CENTER_METHODS
        ),
        note=note,
    )
    return [wrong, *right, same]


def best_setting(errors: Array, limits: Array) -> Array:
    """Return the errors (n,) of the setting whose mean is least, wrong beams counting as limits.

    So one setting's share of wrong beams and precision belong together, and neither is bought by
    the other.

    Args:
        errors: (settings, n), px.
        limits: (n,), px: beyond them, another beam was taken for the direct one.
    """
    chosen = np.where(wrong_beams(errors, limits), limits, errors).mean(1).argmin()
    return np.asarray(errors[chosen])


def apart_from_wrong_beams(errors: Array, limits: Array) -> _Figures:
    """Return the share of wrong beams in %, and mean and RMS in px of the other errors (n,)."""
    wrong = wrong_beams(errors, limits)
    share, right = 100 * float(wrong.mean()), errors[~wrong]
    if not right.size:
        return share, None, None
    return share, float(right.mean()), float(np.sqrt(np.mean(right * right)))


def common_ratio(ours: Array, others: Array, limits: Array) -> float | None:
    """Return the ratio of mean errors (n,) over the patterns where neither takes a wrong beam."""
    both = ~(wrong_beams(ours, limits) | wrong_beams(others, limits))
    total = float(others[both].sum())
    return float(ours[both].sum()) / total if total > 0 else None


def _kinds_table(patterns: PatternSet, errors: dict[str, list[Array]], at: int) -> Table:
    """Median error of each kind of pattern at the goals' dose, which is the doses' ``at``-th."""
    kinds = tuple(dict.fromkeys(patterns.kinds))
    of = np.array(patterns.kinds)
    rows = []
    for name, of_method in errors.items():
        figures = [float(np.median(of_method[at][:, of == k], axis=1).min()) for k in kinds]
        rows.append((name, tuple(figures)))
    return Table(
        name=f"center.kinds.{patterns.name}",
        title=f"Center, {patterns.title}: median error by kind at {dose_label(_GOAL_DOSE)}, px",
        heading="method",
        columns=tuple(f"{kind} ({int((of == kind).sum())})" for kind in kinds),
        rows=tuple(rows),
        note="In brackets the number of patterns; best setting for each kind.",
    )


def _parameter_tables(patterns: PatternSet, errors: dict[str, list[Array]], at: int) -> list[Table]:
    """Error over the beam's radius, the center's place and the distortion, in equal groups.

    At the goals' dose, which is the doses' ``at``-th.
    """
    if patterns.ratios is None:
        return []
    size = np.array(patterns.expected.shape[1:])
    away = lengths(patterns.centers - (size - 1) / 2)
    tables = []
    for name, title, values in (
        ("radius", "the direct beam's radius, px", patterns.radii),
        ("shift", "the center's distance from the frame's middle, px", away),
        ("ratio", "the distortion's ratio", patterns.ratios),
    ):
        groups = np.array_split(np.argsort(values), _GROUPS)
        tables.append(
            Table(
                name=f"center.{name}.{patterns.name}",
                title=f"Center, {patterns.title}: median error at {dose_label(_GOAL_DOSE)}, px,"
                f" over {title}",
                heading="method",
                columns=tuple(f"{values[g].min():.3g} to {values[g].max():.3g}" for g in groups),
                rows=tuple(
                    (
                        method,
                        tuple(float(np.median(e[at][:, g], axis=1).min()) for g in groups),
                    )
                    for method, e in errors.items()
                ),
            )
        )
    return tables


def _checks(run: Run, patterns: PatternSet, tables: list[Table]) -> Iterator[Check]:
    """Mean error and its share of the best rival's, median against the bound, honest sigmas."""
    of = {table.name: table for table in tables}
    mean, median = (of[f"center.{name}.{patterns.name}"] for name in ("mean", "median"))
    where = f"Center, {patterns.title}"
    column = next((i for i, dose in enumerate(run.doses) if dose >= _GOAL_DOSE), None)
    if column is not None:
        worst = largest(mean.row(OURS)[column:])
        yield Check(f"{where}: mean error from {dose_label(_GOAL_DOSE)} on, px", worst, 0.04)
    rivals = [method.name for method in CENTER_METHODS]
    share = most_of_the_best(mean, OURS, rivals)
    yield Check(f"{where}: mean error's share of the best rival's, at the worst dose", share, 0.5)
    if any(name == BOUND for name, _ in median.rows):
        times = most_of_the_best(median, OURS, [BOUND])
        yield Check(f"{where}: median error in Cramér-Rao bounds, at the worst dose", times, 2.0)
    within_one, _ = (values for _, values in of[f"center.sigma.{patterns.name}"].rows)
    off = largest(abs(value - 68.3) for value in within_one if value is not None)
    yield Check(f"{where}: share within one sigma off 68.3 %, at the worst dose", off, 5.0)
