"""The latest frame as it came and as it was corrected, side by side, with what was found in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.models import (
    ColumnDataSource,
    Div,
    LinearColorMapper,
    LogColorMapper,
    PointDrawTool,
    RadioButtonGroup,
    RangeSlider,
    Select,
)
from bokeh.palettes import Cividis256, Greys256, Inferno256, Turbo256, Viridis256
from bokeh.plotting import figure

from prenet4d_client.messages import DetectorRadii
from prenet4d_client.wire import Message
from prenet4d_engines.geometry import Ellipticity
from prenet4d_server.page import words
from prenet4d_server.page.feed import Feed, Image
from prenet4d_server.page.theme import DARK, Theme, blank, image_figure, look

PALETTES = {
    "Inferno": Inferno256,
    "Viridis": Viridis256,
    "Cividis": Cividis256,
    "Gray": tuple(reversed(Greys256)) if Greys256[0] != "#000000" else Greys256,
    "Turbo": Turbo256,
}
SCALES = ("log", "linear")
RINGS = (0.15, 0.30, 0.45)
"""Radii of the circles in the patterns, as shares of the frame's smaller side."""
_MANTISSA_BITS = 8
"""Of the values that go to the browser: 0.4 %, finer than 256 colors; the rest compresses well."""
_HANDLE_ANGLES = np.radians([-20.0, -65.0, -110.0])
RadiiSetter = Callable[[float, float, float], None]


class Patterns:
    """Two images under one color scale.

    Args:
        theme: the colors.
        set_radii: takes the virtual detectors' radii that the operator has drawn, in pixels;
            ``None`` where this session may only look.
    """

    def __init__(self, theme: Theme, set_radii: RadiiSetter | None) -> None:
        self._set_radii = set_radii
        self._shown: Message | None = None
        self._drawn: tuple[DetectorRadii, tuple[float, float]] | None = None
        self._middle = (0.0, 0.0)
        """Where the detectors are drawn: y, x."""
        self._moving = False
        self.scale = RadioButtonGroup(name="scale", labels=list(SCALES), active=0, **look())
        self.palette = Select(name="palette", value="Inferno", options=list(PALETTES), **look())
        self.contrast = RangeSlider(
            name="contrast", start=0, end=100, step=0.5, value=(0, 100), show_value=False,
            title="Contrast", **look(),
        )  # fmt: skip
        for control in (self.scale, self.palette, self.contrast):
            prop = "active" if control is self.scale else "value"
            control.on_change(prop, lambda _attr, _old, _new: self._color())
        self.told = Div(name="told", text=words.telling(None), **look())
        self._sources = {
            side: ColumnDataSource(blank(), name=f"{side}_image") for side in ("raw", "corrected")
        }
        self._overlay = {
            side: ColumnDataSource({"xs": [], "ys": []}) for side in ("raw", "corrected")
        }
        self._marks = {side: ColumnDataSource({"x": [], "y": []}) for side in ("raw", "corrected")}
        self._glyphs: dict[str, Any] = {}
        self.raw, self.corrected = (self._figure(theme, side) for side in ("raw", "corrected"))
        self._rings = ColumnDataSource({"x": [], "y": [], "radius": [], "color": []})
        self._handles = ColumnDataSource({"x": [], "y": [], "color": []}, name="radii")
        self._add_detectors(theme)
        self._color()

    def update(self, feed: Feed) -> None:
        """Show the latest frame, if it is another one."""
        if feed.preview is not self._shown and feed.preview is not None:
            self._show(feed.preview)
        header = feed.maps.header if feed.maps else None
        if header is not None and header.detectors is not None and self._shown is not None:
            self._show_detectors(header.detectors, self._shown.reference_center)

    def _figure(self, theme: Theme, side: str) -> figure:
        tooltips = [("y, x", "$y{0}, $x{0}"), ("counts", "@image{0.00}")]
        plot = image_figure(theme, side, tooltips)
        # The glyph's mapper is replaced by _color(); the page has two of them at any time.
        renderer = plot.image(
            "image", x=-0.5, y=-0.5, dw="dw", dh="dh", source=self._sources[side],
            color_mapper=LinearColorMapper(palette="Inferno256"),
        )  # fmt: skip
        plot.hover.renderers = [renderer]
        plot.x_range.renderers = plot.y_range.renderers = [renderer]
        self._glyphs[side] = renderer.glyph
        # Patterns are dark on a page of either look, and so what lies on them is bright.
        color = DARK.first if side == "raw" else DARK.good
        plot.multi_line(
            "xs", "ys", source=self._overlay[side], line_color=color, line_width=2,
            line_dash="solid" if side == "raw" else "dashed", line_alpha=0.9,
        )  # fmt: skip
        plot.scatter(
            "x", "y", source=self._marks[side], marker="cross", size=18, line_color=color,
            line_width=2,
        )  # fmt: skip
        return plot

    def _add_detectors(self, theme: Theme) -> None:
        self._ring_colors = [DARK.second, DARK.first, DARK.first]
        self.corrected.circle(
            "x", "y", radius="radius", source=self._rings, fill_alpha=0, line_color="color",
            line_width=1.5,
        )  # fmt: skip
        if self._set_radii is None:
            return
        handles = self.corrected.scatter(
            "x", "y", source=self._handles, size=13, fill_color="color", line_color=theme.panel,
            line_width=2,
        )  # fmt: skip
        tool = PointDrawTool(renderers=[handles], add=False)
        self.corrected.add_tools(tool)
        self.corrected.toolbar.active_tap = tool
        self._handles.on_change("data", lambda _attr, _old, _new: self._dragged())

    def _show(self, preview: Message) -> None:
        self._shown = preview
        h, w = (side * preview.binning for side in preview.raw.shape)
        for side, image in (("raw", preview.raw), ("corrected", preview.corrected)):
            self._sources[side].data = {"image": [rounded(image)], "dw": [w], "dh": [h]}
        self._color()
        self.told.text = words.telling(preview)
        now = preview.ellipticity
        for side, center, distortion in (
            ("raw", preview.center, Ellipticity(now.ratio, now.theta)),
            ("corrected", preview.reference_center, Ellipticity()),
        ):
            rings = [distortion.ring(center, share * min(h, w)) for share in RINGS]
            self._overlay[side].data = {
                "xs": [ring[1] for ring in rings], "ys": [ring[0] for ring in rings]
            }  # fmt: skip
            self._marks[side].data = {"x": [center[1]], "y": [center[0]]}

    def _color(self) -> None:
        """Map counts to colors as the controls say."""
        scale = SCALES[self.scale.active or 0]
        palette = PALETTES[self.palette.value]
        for side, glyph in self._glyphs.items():
            images = self._sources[side].data["image"]
            image = images[0] if len(images) else np.zeros((1, 1), np.float32)
            low, high = limits(image, scale, self.contrast.value)
            kind = LogColorMapper if scale == "log" else LinearColorMapper
            mapper = glyph.color_mapper
            if type(mapper) is kind:
                mapper.update(low=low, high=high, palette=palette)
            else:
                glyph.color_mapper = kind(
                    low=low, high=high, palette=palette, nan_color="rgba(0, 0, 0, 0)"
                )

    def _show_detectors(self, radii: DetectorRadii, center: tuple[float, float]) -> None:
        if (radii, center) == self._drawn:
            return
        self._drawn, self._middle = (radii, center), center
        sizes = [radii.bright_field_radius, radii.annular_inner, radii.annular_outer]
        y, x = center
        self._rings.data = {
            "x": [x] * 3, "y": [y] * 3, "radius": sizes, "color": self._ring_colors
        }  # fmt: skip
        self._moving = True
        self._handles.data = {
            "x": (x + np.array(sizes) * np.cos(_HANDLE_ANGLES)).tolist(),
            "y": (y + np.array(sizes) * np.sin(_HANDLE_ANGLES)).tolist(),
            "color": self._ring_colors,
        }
        self._moving = False

    def _dragged(self) -> None:
        """The operator has moved a handle: the nearest sensible radii are asked for."""
        if self._moving or self._set_radii is None:
            return
        y, x = self._middle
        moved = self._handles.data
        if len(moved["x"]) != 3 or len(moved["y"]) != 3:
            return
        disk, inner, outer = (
            float(math.hypot(hx - x, hy - y)) for hx, hy in zip(moved["x"], moved["y"], strict=True)
        )
        self._drawn = None  # so that the answer moves the handles back onto their line
        self._set_radii(max(disk, 0.5), min(inner, outer - 0.5), max(outer, inner + 0.5))


def limits(
    image: npt.NDArray[Any], scale: str, contrast: tuple[float, float]
) -> tuple[float, float]:
    """The counts at the ends of the color scale; ``contrast`` cuts off percent of it on each side.

    The whole scale reaches from the least (with ``log``: the least above zero, but no less than
    1e-4 of the greatest) to the 99.9th percentile.
    """
    values = image[np.isfinite(image)]
    if scale == "log":
        values = values[values > 0]
    if not values.size:
        return (0.1, 1.0) if scale == "log" else (0.0, 1.0)
    top = float(np.percentile(values, 99.9))
    low, high = (share / 100 for share in contrast)
    if scale == "log":
        bottom = max(float(values.min()) / 2, top * 1e-4)
        span = math.log(max(top / bottom, 1.01))
        return bottom * math.exp(low * span), bottom * math.exp(max(high, low + 0.01) * span)
    bottom = min(0.0, float(values.min()))
    span = max(top - bottom, 1e-6)
    return bottom + low * span, bottom + max(high, low + 0.01) * span


def rounded(image: Image) -> Image:
    """The image with short mantissas, which the link's compression makes little of."""
    drop = 23 - _MANTISSA_BITS
    bits = np.ascontiguousarray(image, np.float32).view(np.uint32) + np.uint32(1 << (drop - 1))
    short: Image = (bits & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)
    return np.where(np.isfinite(image), short, np.nan).astype(np.float32)
