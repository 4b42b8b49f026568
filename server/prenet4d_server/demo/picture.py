"""The demo's picture: what goes in, what comes out, and what was true."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prenet4d_server.calibrate.unrolled import (
    CMAP,
    beam_radius,
    flatten,
    polar,
    radial_profile,
    ring_radii,
    show_unrolled,
)
from prenet4d_server.demo.score import Array, Score

_FOUND, _SINGLE, _TRUE = "#d1495b", "#9fb3c8", "#222222"


@dataclass(frozen=True)
class Scene:
    """The patterns of one scan, before and after."""

    raw: Array
    """(n, h, w) counts, as they left the detector."""
    aligned: Array
    """(n, h, w) raw counts, recentered and undistorted; NaN where there is no source."""
    corrected: Array
    """(n, h, w) denoised, recentered and undistorted; NaN where there is no source."""
    reference: tuple[float, float]
    """Where the correction puts the center, ``(cy, cx)`` px."""
    subtitle: str


def draw(scene: Scene, score: Score, path: Path) -> None:
    """Write the picture as a PNG.

    Args:
        scene: the patterns.
        score: what was found and what was true.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10.4), facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(scene.subtitle, x=0.012, y=0.99, ha="left", fontsize=13, weight="bold")
    rows: Any = figure.subfigures(3, 1, height_ratios=(1.0, 0.95, 0.95))
    before, after = _mean(scene.raw), _mean(scene.aligned)
    start = _start(score)
    radii = ring_radii(radial_profile(after, scene.reference))
    _patterns(rows[0], scene, score, before, after, start, radii)
    _rings(rows[1], scene, before, after, start, radii)
    _scan(rows[2], scene, score, after, start)
    figure.savefig(path, dpi=84, pil_kwargs={"optimize": True})


def _start(score: Score) -> tuple[float, float]:
    """The best fixed center that a person could set before the scan is corrected."""
    middle = np.median(score.found.tracked, axis=0)
    return float(middle[0]), float(middle[1])


def _mean(patterns: Array) -> Array:
    """Mean over the scan of what was measured, 0 where nothing was: (h, w)."""
    total = np.zeros(patterns.shape[1:])
    count = np.zeros(patterns.shape[1:])
    for block in np.array_split(patterns, max(1, len(patterns) // 256)):
        total += np.nansum(block, axis=0, dtype=np.float64)
        count += np.isfinite(block).sum(axis=0)
    return np.asarray(total / np.maximum(count, 1))


def _show(ax: Any, image: Array, title: str, *, top: float) -> None:
    ax.imshow(
        np.log1p(np.maximum(np.nan_to_num(image), 0)),
        cmap=CMAP,
        vmin=0,
        vmax=math.log1p(top),
        interpolation="nearest",
    )
    ax.set_title(title, fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])


def _patterns(
    figure: Any,
    scene: Scene,
    score: Score,
    before: Array,
    after: Array,
    start: tuple[float, float],
    radii: list[float],
) -> None:
    """One position's pattern, raw and corrected; the scan's mean, raw and corrected."""
    axes = figure.subplots(1, 5)
    figure.subplots_adjust(left=0.012, right=0.988, top=0.86, bottom=0.02, wspace=0.04)
    chosen = example_position(scene, score)
    ny_nx = divmod(chosen, score.truth.scan_shape[1])
    top = float(np.nanpercentile(scene.corrected[chosen], 99.7))
    _show(axes[0], scene.raw[chosen], f"frame at {ny_nx}, as measured", top=top)
    _show(axes[1], scene.aligned[chosen], "aligned: raw counts", top=top)
    _show(axes[2], scene.corrected[chosen], "corrected: aligned and denoised", top=top)
    found = score.found.tracked[chosen]
    axes[0].plot(found[1], found[0], "+", color="cyan", ms=11, mew=1.2)
    middle = ((scene.raw.shape[1] - 1) / 2, (scene.raw.shape[2] - 1) / 2)
    axes[0].axhline(middle[0], color="w", lw=0.4, alpha=0.6)
    axes[0].axvline(middle[1], color="w", lw=0.4, alpha=0.6)
    for ax in axes[1:3]:
        ax.axhline(scene.reference[0], color="w", lw=0.4, alpha=0.6)
        ax.axvline(scene.reference[1], color="w", lw=0.4, alpha=0.6)
    # Scaled so that one count in the brightest tenth of a percent is well inside the logarithm.
    scale = 200 / max(float(np.nanpercentile(after, 99.7)), 1e-9)
    _show(axes[3], before * scale, "mean of the scan: as measured", top=200)
    _show(axes[4], after * scale, "mean of the scan: aligned", top=200)
    for ax, center in ((axes[3], start), (axes[4], scene.reference)):
        _circles(ax, center, radii, before.shape)


def _circles(ax: Any, center: tuple[float, float], radii: list[float], shape: Any) -> None:
    angle = np.linspace(0, 2 * np.pi, 361)
    for radius in radii:
        y, x = center[0] + radius * np.sin(angle), center[1] + radius * np.cos(angle)
        ax.plot(x, y, color="cyan", lw=0.7, alpha=0.9, ls=(0, (4, 3)))
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_ylim(shape[0] - 0.5, -0.5)


def example_position(scene: Scene, score: Score) -> int:
    """The position to show: one of the most structured patterns, well off the reference."""
    away = np.hypot(*(score.found.tracked - np.asarray(scene.reference)).T)
    h, w = scene.raw.shape[1:]
    y, x = np.ogrid[:h, :w]
    r = np.hypot(y - scene.reference[0], x - scene.reference[1])
    outside = np.nansum(scene.corrected[:, r > 0.22 * min(h, w)], axis=1)
    score_of = outside / outside.max() + 0.5 * away / max(float(away.max()), 1e-9)
    return int(np.argmax(score_of))


def _rings(
    figure: Any,
    scene: Scene,
    before: Array,
    after: Array,
    start: tuple[float, float],
    radii: list[float],
) -> None:
    """The mean unrolled around its center, where circles are straight, and its profile."""
    axes = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    figure.subplots_adjust(left=0.038, right=0.988, top=0.88, bottom=0.14, wspace=0.13)
    reference_profile = radial_profile(after, scene.reference)
    r_max = len(reference_profile) / 2
    inner = beam_radius(reference_profile)
    views = [(before, start, "as measured"), (after, scene.reference, "aligned")]
    unrolled = [
        flatten(polar(image, center, r_max), reference_profile) for image, center, _ in views
    ]
    limits = np.nanpercentile(unrolled[1][int(2 * inner) :], (2, 99.5))
    for ax, image, (_, _, name) in zip(axes[:2], unrolled, views, strict=True):
        show_unrolled(ax, image, r_max, limits)
        for radius in radii:
            ax.axhline(radius, color="cyan", lw=0.7, ls=(0, (4, 3)))
        ax.set_title(f"mean unrolled around its center: {name}", fontsize=10)
        ax.set_xlabel("angle [°]", fontsize=9)
        ax.set_ylabel("radius [px]", fontsize=9)
        ax.set_ylim(inner, r_max)
        ax.tick_params(labelsize=8)
    for image, center, color, name in (
        (before, start, _SINGLE, "as measured"),
        (after, scene.reference, _FOUND, "aligned"),
    ):
        profile = radial_profile(image, center)
        axes[2].semilogy(np.arange(len(profile)) / 2, profile, color=color, lw=1.6, label=name)
    axes[2].set_title("mean over the angle", fontsize=10)
    axes[2].set_xlabel("radius [px]", fontsize=9)
    axes[2].legend(fontsize=9, frameon=False)
    axes[2].tick_params(labelsize=8)


def _scan(
    figure: Any,
    scene: Scene,
    score: Score,
    after: Array,
    start: tuple[float, float],
) -> None:
    """Center drift, found and true; virtual images before and after."""
    axes = figure.subplots(1, 8, width_ratios=(1, 1, 1.9, 0.1, 1, 1, 1, 1))
    figure.subplots_adjust(left=0.012, right=0.988, top=0.84, bottom=0.13, wspace=0.1)
    shape = score.truth.scan_shape
    true = score.truth.centers - np.median(score.truth.centers, axis=0)
    found = score.found.tracked - np.median(score.found.tracked, axis=0)
    single = score.found.center - np.median(score.found.center, axis=0)
    span = float(np.percentile(np.abs(true[:, 1]), 99.5)) or 1.0
    for ax, values, name in ((axes[0], true, "true"), (axes[1], found, "found")):
        ax.imshow(values[:, 1].reshape(shape), cmap="RdBu_r", vmin=-span, vmax=span)
        ax.set_title(f"center drift in x, {name}\n±{span:.1f} px", fontsize=10)
    trace = axes[2]
    nx = shape[1]
    lines = slice(len(true) // 2 // nx * nx, len(true) // 2 // nx * nx + 4 * nx)
    frames = np.arange(len(true))[lines]
    trace.plot(frames, single[lines, 1], ".", color=_SINGLE, ms=4, label="each frame alone")
    trace.plot(frames, true[lines, 1], color=_TRUE, lw=2.4, label="true")
    trace.plot(frames, found[lines, 1], color=_FOUND, lw=1.2, label="tracked")
    trace.set_title("the same over four scan lines [px]", fontsize=10)
    trace.set_xlabel("frame", fontsize=9)
    trace.tick_params(labelsize=8)
    trace.legend(
        fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.02)
    )
    shown = np.concatenate([true[lines, 1], found[lines, 1]])
    low, high = float(shown.min()), float(shown.max())
    room = 0.25 * (high - low) + 0.1
    trace.set_ylim(low - 1.6 * room, high + room)
    trace.yaxis.tick_right()
    axes[3].set_axis_off()
    profile = radial_profile(after, scene.reference)
    bright, outer = 1.15 * beam_radius(profile), len(profile) / 2
    for first, name, inside in ((4, "bright field", True), (6, "dark field", False)):
        pair = (
            virtual_image(scene.raw, start, bright, outer, inside=inside),
            virtual_image(scene.corrected, scene.reference, bright, outer, inside=inside),
        )
        for ax, image, when in zip(axes[first : first + 2], pair, ("before", "after"), strict=True):
            low, high = np.percentile(image, (1, 99))
            ax.imshow(image.reshape(shape), cmap="gray", vmin=low, vmax=high)
            ax.set_title(f"virtual {name},\n{when}", fontsize=10)
    for ax in (*axes[:2], *axes[4:]):
        ax.set_xticks([])
        ax.set_yticks([])


def virtual_image(
    patterns: Array, center: tuple[float, float], bright: float, outer: float, *, inside: bool
) -> Array:
    """Sum over a virtual detector fixed at ``center``: (n,).

    Args:
        patterns: (n, h, w); NaN counts as nothing.
        center: ``(cy, cx)`` px.
        bright: radius of the bright-field disk in px.
        outer: outer radius in px of the dark-field ring, which begins at 1.5 × ``bright``.
        inside: bright field, else dark field.
    """
    h, w = patterns.shape[1:]
    y, x = np.ogrid[:h, :w]
    r = np.hypot(y - center[0], x - center[1])
    mask = r <= bright if inside else (r >= 1.5 * bright) & (r <= outer)
    return np.asarray(np.nansum(patterns[:, mask], axis=1, dtype=np.float64))
