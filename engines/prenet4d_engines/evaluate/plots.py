"""Plots of the tables: error against dose, every method in one picture."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path

from prenet4d_engines.evaluate.bound import BOUND
from prenet4d_engines.evaluate.report import OURS, Table

_OUR_COLORS = ("black", "crimson")


def plot_table(table: Table, folder: Path) -> Path:
    """Draw a table's rows against dose on logarithmic axes; return the PNG's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = cycle(_OUR_COLORS)
    for label, values in table.rows:
        points = [(d, v) for d, v in zip(table.doses, values, strict=True) if v is not None]
        if not points:
            continue
        dose, value = zip(*points, strict=True)
        if label.startswith(OURS):
            color = next(colors)
            axes.plot(dose, value, "o-", linewidth=2.6, zorder=3, color=color, label=label)
        elif label == BOUND:
            axes.plot(dose, value, "-", linewidth=1.6, color="gray", label=label)
        else:
            axes.plot(dose, value, ".--", linewidth=1.1, label=label)
    axes.set_xscale("log")
    if all(value > 0 for value in table.known if not math.isnan(value)):
        axes.set_yscale("log")
    axes.set_xlabel("dose (electrons per pattern)")
    axes.set_title(table.title, fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    path = folder / f"{table.name}.png"
    figure.savefig(path, dpi=130)
    return path
