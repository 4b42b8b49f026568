"""The page as one picture: patterns, maps and the figures that matter, for a logbook."""

from __future__ import annotations

import io
import math
import time

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import (
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    LogNorm,
    Normalize,
)
from matplotlib.figure import Figure, SubFigure

from prenet4d_engines.geometry import Ellipticity
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.maps import DRIFTS, KINDS, picture, plane_colors, scale
from prenet4d_server.page.patterns import RINGS, limits
from prenet4d_server.page.theme import DARK, LIGHT
from prenet4d_server.wording import counted


def snapshot(feed: Feed) -> bytes:
    """Draw what the page shows now; returns a PNG file."""
    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_headline(feed), fontsize=13, parse_math=False)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2.6))[0]
    _draw_patterns(feed, left)
    _draw_maps(feed, right)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _headline(feed: Feed) -> str:
    scan, telemetry = feed.scan, feed.telemetry
    said = [f"prenet4d, {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    if scan is not None:
        said.append(scan.acquisition_id)
    if telemetry is not None:
        now = telemetry.ellipticity
        sigma = "" if now.ratio_sigma is None else f" ± {now.ratio_sigma:.4f}"
        said += [
            telemetry.state,
            f"ellipticity {now.ratio:.4f}{sigma} at {math.degrees(now.theta):.1f}°",
            counted(telemetry.counters.corrected, "frame"),
        ]
    return "   ·   ".join(said)


def _draw_patterns(feed: Feed, target: SubFigure) -> None:
    preview = feed.preview
    axes = target.subplots(2, 1)
    for axis, name in zip(axes, ("raw", "corrected"), strict=True):
        axis.set_axis_off()
        axis.set_title(name if preview is not None else f"{name}: no frame yet", fontsize=11)
        if preview is None:
            continue
        image = getattr(preview, name)
        h, w = (side * preview.binning for side in image.shape)
        low, high = limits(image, "log", (0, 100))
        shown = np.where(image > low, image, low)
        axis.imshow(
            shown, norm=LogNorm(low, high), cmap="inferno", extent=(-0.5, w - 0.5, h - 0.5, -0.5)
        )
        now = preview.ellipticity
        center, distortion, color = (
            (preview.center, Ellipticity(now.ratio, now.theta), DARK.first)
            if name == "raw"
            else (preview.reference_center, Ellipticity(), DARK.good)
        )
        for share in RINGS:
            y, x = distortion.ring(center, share * min(h, w))
            axis.plot(x, y, color=color, linewidth=1)
        axis.plot(*reversed(center), "+", color=color, markersize=10)
        axis.set_xlim(-0.5, w - 0.5)
        axis.set_ylim(h - 0.5, -0.5)


def _draw_maps(feed: Feed, target: SubFigure) -> None:
    view = feed.maps
    axes = target.subplots(3, 4).ravel()
    for axis, kind in zip(axes, KINDS, strict=True):
        axis.set_axis_off()
        axis.set_title(kind.title, fontsize=10)
        shown = picture(kind.name, view.images) if view is not None else None
        if view is None or shown is None:
            continue
        if kind.name == "com":
            drawn = axis.imshow(shown[..., None].view(np.uint8))
            _draw_directions(axis)
        else:
            drawn = axis.imshow(
                shown,
                norm=Normalize(*scale(kind, shown, view.images)),
                cmap=_colors(kind.name),
            )
        if kind.name not in ("com", "flags"):  # a direction as hue; any flag or none
            target.colorbar(drawn, cax=axis.inset_axes((1.04, 0, 0.06, 1)), label=kind.unit)


def _draw_directions(axis: Axes) -> None:
    """The colors of all vectors, beside a map of vectors."""
    y, x = np.mgrid[-1:1:65j, -1:1:65j]
    inside = np.hypot(y, x) <= 1
    colors = np.dstack([plane_colors(y, x), 255 * inside.astype(np.uint8)])
    key = axis.inset_axes((1.04, 0.8, 0.2, 0.2))
    key.imshow(colors)
    key.set_axis_off()


def _colors(name: str) -> Colormap:
    if name in DRIFTS:
        return LinearSegmentedColormap.from_list("drifting", LIGHT.drifting)
    if name == "flags":
        return ListedColormap((LIGHT.grid, LIGHT.warning))
    return colormaps["viridis"]
