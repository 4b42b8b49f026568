"""Denoising, against the noisy input and the classical filters, on the same counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.classical import DENOISE_METHODS
from prenet4d_engines.evaluate.datasets import Exposure, PatternSet
from prenet4d_engines.evaluate.hallucination import evaluate_hallucination
from prenet4d_engines.evaluate.metrics import counts_error, squared_error, squared_root_error
from prenet4d_engines.evaluate.pictures import Denoised
from prenet4d_engines.evaluate.report import NOISY, OURS, Check, Part, Table, most_of_the_best
from prenet4d_engines.evaluate.run import Run, Stopwatch, dose_label, time_table
from prenet4d_engines.evaluate.scan_denoise import evaluate_scan_denoising

_PICTURED_DOSE: Final = 1e4

Array = NDArray[np.float64]
Measure = Callable[[Array, Array, NDArray[np.bool_]], float]

_MEASURES: dict[str, tuple[Measure, str]] = {
    "linear": (squared_error, "mean squared error, counts²"),
    "sqrt": (squared_root_error, "mean squared error of √counts, counts"),
}


def evaluate_denoising(run: Run, sets: list[PatternSet]) -> Part:
    """Compare at every dose on every set."""
    tables: list[Table] = []
    watches: dict[str, Stopwatch] = {}
    for number, patterns in enumerate(sets):
        watch = watches[patterns.name] = Stopwatch()
        errors: dict[str, dict[str, list[float]]] = {measure: {} for measure in _MEASURES}
        counts: dict[str, list[float]] = {}
        for step, dose in enumerate(run.doses):
            run.on_progress(
                (number + step / len(run.doses)) / len(sets),
                f"denoising, {patterns.title}, {dose:.0f} electrons",
            )
            for name, results in _at_dose(run, patterns, patterns.expose(dose), watch).items():
                for measure in _MEASURES:
                    # The best setting for each pattern and measure: the oracle's choice.
                    errors[measure].setdefault(name, []).append(
                        float(results[measure].min(0).mean())
                    )
                best = results["linear"].argmin(0)
                kept = results["counts"][best, np.arange(len(patterns))]
                counts.setdefault(name, []).append(100 * float(kept.mean()))
        columns = tuple(dose_label(dose) for dose in run.doses)
        tables += [
            Table(
                name=f"denoise.{measure}.{patterns.name}",
                title=f"Denoising, {patterns.title}: {title}",
                heading="method",
                columns=columns,
                rows=_rows(errors[measure]),
                doses=run.doses,
                note="Classical filters with the best of their settings for each pattern, with"
                " or without a dark frame taken off, chosen on the truth.",
            )
            for measure, (_, title) in _MEASURES.items()
        ]
        tables.append(
            Table(
                name=f"denoise.counts.{patterns.name}",
                title=f"Denoising, {patterns.title}: bias of total counts, mean over patterns, %",
                heading="method",
                columns=columns,
                rows=_rows(counts),
                note="Of the settings that are best in counts².",
            )
        )
    tables.append(time_table("denoise", sets, watches, (*(m.name for m in DENOISE_METHODS), OURS)))
    scans, invented = evaluate_scan_denoising(run), evaluate_hallucination(run)
    return Part(
        (*tables, *scans.tables, *invented.tables),
        (*_checks(tables), *scans.checks, *invented.checks),
        pictures=_pictures(run, sets),
    )


def _pictures(run: Run, sets: list[PatternSet]) -> tuple[Denoised, ...]:
    """Denoise the first pattern of each kind of the first and last set at the goals' dose."""
    pictures = []
    for which in dict.fromkeys((0, len(sets) - 1)):
        chosen = sets[which]
        exposure = chosen.expose(_PICTURED_DOSE)
        firsts = [chosen.kinds.index(kind) for kind in dict.fromkeys(chosen.kinds)]
        denoised = run.networks.denoise(exposure.frames[firsts], chosen.masks[firsts])
        pictures += [
            Denoised(
                f"{chosen.name}: {chosen.kinds[i]}, {dose_label(_PICTURED_DOSE)}",
                exposure.frames[i],
                found,
                exposure.clean[i],
            )
            for i, found in zip(firsts, denoised, strict=True)
        ]
    return tuple(pictures)


def _at_dose(
    run: Run, patterns: PatternSet, exposure: Exposure, watch: Stopwatch
) -> dict[str, dict[str, Array]]:
    """Return per method and measure the errors, (settings, patterns).

    What a camera reads in the dark the network knows from training, and who filters frames of such
    a camera from a dark frame.
    """
    masks = patterns.masks
    dark = [camera.dark for camera in patterns.detectors]
    noisy = exposure.frames.astype(np.float64)
    clean = exposure.clean.astype(np.float64)

    def measured(found: list[list[Array]]) -> dict[str, Array]:
        measures: dict[str, Measure] = {name: m for name, (m, _) in _MEASURES.items()}
        measures["counts"] = counts_error
        return {
            name: np.array(
                [
                    [measure(f, c, m) for f, c, m in zip(of_setting, clean, masks, strict=True)]
                    for of_setting in found
                ]
            )
            for name, measure in measures.items()
        }

    inputs = patterns.without_masks(exposure.frames)
    results = {NOISY: measured([list(noisy)])}
    for method in DENOISE_METHODS:
        if not method.installed:
            continue
        found: list[list[Array]] = []
        for frames, setting in product(inputs, method.settings):
            with watch.timing(method.name, len(patterns)):
                filtered = [method.run(frame, *setting) for frame in frames]
            found.append(filtered)
            if any(dark):
                found.append([np.maximum(f - d, 0.0) for f, d in zip(filtered, dark, strict=True)])
        results[method.name] = measured(found)
    with watch.timing(OURS, len(patterns)):
        ours = run.networks.denoise(exposure.frames, masks).astype(np.float64)
    results[OURS] = measured([list(ours)])
    return results


def _rows(figures: dict[str, list[float]]) -> tuple[tuple[str, tuple[float | None, ...]], ...]:
    return tuple((name, tuple(values)) for name, values in figures.items())


def _checks(tables: list[Table]) -> Iterator[Check]:
    """Half of the best filter's error, and less than the input's, at every dose."""
    for table in tables:
        if not table.name.startswith(tuple(f"denoise.{measure}." for measure in _MEASURES)):
            continue
        filters = [name for name, _ in table.rows if name not in (OURS, NOISY)]
        for rival, names, limit in (("best filter's", filters, 0.5), ("input's", [NOISY], 1.0)):
            goal = f"{table.title}: share of the {rival}, at the worst dose"
            yield Check(goal, most_of_the_best(table, OURS, names), limit)
