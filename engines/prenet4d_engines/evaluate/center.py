"""Finding the center of single frames, against the classical methods, on the same counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.bound import BOUND, bounding_errors
from prenet4d_engines.evaluate.classical import CENTER_METHODS
from prenet4d_engines.evaluate.classical.center import CENTERS_OF_MASS
from prenet4d_engines.evaluate.datasets import PatternSet, patterns_without_beam
from prenet4d_engines.evaluate.denoise import time_table
from prenet4d_engines.evaluate.metrics import lengths, within_sigma
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table
from prenet4d_engines.evaluate.run import USABLE, Run, Stopwatch, dose_label

Array = NDArray[np.float64]

_STATISTICS: Final[dict[str, tuple[str, Callable[[Array], Array]]]] = {
    "median": ("median error, px", lambda e: np.asarray(np.median(e, axis=-1))),
    "mean": ("mean error, px", lambda e: np.asarray(np.mean(e, axis=-1))),
    "p95": ("error that 5 % exceed, px", lambda e: np.asarray(np.quantile(e, 0.95, axis=-1))),
}
NETWORK_ALONE: Final = f"{OURS}, network alone"
"""Before the pattern's own symmetry refines its answer."""
_CLAIMS: Final = 6
_GROUPS: Final = 4
_GOAL_DOSE: Final = 10_000


def evaluate_centers(run: Run, sets: list[PatternSet]) -> Part:
    """Compare at every dose on every set; goals are judged on the first."""
    tables: list[Table] = []
    watches: dict[str, Stopwatch] = {}
    claims: list[tuple[Array, Array]] = []
    usable: dict[str, list[float]] = {}
    for number, patterns in enumerate(sets):
        bounds: list[Array] = []
        watch = watches[patterns.name] = Stopwatch()
        errors: dict[str, list[Array]] = {}
        within: dict[float, list[float]] = {1.0: [], 2.0: []}
        for step, dose in enumerate(run.doses):
            run.on_progress(
                (number + step / len(run.doses)) / len(sets),
                f"centers, {patterns.title}, {dose:.0f} electrons",
            )
            frames = patterns.expose(dose).frames
            for name, found in _classical(patterns, frames, watch).items():
                errors.setdefault(name, []).append(found)
            with watch.timing(OURS, len(patterns)):
                centers, sigmas, beam = run.networks.centers(frames, patterns.masks)
            deviations = patterns.deviations(centers)
            usable.setdefault(patterns.title, []).append(100 * float((beam >= USABLE).mean()))
            if patterns.groups is None:
                claims.append((sigmas.ravel(), np.abs(deviations).ravel()))
            errors.setdefault(OURS, []).append(lengths(deviations)[None])
            alone, _, _ = run.networks.centers(frames, patterns.masks, refined=False)
            coarse = lengths(patterns.deviations(alone))
            errors.setdefault(NETWORK_ALONE, []).append(coarse[None])
            if patterns.moved is not None:
                bounds.append(bounding_errors(patterns, dose)[None])
            for factor, shares in within.items():
                shares.append(100 * within_sigma(deviations, sigmas, factor))
        tables += _error_tables(run, patterns, errors, bounds)
        tables.append(
            Table(
                name=f"center.sigma.{patterns.name}",
                title=f"Center, {patterns.title}: components within their sigma, %",
                heading="within",
                columns=tuple(dose_label(dose) for dose in run.doses),
                rows=(
                    ("1 sigma (calibrated: 68.3)", tuple(within[1.0])),
                    ("2 sigma (calibrated: 95.4)", tuple(within[2.0])),
                ),
            )
        )
        if _GOAL_DOSE in run.doses:
            tables.append(_kinds_table(patterns, errors, run.doses.index(_GOAL_DOSE)))
            tables += _parameter_tables(patterns, errors, run.doses.index(_GOAL_DOSE))
    tables += [_calibration_table(claims), _usable_table(run, usable)]
    tables.append(time_table("center", sets, watches, (*(m.name for m in CENTER_METHODS), OURS)))
    return Part(tuple(tables), _checks(run, tables))


def _classical(
    patterns: PatternSet, frames: NDArray[np.float32], watch: Stopwatch
) -> dict[str, Array]:
    """Return each method's distances from the truth, (settings, patterns), in px."""
    counts = frames.astype(np.float64)
    results = {}
    for method in CENTER_METHODS:
        errors = []
        for setting in method.settings:
            with watch.timing(method.name, len(patterns)):
                found = [
                    method.run(frame, radius, *setting)
                    for frame, radius in zip(counts, patterns.radii, strict=True)
                ]
            errors.append(lengths(patterns.deviations(np.array(found))))
        results[method.name] = np.array(errors)
    return results


def _error_tables(
    run: Run, patterns: PatternSet, errors: dict[str, list[Array]], bounds: list[Array]
) -> list[Table]:
    shown = errors | ({BOUND: bounds} if bounds else {})
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


def _calibration_table(claims: list[tuple[Array, Array]]) -> Table:
    """Claimed sigma against what the errors really are, in equally many components each."""
    sigma, error = (np.concatenate(column) for column in zip(*claims, strict=True))
    groups = np.array_split(np.argsort(sigma), _CLAIMS)
    return Table(
        name="center.calibration",
        title="Center, all simulated sets and doses: claimed sigma against true error, px",
        heading=f"components in order of claimed sigma, {_CLAIMS} equal groups",
        columns=tuple(str(i + 1) for i in range(_CLAIMS)),
        rows=(
            ("claimed sigma, median", tuple(float(np.median(sigma[g])) for g in groups)),
            (
                "error that 68.3 % stay below",
                tuple(float(np.quantile(error[g], 0.683)) for g in groups),
            ),
        ),
    )


def _usable_table(run: Run, seen: dict[str, list[float]]) -> Table:
    """How often a frame is said to show a beam, with and without one."""
    empty = patterns_without_beam((128, 128), max(12, run.patterns // 2), seed=run.seed)
    without = []
    for dose in run.doses:
        _, _, beam = run.networks.centers(empty.expose(dose).frames, empty.masks)
        without.append(100 * float((beam >= USABLE).mean()))
    return Table(
        name="center.usable",
        title="Center: frames said to show a usable beam, %",
        heading="frames",
        columns=tuple(dose_label(dose) for dose in run.doses),
        rows=(
            *((title, tuple(shares)) for title, shares in seen.items()),
            (
                "without a beam: even, stray light, beam outside (wanted: 0)",
                tuple(without),
            ),
        ),
    )


def _kinds_table(patterns: PatternSet, errors: dict[str, list[Array]], dose: int) -> Table:
    kinds = tuple(dict.fromkeys(patterns.kinds))
    of = np.array(patterns.kinds)
    rows = []
    for name, of_method in errors.items():
        figures = [float(np.median(of_method[dose][:, of == k], axis=1).min()) for k in kinds]
        rows.append((name, tuple(figures)))
    return Table(
        name=f"center.kinds.{patterns.name}",
        title=f"Center, {patterns.title}: median error by kind at {dose_label(_GOAL_DOSE)}, px",
        heading="method",
        columns=tuple(f"{kind} ({int((of == kind).sum())})" for kind in kinds),
        rows=tuple(rows),
        note="In brackets the number of patterns; best setting for each kind.",
    )


def _parameter_tables(
    patterns: PatternSet, errors: dict[str, list[Array]], dose: int
) -> list[Table]:
    """Error over the beam's radius, the center's place and the distortion, in equal groups."""
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
                        tuple(float(np.median(e[dose][:, g], axis=1).min()) for g in groups),
                    )
                    for method, e in errors.items()
                ),
            )
        )
    return tables


def _checks(run: Run, tables: list[Table]) -> tuple[Check, ...]:
    """Median below every center of mass and below 0.3 px at 10^4 electrons on 128² frames."""
    if _GOAL_DOSE not in run.doses:
        return ()
    column = run.doses.index(_GOAL_DOSE)
    table = next((t for t in tables if t.name == "center.median.128"), None)
    if table is None:
        return ()
    ours = table.row(OURS)[column]
    if ours is None:
        return ()
    where = f"Median center error at {dose_label(_GOAL_DOSE)} on 128² frames"
    checks = [Check(f"{where}: below 0.3 px", ours, 0.3)]
    for name in CENTERS_OF_MASS:
        rival = table.row(name)[column]
        if rival is not None:
            checks.append(Check(f"{where}: below {name}", ours, rival))
    return tuple(checks)
