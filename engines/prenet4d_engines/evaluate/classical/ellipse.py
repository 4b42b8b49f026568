"""Classical ways to read the elliptical distortion off a mean pattern.

Each takes the mean (h, w), its weights (0 where nothing was measured), the *true* center
(cy, cx), the direct beam's radius in pixels, then the method's own parameters, and returns the
distortion as ``ln(ratio) (cos 2 theta, sin 2 theta)``: the vector has no seam at the circle.
Conventions are prenet4d's: theta from +x toward +y, of the major axis; the frame shows at
``c + D u`` what an undistorted camera shows at ``u``, and D preserves areas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, map_coordinates
from scipy.optimize import least_squares, minimize
from scipy.signal import find_peaks

from prenet4d_engines.evaluate.classical.method import Method
from prenet4d_engines.evaluate.classical.py4dstem import PYTHON_VARIABLE, fit_by_py4dstem

Array = NDArray[np.float64]
Center = tuple[float, float]
FitEllipse = Callable[..., Array]
"""``fit(mean, weights, center, radius, *setting) -> (2,)``."""

_STEP = 0.25
"""Radial step of the polar map in pixels."""
_SECTORS = 180
_LARGEST = 0.18
"""Largest ln(ratio) that is looked for."""


def _coordinates(shape: tuple[int, ...], center: Center) -> tuple[Array, Array]:
    y = np.arange(shape[0], dtype=np.float64)[:, None] - center[0]
    x = np.arange(shape[1], dtype=np.float64)[None, :] - center[1]
    return np.broadcast_to(y, shape), np.broadcast_to(x, shape)


def _undistorted_radius(y: Array, x: Array, vector: Array) -> Array:
    """Return ``|D^-1 u|`` of the points u = (y, x) under the distortion ``vector``."""
    size = float(np.hypot(*vector))
    if size < 1e-12:
        return np.asarray(np.hypot(y, x), np.float64)
    # D^-2 = cosh(s) 1 - sinh(s) (reflection along theta), with s = ln(ratio).
    c, s = np.sinh(size) * vector / size
    square = np.cosh(size) * (x * x + y * y) - c * (x * x - y * y) - 2 * s * x * y
    return np.asarray(np.sqrt(np.maximum(square, 0.0)), np.float64)


def _vector(matrix: Array) -> Array:
    """Return the distortion whose circles satisfy ``(x, y) matrix (x, y)^T = const``."""
    values, axes = np.linalg.eigh(matrix)  # ascending: the first belongs to the major axis
    if values[0] <= 0:
        return np.zeros(2)
    theta = float(np.arctan2(axes[1, 0], axes[0, 0]))
    size = 0.5 * float(np.log(values[1] / values[0]))
    return np.asarray(size * np.array([np.cos(2 * theta), np.sin(2 * theta)]))


def radial_profile(mean: Array, weights: Array, center: Center) -> Array:
    """Return the mean over azimuth at radii 0, 1, 2, … px; 0 where nothing was measured."""
    r = np.hypot(*_coordinates(mean.shape, center))
    low = np.floor(r).astype(np.int64).ravel()
    part = r.ravel() - low
    w = weights.ravel()
    total = np.zeros(low.max() + 2)
    norm = np.zeros(low.max() + 2)
    for index, share in ((low, 1 - part), (low + 1, part)):
        total += np.bincount(index, share * w * mean.ravel(), len(total))
        norm += np.bincount(index, share * w, len(total))
    return np.asarray(np.where(norm > 0, total / np.maximum(norm, 1e-12), 0.0))


def ring_radius(mean: Array, weights: Array, center: Center, radius: float, rank: int) -> float:
    """Return the radius in px of the ring that stands out most, second most, … (rank 0, 1, …).

    Rings are peaks of the square root of the radial profile, by prominence, outside the direct
    beam. 0.0 where there are not as many.
    """
    radial = radial_profile(mean, weights, center)
    profile = gaussian_filter1d(np.sqrt(np.maximum(radial, 0.0)), 1.0)
    reach = int(min(min(mean.shape) * 0.48, len(profile) - 1))
    start = int(max(1.5 * radius, 4))
    peaks, found = find_peaks(profile[:reach], prominence=0)
    prominence = np.where(peaks > start, found["prominences"], 0.0)
    order = np.argsort(prominence)[::-1]
    if rank >= len(order) or prominence[order[rank]] <= 0:
        return 0.0
    return float(peaks[order[rank]])


def ring_fit(mean: Array, weights: Array, center: Center, radius: float, rank: float) -> Array:
    """Fit an elliptical ring: a two-sided Gaussian on a linear background.

    As py4DSTEM's ``fit_ellipse_amorphous_ring`` (B. Savitzky et al., Microsc. Microanal. 27
    (2021) 712), with the ring's radius found in the radial profile and the center given.
    """
    at = ring_radius(mean, weights, center, radius, int(rank))
    if at == 0.0:
        return np.zeros(2)
    y, x = _coordinates(mean.shape, center)
    r = np.hypot(y, x)
    chosen = (r > 0.8 * at) & (r < 1.25 * at) & (weights > 0)
    y, x, values = y[chosen], x[chosen], mean[chosen]
    scale = max(float(values.max() - values.min()), 1e-12)
    values = (values - float(values.min())) / scale

    def model(p: Array) -> Array:
        distance = _undistorted_radius(y, x, p[:2]) - p[2]
        width = np.where(distance < 0, p[3], p[4])
        return np.asarray(
            p[5] * np.exp(-0.5 * (distance / width) ** 2) + p[6] + p[7] * distance / at
        )

    width = max(0.05 * at, 1.0)
    start = np.array([0.0, 0.0, at, width, width, 0.7, 0.1, 0.0])
    low = [-_LARGEST, -_LARGEST, 0.8 * at, 0.3, 0.3, 0.0, -np.inf, -np.inf]
    high = [_LARGEST, _LARGEST, 1.25 * at, at, at, np.inf, np.inf, np.inf]
    fitted = least_squares(
        lambda p: model(p) - values,
        start,
        bounds=(low, high),
        x_scale=np.abs(start) + 0.1,
        max_nfev=60,
    )
    return np.asarray(fitted.x[:2], np.float64)


def edge_fit(mean: Array, weights: Array, center: Center, radius: float, rank: float) -> Array:
    """Fit an ellipse by least squares to positions found along rays from the center.

    Along each ray either the steepest fall near the direct beam's radius (rank -1: the disk's
    edge) or the maximum near a ring's (rank 0, 1, …), refined by a parabola; then the central
    conic through them, algebraic least squares weighted by the feature's strength, once more
    without the worst tenth.
    """
    disk = rank < 0
    at = radius if disk else ring_radius(mean, weights, center, radius, int(rank))
    if at < 1.0:
        return np.zeros(2)
    phi = np.arange(_SECTORS) * (2 * np.pi / _SECTORS)
    r = np.arange(0.7 * at, 1.35 * at + 4 * _STEP, _STEP)
    y = center[0] + np.sin(phi)[:, None] * r
    x = center[1] + np.cos(phi)[:, None] * r
    polar = map_coordinates(mean, [y, x], order=3, mode="nearest")
    seen = map_coordinates(weights, [y, x], order=1, mode="constant") > 0.5
    smooth = max(1.0, 0.03 * at) / _STEP
    signal = (
        -gaussian_filter1d(polar, smooth, axis=1, order=1)
        if disk
        else gaussian_filter1d(polar, smooth, axis=1)
    )
    peak = np.clip(signal.argmax(1), 1, len(r) - 2)
    rows = np.arange(_SECTORS)
    before, top, after = (signal[rows, peak + i] for i in (-1, 0, 1))
    curvature = before - 2 * top + after
    inside = (curvature < 0) & seen.all(1) & (top >= before) & (top >= after)
    offset = np.where(inside, 0.5 * (before - after) / np.where(curvature < 0, curvature, -1.0), 0)
    found = r[peak] + offset * _STEP
    strength = np.where(inside, np.maximum(top - np.median(signal, axis=1), 0.0), 0.0)
    for _ in range(2):
        if np.count_nonzero(strength) < 12:
            return np.zeros(2)
        px, py = found * np.cos(phi) / at, found * np.sin(phi) / at
        design = np.stack([px * px, 2 * px * py, py * py], 1)
        weight = np.sqrt(strength)
        a, b, c = np.linalg.lstsq(design * weight[:, None], weight, rcond=None)[0]
        residual = np.abs(design @ np.array([a, b, c]) - 1)
        strength = np.where(residual > np.quantile(residual[strength > 0], 0.9), 0.0, strength)
    return _vector(np.array([[a, b], [b, c]]))


def uniformity_fit(mean: Array, weights: Array, center: Center, radius: float) -> Array:
    """Find the distortion under which intensity depends most on the radius alone.

    Minimises the variance of the square root of the intensity within rings one pixel wide,
    outside the direct beam: what an operator does who turns the stigmator until rings are round.
    Ratios beyond about 1.2 are not looked for.
    """
    y, x = _coordinates(mean.shape, center)
    r = np.hypot(y, x)
    chosen = (weights > 0) & (r > 1.3 * radius + 2) & (r < 0.48 * min(mean.shape))
    if not chosen.any():
        return np.zeros(2)
    y, x = y[chosen], x[chosen]
    values = np.sqrt(np.maximum(mean[chosen], 0.0))
    power = float((values * values).sum())

    def unevenness(vector: Array) -> float:
        r = _undistorted_radius(y, x, vector)
        low = r.astype(np.int64)
        part = r - low
        n = int(low.max()) + 2
        norm = np.bincount(low, 1 - part, n) + np.bincount(low + 1, part, n)
        total = np.bincount(low, (1 - part) * values, n) + np.bincount(low + 1, part * values, n)
        profile = total / np.maximum(norm, 1e-9)
        modelled = profile[low] * (1 - part) + profile[low + 1] * part
        excess = max(0.0, float(np.hypot(*vector)) - _LARGEST)
        return float(((values - modelled) ** 2).sum()) / max(power, 1e-30) + excess

    simplex = np.array([[0.0, 0.0], [0.04, 0.0], [0.0, 0.04]])
    options = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-9, "maxfev": 120}
    found = minimize(unevenness, simplex[0], method="Nelder-Mead", options=options)
    return np.asarray(found.x, np.float64)


def py4dstem_rings(
    mean: Array, weights: Array, center: Center, radius: float, rank: float
) -> Array:
    """Return py4DSTEM's own fit of a two-sided Gaussian to one of the strongest rings."""
    ring = ring_radius(mean, weights, center, radius, int(rank))
    if ring == 0:
        return np.zeros(2)
    annulus = (max(0.75 * ring, 1.2 * radius), 1.25 * ring)
    return fit_by_py4dstem("rings", mean, center, radius, annulus)


def py4dstem_bragg(
    mean: Array, weights: Array, center: Center, radius: float, rank: float
) -> Array:
    """Return py4DSTEM's own conic through the Bragg disks that it finds at one of the rings."""
    ring = ring_radius(mean, weights, center, radius, int(rank))
    if ring == 0:
        return np.zeros(2)
    return fit_by_py4dstem("bragg", mean, center, radius, (0.85 * ring, 1.15 * ring))


_PY4DSTEM: Final = {
    "needs": "py4DSTEM",
    "install": "pip install py4DSTEM, where NumPy may be 1.x",
    "variable": PYTHON_VARIABLE,
}

ELLIPSE_METHODS: tuple[Method[FitEllipse], ...] = (
    Method(
        "ring fit",
        "py4DSTEM fit_ellipse_amorphous_ring: Savitzky et al. 2021; true center given",
        ring_fit,
        ((0,), (1,), (2,)),
    ),
    Method(
        "edge fit",
        "least-squares conic through ring maxima or the beam's edge; true center given",
        edge_fit,
        ((-1,), (0,), (1,)),
    ),
    Method(
        "ring uniformity",
        "least variance within rings, Nelder-Mead; true center given",
        uniformity_fit,
    ),
    Method(
        "py4DSTEM rings",
        "py4DSTEM's own fit_ellipse_amorphous_ring; true center given",
        py4dstem_rings,
        ((0,), (1,), (2,)),
        **_PY4DSTEM,
    ),
    Method(
        "py4DSTEM Bragg peaks",
        "py4DSTEM's own find_Bragg_disks and ellipse_err; true center and radius given",
        py4dstem_bragg,
        ((0,), (1,), (2,)),
        **_PY4DSTEM,
    ),
)
