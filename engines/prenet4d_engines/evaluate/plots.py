"""Plots of the tables: error against dose, every method in one picture."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from textwrap import fill

from prenet4d_engines.evaluate.bound import BOUND
from prenet4d_engines.evaluate.report import OURS, Table

_OURS = (("black", 3.4), ("crimson", 1.5))
"""Color and width: the first row of ours stands out, and the second does not hide it."""
_RIVALS = tuple(f"C{i}" for i in range(10) if i not in (3, 7))
"""matplotlib's colors but for red, which is ours, and gray, which is the bound's."""


def plot_table(table: Table, folder: Path) -> Path:
    """Draw a table's rows against dose on logarithmic axes; return the PNG's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ours, rivals = cycle(_OURS), cycle(_RIVALS)
    for label, values in table.rows:
        points = [(d, v) for d, v in zip(table.doses, values, strict=True) if v is not None]
        if not points:
            continue
        dose, value = zip(*points, strict=True)
        if label.startswith(OURS):
            color, width = next(ours)
            axes.plot(dose, value, "o-", color=color, linewidth=width, zorder=3, label=label)
        elif label == BOUND:
            axes.plot(dose, value, "-", linewidth=1.6, color="gray", label=label)
        else:
            axes.plot(dose, value, ".--", linewidth=1.1, color=next(rivals), label=label)
    axes.set_xscale("log")
    if all(value > 0 for value in table.known if not math.isnan(value)):
        axes.set_yscale("log")
    axes.set_xlabel("dose (electrons per pattern)")
    axes.set_ylabel(fill(table.title.rpartition(": ")[2], 50))
    axes.set_title(fill(table.title, 80), fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    path = folder / f"{table.name}.png"
    figure.savefig(path, dpi=130)
    return path
