"""What every part of the evaluation is given: how much to do, with which networks, whom to tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from prenet4d_engines.evaluate.datasets import PatternSet
from prenet4d_engines.evaluate.networks import Networks
from prenet4d_engines.evaluate.report import Table

Progress = Callable[[float, str], None]
"""Told the share done (0 to 1) and what is being done."""


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        networks: What is evaluated.
        patterns: Patterns per set and dose at 128² to denoise.
        doses: Electrons per pattern.
        seed: 0 is the standard evaluation.
        sizes: Sides of the square frames.
        scans: Scans per kind of pattern whose mean is read for the ellipse.
        scan_doses: Electrons per pattern of scans.
        scan_shape: Probe positions of the scans that centers are tracked over.
        on_progress: Told how far each part is.
    """

    networks: Networks
    patterns: int
    doses: tuple[float, ...]
    seed: int
    sizes: tuple[int, ...]
    scans: int
    scan_doses: tuple[float, ...]
    scan_shape: tuple[int, int]
    on_progress: Progress


def within(run: Run, start: float, share: float) -> Run:
    """Return the run with its progress told as a part of the whole."""
    tell = run.on_progress
    return replace(run, on_progress=lambda done, what: tell(start + share * done, what))


class Stopwatch:
    """Adds up time and calls per name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._patterns: dict[str, int] = {}

    @contextmanager
    def timing(self, name: str, patterns: int = 1) -> Iterator[None]:
        """Time the block as work on so many patterns."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        self._patterns[name] = self._patterns.get(name, 0) + patterns

    def milliseconds(self, name: str) -> float | None:
        """Return the mean time per pattern in ms, or None if nothing was timed."""
        if not self._patterns.get(name):
            return None
        return 1e3 * self._seconds[name] / self._patterns[name]


def time_table(
    part: str, sets: list[PatternSet], watches: dict[str, Stopwatch], methods: tuple[str, ...]
) -> Table:
    """Return milliseconds per pattern of every method on one core."""
    return Table(
        name=f"{part}.time",
        title=f"{part.capitalize()}: time per pattern on one core, ms",
        heading="method",
        columns=tuple(patterns.title for patterns in sets),
        rows=tuple(
            (name, tuple(watches[patterns.name].milliseconds(name) for patterns in sets))
            for name in methods
        ),
        note="Mean over the settings of a method.",
    )


def dose_label(dose: float) -> str:
    """Write a dose as a table's column label: ``10^3 e``."""
    power = np.log10(dose)
    return f"10^{power:.0f} e" if abs(power - round(power)) < 1e-6 else f"{dose:.3g} e"
