"""The calibration's report: the mean pattern before and after, and the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.geometry import Ellipticity
from prenet4d_server.calibrate.find import Found
from prenet4d_server.calibrate.unrolled import (
    CMAP,
    beam_radius,
    flatten,
    polar,
    radial_profile,
    ring_radii,
    show_unrolled,
)
from prenet4d_server.wording import counted

Array = npt.NDArray[Any]

_ELLIPSE, _CIRCLE = "#35d0ff", "#ffffff"
_RINGS = 3


def draw(found: Found, path: Path) -> None:
    """Write the report as a picture.

    Above, the mean of the recentered patterns as measured, with the ellipse that was found, and
    after the ellipse was taken out, with circles. Below, both unrolled around the center, where
    circles are straight lines.

    Args:
        found: the calibration and the mean that it was read from.
        path: the file to write; its suffix names the kind of picture.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    calibration, before = found.calibration, found.mean
    after = undistorted(before, calibration)
    center = calibration.reference_center
    profile = radial_profile(after, center)
    radii = ring_radii(profile, _RINGS) or [0.6 * len(profile) / 2]
    # Both the brightest and what is between the rings well inside the logarithm.
    bright, usual = np.nanpercentile(after, (99.7, 50))
    scale = max(200 / max(float(bright), 1e-9), 2 / max(float(usual), float(bright) / 2000, 1e-9))

    figure = Figure(figsize=(12, 9.0), facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(calibration), x=0.03, y=0.985, ha="left", fontsize=13, weight="bold")
    figure.text(0.03, 0.945, "\n".join(details(calibration)), va="top", fontsize=9.5)
    axes = figure.subplots(2, 2, height_ratios=(1.35, 1))
    figure.subplots_adjust(left=0.06, right=0.97, top=0.855, bottom=0.065, wspace=0.14, hspace=0.24)
    views = (
        (before, calibration.ellipticity, "as measured, the ellipse found; dotted: circles"),
        (after, Ellipticity(), "the ellipse taken out, and circles"),
    )
    for ax, (image, distortion, title) in zip(axes[0], views, strict=True):
        ax.imshow(np.log1p(np.nan_to_num(image * scale).clip(min=0)), cmap=CMAP, vmin=0)
        for radius in radii:
            y, x = Ellipticity().ring(center, radius)
            ax.plot(x, y, color=_CIRCLE, lw=0.7, alpha=0.8, ls=(0, (1, 3)))
            y, x = distortion.ring(center, radius)
            ax.plot(x, y, color=_ELLIPSE, lw=1.0)
        ax.plot(center[1], center[0], "+", color=_ELLIPSE, ms=9)
        ax.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
        ax.set(xlabel="x [px]", ylabel="y [px]")
        ax.set_title(f"mean of the recentered patterns: {title}", fontsize=10)
        ax.tick_params(labelsize=8)
    r_max = len(profile) / 2
    inner = 1.5 * beam_radius(profile)
    unrolled = [flatten(polar(image, center, r_max), profile) for image in (before, after)]
    limits = np.nanpercentile(unrolled[1][int(2 * inner) :], (2, 99.5))
    for ax, image, name in zip(
        axes[1], unrolled, ("as measured", "the ellipse taken out"), strict=True
    ):
        show_unrolled(ax, image, r_max, limits)
        for radius in radii:
            ax.axhline(radius, color=_ELLIPSE, lw=0.8, ls=(0, (4, 3)))
        ax.set(ylim=(inner, r_max), xlabel="angle from +x toward +y [°]", ylabel="radius [px]")
        ax.set_title(f"unrolled around the center: {name}", fontsize=10)
        ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=100)


def undistorted(mean: Array, calibration: Calibration) -> Array:
    """Take the ellipse out of a mean pattern (h, w) that is centered already."""
    import torch

    from prenet4d_engines.resample import resample

    image = torch.from_numpy(np.array(mean, np.float32))
    seen = image.isfinite()
    out = resample(
        image.nan_to_num(0.0)[None, None],
        torch.tensor([calibration.reference_center]),
        calibration.reference_center,
        calibration.ellipticity,
        None if bool(seen.all()) else seen,
    )
    return np.asarray(out[0, 0].numpy())


def headline(calibration: Calibration) -> str:
    """The ellipticity in one line."""
    ratio, theta = f"{calibration.ratio:.5f}", f"{math.degrees(calibration.theta):.2f}°"
    if calibration.ratio_sigma is not None:
        ratio += f" ± {calibration.ratio_sigma:.5f}"
    if calibration.theta_sigma is not None:
        theta += f" ± {math.degrees(calibration.theta_sigma):.2f}°"
    return f"Ellipticity: ratio {ratio}, major axis at {theta} from +x toward +y"


def details(calibration: Calibration) -> list[str]:
    """What else there is to know, line by line."""
    h, w = calibration.frame_shape
    cy, cx = calibration.reference_center
    lines = [
        f"{counted(calibration.patterns, 'pattern')} of {h} × {w} pixels; reference center "
        f"({cy:g}, {cx:g}) px; detector {calibration.detector}",
        f"{calibration.how}; {calibration.date:%Y-%m-%d %H:%M} UTC",
    ]
    if (fit := calibration.descan) is not None:
        kind = "second order" if len(fit.coefficients_y) > 3 else "a plane"
        lines.append(
            f"Descan: the center drifts by {fit.drift:.2f} px over the scan; {kind} leaves "
            f"{fit.residual[0]:.3f} px in y, {fit.residual[1]:.3f} px in x"
        )
    return lines
