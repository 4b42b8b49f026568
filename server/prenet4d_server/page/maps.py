"""The scan maps as small images that fill in while the beam moves."""

from __future__ import annotations

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
    or 1, and the center of mass as colors of its direction and length.
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
        reach = "".join(_chip(arrow, *vector) for arrow, vector in _ARROWS.items())
    elif math.isfinite(low):
        known = f"± {short(high)}" if low == -high else f"{short(low)} … {short(high)}"
        reach = f"{known} {kind.unit}"
    return f'<div class="caption"><b>{kind.title}</b> <span>{reach}</span></div>'


def _chip(arrow: str, y: float, x: float) -> str:
    """An arrow on the color of its direction."""
    red, green, blue = plane_colors(np.array(y), np.array(x)).tolist()
    return f'<i style="background: rgb({red}, {green}, {blue})">{arrow}</i>'


def short(value: float) -> str:
    """Three digits, with k and M for thousands and millions."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def direction_colors(y: Image, x: Image) -> npt.NDArray[np.uint32]:
    """A vector field, (ny, nx) each, as RGBA pixels; transparent where it is not known.

    Gray is the median; from there, each vector's color lies in its own direction and as far as the
    vector is long, up to the 99th percentile of their lengths.
    """
    known = np.isfinite(y) & np.isfinite(x)
    if not known.any():
        return np.zeros(y.shape, np.uint32)
    dy, dx = (np.where(known, part - np.median(part[known]), 0.0) for part in (y, x))
    length = np.hypot(dy, dx)
    most = max(float(np.percentile(length[known], 99)), 1e-9)
    scale = 1 / np.maximum(length, most)
    pixels = np.zeros((*y.shape, 4), np.uint8)
    pixels[..., :3] = plane_colors(dy * scale, dx * scale)
    pixels[..., 3] = np.where(known, 255, 0)
    return pixels.view(np.uint32)[..., 0]


def plane_colors(y: npt.NDArray[Any], x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Colors (..., 3), sRGB, of vectors within the unit disk.

    They lie on a plane through OKLab, so that vectors that are equally far apart look equally
    different: yellow to the right, blue to the left, a light green upward, a dark red downward. Who
    does not tell red from green tells yellow from blue, and light from dark.
    """
    lab = _GRAY + y[..., None] * _DOWN + x[..., None] * _RIGHT
    linear = np.clip((lab @ _TO_CONES.T) ** 3 @ _TO_RGB.T, 0.0, 1.0)
    srgb = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )
    colors: npt.NDArray[np.uint8] = np.round(255 * srgb).astype(np.uint8)
    return colors


# The largest such disk all of which a screen can show. Downward, half of the difference is one of
# lightness, which counts half as much as OKLab's other two coordinates.
_GRAY = np.array((0.67, 0.0, 0.0))
_RIGHT = 0.13 * np.array((0.0, 0.0, 1.0))
_DOWN = 0.13 * np.array((-(2**0.5), 0.5**0.5, 0.0))
# https://bottosson.github.io/posts/oklab
_TO_CONES = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
_ARROWS = {"→": (0.0, 1.0), "↓": (1.0, 0.0), "←": (0.0, -1.0), "↑": (-1.0, 0.0)}
"""Arrow → ``(y, x)``, rows counted downward."""
