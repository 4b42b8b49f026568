"""What an evaluation hands over: tables, goals met or missed, and how it was done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from prenet4d_engines.evaluate.pictures import Denoised, draw_denoised

OURS: Final = "prenet4d"
"""Row labels that begin with this are ours."""
NOISY: Final = "noisy input"
"""Row label of the frames as they were counted."""


@dataclass(frozen=True)
class Table:
    """One table: a row per method, a column per dose (or per kind of pattern).

    Attributes:
        name: Short unique name, e.g. ``center.median.128``.
        title: What stands in it, with the unit.
        heading: What the row labels are, e.g. ``method``.
        columns: Column labels.
        rows: (label, one value per column); None where there is nothing to say.
        doses: The columns' doses in electrons per pattern; empty if columns are something else.
        note: What one must know to read it.
    """

    name: str
    title: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    doses: tuple[float, ...] = ()
    note: str = ""

    @property
    def known(self) -> list[float]:
        """All figures that stand in it."""
        return [value for _, values in self.rows for value in values if value is not None]

    def row(self, label: str) -> tuple[float | None, ...]:
        """Return the values of the row with that label.

        Raises:
            KeyError: There is no such row.
        """
        for name, values in self.rows:
            if name == label:
                return values
        raise KeyError(label)


@dataclass(frozen=True)
class Check:
    """One goal and whether it is met.

    Attributes:
        goal: The goal as a sentence.
        value: The figure reached.
        limit: It must be below this.
    """

    goal: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure is below the limit; a figure that is not a number is not."""
        return self.value < self.limit


def largest(figures: Iterable[float | None]) -> float:
    """Return the largest of figures that are known; NaN where one of them is, or none is known.

    `max` keeps or drops a NaN by its place, so that what is no figure could meet a goal.
    """
    known = [each for each in figures if each is not None]
    return float(np.max(known)) if known else math.nan


def most_of_the_best(table: Table, ours: str, rivals: Iterable[str]) -> float:
    """Return the largest share, over the columns, of our figure in the lowest of the rivals'.

    NaN where there is nothing to compare, or where ours is no number; a rival's that is none is
    not the lowest.
    """
    rows = [table.row(name) for name in rivals]
    shares = []
    for value, *others in zip(table.row(ours), *rows, strict=True):
        known = [each for each in others if each is not None and not math.isnan(each)]
        if value is not None and known:
            shares.append(value / min(known))
    return largest(shares)


@dataclass(frozen=True)
class Part:
    """What one part of the evaluation (denoise, center, …) found.

    Attributes:
        tables: Its tables.
        checks: Its goals.
        pictures: Patterns before and after, to look at.
    """

    tables: tuple[Table, ...] = ()
    checks: tuple[Check, ...] = ()
    pictures: tuple[Denoised, ...] = ()


@dataclass(frozen=True)
class Report:
    """The result of `prenet4d_engines.evaluate.evaluate`.

    Attributes:
        parts: By name: denoise, center, ellipse, tracking, strain.
        missing: Methods that could not be compared with, each with the package to install.
        sources: The source of every classical method that these parts compare with.
        about: Seed, patterns, versions, processor, backend, duration.
    """

    parts: dict[str, Part]
    missing: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    about: dict[str, str | int | float] = field(default_factory=dict)

    @property
    def checks(self) -> tuple[Check, ...]:
        """All goals of all parts."""
        return tuple(check for part in self.parts.values() for check in part.checks)

    @property
    def passed(self) -> bool:
        """Whether every goal is met."""
        return all(check.passed for check in self.checks)

    def tables(self) -> list[Table]:
        """Return all tables in order."""
        return [table for part in self.parts.values() for table in part.tables]

    def table(self, name: str) -> Table:
        """Return one table by its name.

        Raises:
            KeyError: There is no such table.
        """
        for table in self.tables():
            if table.name == name:
                return table
        raise KeyError(name)

    def to_json(self) -> str:
        """Return everything as JSON text; figures that are not numbers become null."""
        content: dict[str, Any] = {
            "about": self.about,
            "passed": self.passed,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "missing": list(self.missing),
            "tables": [asdict(table) for table in self.tables()],
            "sources": self.sources,
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)

    def plots(self, folder: str | Path) -> list[Path]:
        """Write pictures into a folder and return their paths.

        One for each table over dose that says anything, and one with denoised patterns and their
        residuals.
        """
        from prenet4d_engines.evaluate.plots import plot_table

        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        paths = [plot_table(table, into) for table in self.tables() if table.doses and table.known]
        pictures = [picture for part in self.parts.values() for picture in part.pictures]
        if pictures:
            paths.append(into / "denoised.png")
            draw_denoised(pictures, paths[-1])
        return paths


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
