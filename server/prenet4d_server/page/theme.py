"""The page's two looks: dark for the microscope room, light for the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from bokeh.models import DataRange1d, HoverTool, ImportedStyleSheet
from bokeh.plotting import figure

STYLE = "assets/panel.css"
"""What Bokeh's own elements are styled with; its colors come from ``page.css``."""


@dataclass(frozen=True)
class Theme:
    """The colors that Bokeh draws with; those of the page around it are in ``page.css``."""

    name: str
    back: str
    panel: str
    muted: str
    grid: str
    first: str
    second: str
    good: str
    warning: str
    drifting: tuple[str, ...]
    """A palette with a neutral middle."""


DARK: Final = Theme(
    name="dark",
    back="#0d1117",
    panel="#161b22",
    muted="#9aa7b4",
    grid="#2a323c",
    first="#58b7ff",
    second="#ffb454",
    good="#4fd18b",
    warning="#ffb454",
    drifting=("#58b7ff", "#2c6aa0", "#20374c", "#1c232c", "#4c3a22", "#a06a2c", "#ffb454"),
)
LIGHT: Final = Theme(
    name="light",
    back="#eef1f4",
    panel="#ffffff",
    muted="#51606e",
    grid="#dde3e9",
    first="#0b63b5",
    second="#b35900",
    good="#13733f",
    warning="#b35900",
    drifting=("#0b63b5", "#6ca6d9", "#c3dbef", "#f2f4f6", "#f3d9bd", "#d9a066", "#b35900"),
)
THEMES: Final = {theme.name: theme for theme in (DARK, LIGHT)}


def look() -> dict[str, Any]:
    """What every Bokeh element beside the figures is made with: it fills its place on the page."""
    return {
        "stylesheets": [ImportedStyleSheet(url=STYLE)],
        "sizing_mode": "stretch_width",
        "margin": 0,
    }


def blank() -> dict[str, Any]:
    """An image of one pixel that shows nothing: Bokeh wants a figure's ranges from the start."""
    return {"image": [np.full((1, 1), np.nan, np.float32)], "dw": [1], "dh": [1]}


def image_figure(theme: Theme, name: str, tooltips: list[tuple[str, str]]) -> figure:
    """A figure for one image: no axes, square pixels, row 0 on top, pixel centers at integers."""
    plot = figure(
        name=name,
        x_range=DataRange1d(range_padding=0),
        y_range=DataRange1d(range_padding=0, flipped=True),
        match_aspect=True,
        sizing_mode="stretch_both",
        min_width=60,
        min_height=60,
        toolbar_location=None,
        tools="",
        min_border=0,
        background_fill_color=theme.back,
        border_fill_color=theme.back,
        outline_line_color=None,
    )
    plot.axis.visible = False
    plot.grid.visible = False
    plot.add_tools(HoverTool(tooltips=tooltips, mode="mouse", attachment="horizontal"))
    return plot


def axis_look(theme: Theme) -> dict[str, Any]:
    """How the axes of a curve look."""
    return {
        "axis_line_color": theme.grid,
        "major_tick_line_color": theme.grid,
        "minor_tick_line_color": None,
        "major_label_text_color": theme.muted,
        "major_label_text_font_size": "11px",
        "major_label_standoff": 4,
    }
