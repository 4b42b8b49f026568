"""The scan maps as small images that fill in while the beam moves."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.models import ColumnDataSource, Div, LinearColorMapper
from bokeh.palettes import Viridis256, interp_palette
from bokeh.plotting import figure

from prenet4d_server.page.feed import Feed, Image, MapsView
from prenet4d_server.page.patterns import rounded
from prenet4d_server.page.theme import Theme, blank, image_figure, look


@dataclass(frozen=True)
class Kind:
    """One map on the page."""

    name: str
    title: str
    unit: str
    like: str = ""
    """The map whose color scale it shares."""


SCANNED = (
    Kind("bright_field", "Bright field", "counts"),
    Kind("annular_dark_field", "Dark field", "counts"),
    Kind("sum", "Sum", "counts"),
    Kind("com", "Center of mass", "px"),
    Kind("center_y", "Drift y", "px"),
    Kind("center_x", "Drift x", "px"),
    Kind("center_sigma", "Uncertainty", "px"),
    Kind("flags", "Flags", ""),
)
DESCAN = (
    Kind("fit_y", "Fitted drift y", "px", like="center_y"),
    Kind("rest_y", "Measured − fitted y", "px"),
    Kind("fit_x", "Fitted drift x", "px", like="center_x"),
    Kind("rest_x", "Measured − fitted x", "px"),
)
KINDS = SCANNED + DESCAN
DRIFTS = ("center_y", "center_x", *(kind.name for kind in DESCAN))


class Maps:
    """Small images of the scan: what was measured, and what the descan was fitted as."""

    def __init__(self, theme: Theme) -> None:
        self._view: MapsView | None = None
        self._sources: dict[str, ColumnDataSource] = {}
        self._mappers: dict[str, LinearColorMapper] = {}
        self.captions: dict[str, Div] = {}
        self.figures = {kind.name: self._figure(theme, kind) for kind in KINDS}

    def update(self, feed: Feed) -> None:
        """Show the maps, if they have changed."""
        view = feed.maps
        if view is None or view is self._view:
            return
        self._view = view
        ny, nx = view.header.scan_shape
        for kind in KINDS:
            shown = picture(kind.name, view.images)
            if shown is None:  # another scan's must not stay
                self._sources[kind.name].data = empty(kind.name)
                self.captions[kind.name].text = caption(kind)
                continue
            if kind.name in self._mappers:
                low, high = scale(kind, shown, view.images)
                self._mappers[kind.name].update(low=low, high=high)
                self.captions[kind.name].text = caption(kind, low, high)
                shown = rounded(shown)
            self._sources[kind.name].data = {"image": [shown], "dw": [nx], "dh": [ny]}

    def _figure(self, theme: Theme, kind: Kind) -> figure:
        tooltips = [("row, column", "$y{0}, $x{0}")]
        if kind.name != "com":
            tooltips.append((kind.title, f"@image{{0.00}} {kind.unit}"))
        plot = image_figure(theme, f"map_{kind.name}", tooltips)
        source = self._sources[kind.name] = ColumnDataSource(
            empty(kind.name), name=f"{kind.name}_map"
        )
        where = {"x": -0.5, "y": -0.5, "dw": "dw", "dh": "dh", "source": source}
        if kind.name == "com":
            renderer = plot.image_rgba("image", **where)
        else:
            mapper = LinearColorMapper(
                palette=_palette(theme, kind.name), low=0, high=1, nan_color="rgba(0, 0, 0, 0)"
            )
            self._mappers[kind.name] = mapper
            renderer = plot.image("image", color_mapper=mapper, **where)
        plot.hover.renderers = [renderer]
        plot.x_range.renderers = plot.y_range.renderers = [renderer]
        self.captions[kind.name] = Div(name=f"caption_{kind.name}", text=caption(kind), **look())
        return plot


def _palette(theme: Theme, name: str) -> tuple[str, ...]:
    if name in DRIFTS:
        return tuple(interp_palette(theme.drifting, 255))
    if name == "flags":
        return (theme.grid, theme.warning)
    return tuple(Viridis256)


def empty(name: str) -> dict[str, Any]:
    """The data of a map of which nothing is known."""
    data = blank()
    if name == "com":
        data["image"] = [np.zeros((1, 1), np.uint32)]
    return data


def picture(name: str, images: dict[str, Image]) -> npt.NDArray[Any] | None:
    """What the page shows of a map; ``None`` where there is no such map.

    Centers, measured and fitted, are shown relative to the median of the measured ones, flags as 0
    or 1, and the center of mass as color: its direction as hue, its length as brightness.
    """
    if name == "com":
        if "com_y" not in images:
            return None
        return direction_colors(images["com_y"], images["com_x"])
    if name in DRIFTS:
        what, axis = name.split("_")
        return _drift(what, axis, images)
    if name not in images:
        return None
    values = images[name]
    if name == "flags":
        return np.where(np.isfinite(values), (values > 0).astype(np.float32), np.nan)
    return values


def _drift(what: str, axis: str, images: dict[str, Image]) -> Image | None:
    """The ``center`` as measured, the ``fit``, or the ``rest`` between them."""
    measured = images.get(f"center_{axis}")
    if measured is None or (what != "center" and f"fit_{axis}" not in images):
        return None
    if what == "rest":
        return measured - images[f"fit_{axis}"]
    known = measured[np.isfinite(measured)]
    middle = np.median(known) if known.size else np.float32(0)
    shown: Image = images[f"{what}_{axis}"] - middle
    return shown


def scale(kind: Kind, shown: npt.NDArray[Any], images: dict[str, Image]) -> tuple[float, float]:
    """The values at the ends of the color scale of what is shown: its own, or that of its like."""
    like = picture(kind.like, images) if kind.like else None
    return color_range(kind.name, shown) if like is None else color_range(kind.like, like)


def color_range(name: str, values: npt.NDArray[Any]) -> tuple[float, float]:
    """The values at the ends of a map's color scale: its 2nd and 98th percentile."""
    known = values[np.isfinite(values)]
    if name == "flags" or not known.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(known, (2, 98)))
    if name in DRIFTS:
        most = max(abs(low), abs(high), 1e-3)
        return -most, most
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def caption(kind: Kind, low: float = math.nan, high: float = math.nan) -> str:
    """A map's name and what its colors reach over."""
    reach = ""
    if kind.name == "flags":
        reach = "colored: any flag"
    elif kind.name == "com":
        reach = "hue: direction"
    elif math.isfinite(low):
        known = f"± {short(high)}" if low == -high else f"{short(low)} … {short(high)}"
        reach = f"{known} {kind.unit}"
    return f'<div class="caption"><b>{kind.title}</b> <span>{reach}</span></div>'


def short(value: float) -> str:
    """Three digits, with k and M for thousands and millions."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def direction_colors(y: Image, x: Image) -> npt.NDArray[np.uint32]:
    """A vector field, (ny, nx) each, as RGBA pixels; transparent where it is not known.

    The hue turns with the direction, from red at +x toward +y; brightness grows with the distance
    from the median, up to its 99th percentile.
    """
    known = np.isfinite(y) & np.isfinite(x)
    if not known.any():
        return np.zeros(y.shape, np.uint32)
    dy, dx = (np.where(known, part - np.median(part[known]), 0.0) for part in (y, x))
    length = np.hypot(dy, dx)
    most = max(float(np.percentile(length[known], 99)), 1e-9)
    hue = (np.arctan2(dy, dx) / (2 * np.pi) % 1.0 * 255).astype(np.intp)
    color = _WHEEL[hue] * np.clip(length / most, 0.0, 1.0)[..., None]
    pixels = np.zeros((*y.shape, 4), np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = np.where(known, 255, 0)
    return pixels.view(np.uint32)[..., 0]


_WHEEL = np.array(
    [[255 * part for part in colorsys.hsv_to_rgb(hue / 256, 0.75, 1.0)] for hue in range(256)]
)
