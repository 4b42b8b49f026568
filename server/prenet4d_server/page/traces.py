"""The last hour as curves: centers, ellipticity, dose, rate, latency and backlog."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    DataRange1d,
    DatetimeTickFormatter,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from prenet4d_server.page.feed import Feed
from prenet4d_server.page.history import COLUMNS, ROWS, Rows
from prenet4d_server.page.theme import Theme, axis_look

SPAN_MS = ROWS * 1000.0
_LEAST_SPAN_MS = 60_000.0


@dataclass(frozen=True)
class Curve:
    """One value over time, with its sigma where there is one."""

    column: str
    sigma: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    numbers: str = "0,0.[00]"
    from_zero: bool = False


CHARTS = (
    Chart("center_y", "Center y / px", (Curve("center_y", "sigma_y"),)),
    Chart("center_x", "Center x / px", (Curve("center_x", "sigma_x"),)),
    Chart("ratio", "Ellipticity a/b", (Curve("ratio", "ratio_sigma"),), "0.000[0]"),
    Chart("theta", "Angle / °", (Curve("theta", "theta_sigma"),), "0.[0]"),
    Chart("dose", "Dose / electrons", (Curve("dose"),), "0.[0]a", from_zero=True),
    Chart("frames_per_second", "Frames per second", (Curve("frames_per_second"),), "0,0.[0]", True),
    Chart("latency", "Latency p50, p99 / ms", (Curve("p50"), Curve("p99")), "0,0", True),
    Chart("backlog", "Backlog / frames", (Curve("backlog"),), "0,0", True),
)


class Traces:
    """Eight small charts over one source that holds an hour and no more."""

    def __init__(self, theme: Theme) -> None:
        self._count = 0
        self._last = dict.fromkeys(COLUMNS, math.nan)
        self._bands = [
            curve for chart in CHARTS for curve in chart.curves if curve.sigma
        ]  # fmt: skip
        self.source = ColumnDataSource(
            self._columns({name: np.empty(0) for name in COLUMNS}), name="traces"
        )
        self._time = Range1d(0, _LEAST_SPAN_MS)
        self.figures = {chart.name: self._figure(theme, chart) for chart in CHARTS}

    def update(self, feed: Feed) -> None:
        """Append what has come since the last time; forget what is older than an hour."""
        if feed.history.count == self._count:
            return
        rows, self._count = feed.history.after(self._count)
        self.source.stream(self._columns(rows), rollover=ROWS)
        last = local_ms(float(rows["time"][-1]))
        first = max(float(self.source.data["time"][0]), last - SPAN_MS)
        self._time.update(start=min(first, last - _LEAST_SPAN_MS), end=last)

    def _columns(self, rows: Rows) -> Rows:
        columns = dict(rows)
        columns["time"] = local_ms(rows["time"])
        for curve in self._bands:
            value, sigma = self._closed(rows[curve.column], curve.column), rows[curve.sigma]
            sigma = np.nan_to_num(sigma)  # no band where it is not known
            columns[f"{curve.column}_low"] = value - sigma
            columns[f"{curve.column}_high"] = value + sigma
        return columns

    def _closed(self, values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        """Where a silence begins and ends, its neighbour's value: Bokeh fills across NaN."""
        around = np.array([self._last[name], *values, math.nan])
        before, after = around[:-2], around[2:]
        closed = np.where(np.isfinite(values), values, np.where(np.isfinite(after), after, before))
        if len(values):
            self._last[name] = float(values[-1])
        return closed

    def _figure(self, theme: Theme, chart: Chart) -> figure:
        y_range = (
            DataRange1d(start=0, min_interval=4)
            if chart.from_zero
            else DataRange1d(range_padding=0.15)
        )
        if chart.name in ("center_y", "center_x", "ratio", "theta"):
            y_range.min_interval = {"ratio": 0.002, "theta": 2.0}.get(chart.name, 1.0)
        plot = figure(
            name=f"trace_{chart.name}",
            x_range=self._time,
            y_range=y_range,
            sizing_mode="stretch_both",
            min_width=100,
            min_height=60,
            toolbar_location=None,
            tools="",
            min_border=4,
            min_border_left=52,
            min_border_right=12,
            background_fill_color=theme.panel,
            border_fill_color=theme.panel,
            outline_line_color=None,
            lod_threshold=None,
        )
        colors = (theme.first, theme.second)
        lines = []
        for curve, color in zip(chart.curves, colors, strict=False):
            if curve.sigma:
                plot.varea(
                    "time", f"{curve.column}_low", f"{curve.column}_high", source=self.source,
                    fill_color=color, fill_alpha=0.25,
                )  # fmt: skip
            lines.append(
                plot.line("time", curve.column, source=self.source, line_color=color, line_width=2)
            )
        y_range.renderers = lines
        for axis in plot.axis:
            axis.update(**axis_look(theme))
        plot.ygrid.grid_line_color = theme.grid
        plot.xgrid.grid_line_color = None
        plot.xaxis.formatter = DatetimeTickFormatter(
            seconds="%H:%M:%S", minsec="%H:%M:%S", minutes="%H:%M", hourmin="%H:%M", hours="%H:%M"
        )
        plot.xaxis.ticker.desired_num_ticks = 3
        whole = chart.numbers == "0,0"
        plot.yaxis.ticker = BasicTicker(
            desired_num_ticks=3, num_minor_ticks=0, min_interval=1 if whole else 0
        )
        plot.yaxis.formatter = NumeralTickFormatter(format=chart.numbers)
        plot.add_tools(
            HoverTool(
                tooltips=[("time", "@time{%H:%M:%S}")]
                + [(curve.column.replace("_", " "), f"@{curve.column}") for curve in chart.curves],
                formatters={"@time": "datetime"},
                renderers=lines[:1],
                mode="vline",
            )
        )
        return plot


def local_ms(seconds: Any) -> Any:
    """Seconds since the epoch as Bokeh's milliseconds, shifted so that local time is shown."""
    return (seconds + time.localtime().tm_gmtoff) * 1e3
