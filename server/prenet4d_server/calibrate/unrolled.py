"""Mean patterns unrolled around their center: circles are straight lines, ellipses waves."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

Array: TypeAlias = npt.NDArray[Any]
CMAP = "inferno"


def polar(image: Array, center: tuple[float, float], r_max: float) -> Array:
    """Unroll an image around a center: (radius from 0 in half px, 360 angles).

    Pixels outside the image are NaN.
    """
    radius = np.arange(0, r_max, 0.5)[:, None]
    angle = np.radians(np.arange(360))[None, :]
    where = [center[0] + radius * np.sin(angle), center[1] + radius * np.cos(angle)]
    return np.asarray(map_coordinates(image, where, order=1, mode="constant", cval=np.nan))


def radial_profile(image: Array, center: tuple[float, float]) -> Array:
    """Mean over the angle around a center, in half-pixel steps from 0 to the nearest edge.

    Around a center at an edge, to a quarter of the smaller side. 0 where there is no pixel.
    """
    h, w = image.shape
    nearest = min(center[0], center[1], h - 1 - center[0], w - 1 - center[1])
    r_max = max(nearest, min(h, w) / 4)
    unrolled = polar(image, center, r_max)
    seen = np.isfinite(unrolled).sum(axis=1)
    return np.asarray(np.nansum(unrolled, axis=1) / np.maximum(seen, 1))


def beam_radius(profile: Array) -> float:
    """Where a radial profile first falls below half of the direct beam's value, in px.

    Where the beam is hidden behind a stop, so that the profile is brightest further out, a
    twentieth of the profile's length.
    """
    inner = max(3, len(profile) // 10)
    if int(np.argmax(profile)) >= inner:
        return float(len(profile) / 40)
    level = profile[: max(3, inner // 4)].mean() / 2
    below = np.flatnonzero(profile < level)
    return float(below[0] / 2) if len(below) else float(len(profile) / 4)


def ring_radii(profile: Array, most: int = 4) -> list[float]:
    """Radii in px of the strongest local maxima of a radial profile outside the direct beam."""
    from scipy.signal import find_peaks

    counts = np.maximum(profile, 0)  # a background may lie below zero, where log1p ends
    smooth = np.convolve(np.log1p(counts), np.ones(5) / 5, mode="same")
    first = int(2.6 * beam_radius(profile))
    peaks, properties = find_peaks(smooth[:-6], prominence=0.02)
    strength = {int(p): s for p, s in zip(peaks, properties["prominences"], strict=True)}
    outside = sorted((p for p in strength if p > first), key=lambda p: -strength[p])
    return sorted(p / 2 for p in outside[:most])


def flatten(unrolled: Array, profile: Array) -> Array:
    """Show faint rings as well: an unrolled pattern's logarithm without its smooth fall-off.

    Args:
        unrolled: (radius, angle), as :func:`polar` makes it.
        profile: as :func:`radial_profile` makes it, not shorter; the same for all the patterns that
            are to be compared.
    """
    floor = profile.max() * 1e-5 + 1e-12
    level = np.log(np.maximum(profile[: len(unrolled)], floor))
    r = np.arange(len(level))
    outside = r > 2 * beam_radius(profile)
    fall_off = np.polynomial.Polynomial.fit(r[outside], level[outside], 3)
    return np.asarray(np.log(np.maximum(unrolled, floor)) - fall_off(r)[:, None])


def show_unrolled(ax: Any, image: Array, r_max: float, limits: Array) -> None:
    """Show an unrolled pattern, angles in degrees across and radii in px up to ``r_max`` upward."""
    extent, (least, most) = (0, 360, 0, r_max), limits
    ax.imshow(image, aspect="auto", origin="lower", cmap=CMAP, extent=extent, vmin=least, vmax=most)
