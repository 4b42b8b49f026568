"""Classical ways to find the center (the direct beam's position) of one pattern.

Each takes a frame of counts ``(h, w)`` (masked pixels at 0) and the direct beam's radius in
pixels, then the method's own parameters, and returns ``(cy, cx)`` in pixels, pixel centers at
integers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from prenet4d_engines.evaluate.classical.method import Method

Array = NDArray[np.float64]
Center = tuple[float, float]
FindCenter = Callable[..., Center]
"""``find(frame, radius, *setting) -> (cy, cx)``."""


def _middle(frame: Array) -> Center:
    return (frame.shape[0] - 1) / 2, (frame.shape[1] - 1) / 2


def _inside(frame: Array, cy: float, cx: float) -> Center:
    return float(np.clip(cy, 0, frame.shape[0] - 1)), float(np.clip(cx, 0, frame.shape[1] - 1))


def center_of_mass(frame: Array, radius: float = 0.0) -> Center:
    """Return the center of mass; the frame's middle where there are no counts."""
    del radius
    total = float(frame.sum())
    if total <= 0:
        return _middle(frame)
    rows, columns = frame.shape
    cy = float(frame.sum(1) @ np.arange(rows)) / total
    cx = float(frame.sum(0) @ np.arange(columns)) / total
    return cy, cx


def threshold_center(frame: Array, radius: float, fraction: float, blur: float) -> Center:
    """Return the center of mass of the pixels above a fraction of the maximum.

    Args:
        frame: Counts, (h, w).
        radius: Not used.
        fraction: Threshold as a fraction of the blurred frame's maximum.
        blur: Sigma in pixels of the Gaussian that decides which pixels are above it.
    """
    blurred = gaussian_filter(frame, blur)
    return center_of_mass(np.where(blurred >= fraction * blurred.max(), frame, 0.0), radius)


def _within(frame: Array, center: Center, radius: float) -> Array:
    """Return the frame with everything further than ``radius`` from ``center`` set to 0."""
    y = np.arange(frame.shape[0])[:, None] - center[0]
    x = np.arange(frame.shape[1])[None, :] - center[1]
    return np.where(y * y + x * x <= radius * radius, frame, 0.0)


def iterative_center(frame: Array, radius: float, scale: float) -> Center:
    """Return the center of mass in a window that follows it and shrinks around it.

    The window's radius starts at half the frame and ends at ``scale`` times the beam's, and is
    then kept until the center rests.
    """
    center = center_of_mass(frame)
    last = max(scale * radius, 2.0)
    window = max(min(frame.shape) / 2, last)
    for _ in range(40):
        moved = center_of_mass(_within(frame, center, window))
        step = np.hypot(moved[0] - center[0], moved[1] - center[1])
        center = moved
        if window <= last and step < 1e-3:
            break
        window = max(0.8 * window, last)
    return center


def blurred_maximum_center(frame: Array, radius: float, scale: float) -> Center:
    """Return the center of mass around the maximum of the blurred frame.

    As py4DSTEM's ``get_origin_single_dp``: blur by the beam's radius, take the maximum, then the
    center of mass within ``scale`` times the radius of it (B. Savitzky et al., Microsc.
    Microanal. 27 (2021) 712).
    """
    blurred = gaussian_filter(frame, max(radius, 1.0))
    peak = np.unravel_index(int(blurred.argmax()), frame.shape)
    window = max(scale * radius, 2.0)
    return center_of_mass(_within(frame, (float(peak[0]), float(peak[1])), window))


def friedel_center(frame: Array, radius: float, whitening: float, blur: float) -> Center:
    """Return the center of the pattern's own inversion symmetry.

    The frame is correlated with itself turned by 180 degrees; the peak lies at twice the center.
    ``whitening`` divides the spectrum by its modulus to that power: 0 is plain correlation, 1 is
    phase correlation (C. Kuglin and D. Hines, IEEE Int. Conf. Cybernetics and Society (1975)
    163), as pyxem offers with its own inverted pattern as the reference.

    Args:
        frame: Counts, (h, w).
        radius: Not used.
        whitening: Power of the modulus that the spectrum is divided by.
        blur: Sigma in pixels of a Gaussian applied before.
    """
    del radius
    rows, columns = frame.shape
    # Zero padding to twice the size keeps the correlation from wrapping around.
    spectrum = fft.fft2(gaussian_filter(frame, blur), s=(2 * rows, 2 * columns)) ** 2
    if whitening > 0:
        modulus = np.abs(spectrum)
        spectrum /= np.maximum(modulus, 1e-12 * float(modulus.max()) + 1e-30) ** whitening
        # Frequencies that the blur has removed carry rounding noise, not phase.
        spectrum *= _low_pass(spectrum.shape, blur)
    y, x = _peak(spectrum)
    return _inside(frame, y / 2, x / 2)


def _low_pass(shape: tuple[int, ...], blur: float) -> Array:
    fy = fft.fftfreq(shape[0])[:, None]
    fx = fft.fftfreq(shape[1])[None, :]
    return np.asarray(np.exp(-2 * (np.pi * blur) ** 2 * (fy * fy + fx * fx)), np.float64)


def disk_correlation_center(frame: Array, radius: float) -> Center:
    """Return where a disk of the beam's radius correlates best with the frame.

    The template is a soft-edged disk inside a negative annulus of twice its radius, of sum zero,
    as py4DSTEM's Bragg disk detection builds it (``get_probe_kernel_edge_sigmoid``); the peak is
    refined by local Fourier upsampling. The strongest disk is taken for the direct beam.
    """
    radius = max(radius, 1.0)
    rows, columns = (2 * size for size in frame.shape)
    y = (np.arange(rows) + rows // 2) % rows - rows // 2
    x = (np.arange(columns) + columns // 2) % columns - columns // 2
    r = np.hypot(y[:, None], x[None, :])
    edge = max(0.05 * radius, 0.25)
    disk = 1 / (1 + np.exp(np.clip((r - radius) / edge, -50, 50)))
    annulus = np.clip(r <= 2 * radius, 0, 1) * (1 - disk)
    kernel = disk / disk.sum() - annulus / annulus.sum()
    spectrum = fft.fft2(frame, s=(rows, columns)) * np.conj(fft.fft2(kernel))
    return _inside(frame, *_peak(spectrum, within=frame.shape))


def _peak(spectrum: NDArray[np.complex128], within: tuple[int, ...] | None = None) -> Center:
    """Return the maximum of a spectrum's inverse transform, to about 1/100 pixel.

    The transform is evaluated on a grid of 1/8 pixel around its highest pixel by two matrix
    products (M. Guizar-Sicairos, S. Thurman, J. Fienup, Opt. Lett. 33 (2008) 156), and a parabola
    through the highest point's neighbours gives the rest.
    """
    rows, columns = spectrum.shape
    coarse = fft.ifft2(spectrum).real
    if within is not None:
        coarse = coarse[: within[0], : within[1]]
    start = np.unravel_index(int(coarse.argmax()), coarse.shape)
    offsets = np.arange(-10, 11) / 8
    phase = 2j * np.pi
    ay = np.exp(phase * np.outer(start[0] + offsets, fft.fftfreq(rows)))
    ax = np.exp(phase * np.outer(fft.fftfreq(columns), start[1] + offsets))
    # In torch, whose threads the evaluation holds at one; NumPy's would make these products slow.
    fine = (torch.from_numpy(ay) @ torch.from_numpy(spectrum) @ torch.from_numpy(ax)).real.numpy()
    iy, ix = np.unravel_index(int(fine.argmax()), fine.shape)
    dy = _vertex(fine[iy - 1 : iy + 2, ix]) if 0 < iy < len(offsets) - 1 else 0.0
    dx = _vertex(fine[iy, ix - 1 : ix + 2]) if 0 < ix < len(offsets) - 1 else 0.0
    y = float(start[0]) + float(offsets[iy]) + dy / 8
    x = float(start[1]) + float(offsets[ix]) + dx / 8
    return y, x


def _vertex(three: Array) -> float:
    """Return the offset of the vertex of the parabola through three equidistant values."""
    curvature = float(three[0] - 2 * three[1] + three[2])
    return 0.0 if curvature >= 0 else 0.5 * float(three[0] - three[2]) / curvature


def radial_symmetry_center(frame: Array, radius: float, blur: float, window: float) -> Center:
    """Return the point that the gradients' lines pass closest to.

    R. Parthasarathy, Nature Methods 9 (2012) 724: least squares over the distances of the center
    to the lines along each pixel's gradient, weighted by the gradient's square over its distance
    from the gradients' centroid. As that method is made for one particle in view, a ``window``
    can cut the frame down to the surroundings of the blurred maximum.

    Args:
        frame: Counts, (h, w).
        radius: The direct beam's radius in pixels.
        blur: Sigma in pixels of the Gaussian whose derivatives give the gradient.
        window: Radius of the window in units of ``radius`` (+ ``blur``); 0 takes the whole frame.
    """
    gy = gaussian_filter(frame, blur, order=(1, 0))
    gx = gaussian_filter(frame, blur, order=(0, 1))
    weight = gy * gy + gx * gx
    if window > 0:
        start = blurred_maximum_center(frame, radius, 1.2)
        weight = _within(weight, start, window * (radius + blur))
    if weight.sum() <= 0:
        return _middle(frame)
    y = np.arange(frame.shape[0], dtype=np.float64)[:, None]
    x = np.arange(frame.shape[1], dtype=np.float64)[None, :]
    middle = center_of_mass(weight)
    modulus = np.maximum(gy * gy + gx * gx, 1e-300)
    weight = weight / np.maximum(np.hypot(y - middle[0], x - middle[1]), 1.0)
    # The distance's square is (p - c)^T (1 - n n^T) (p - c), n the gradient's direction.
    pyy, pxx, pyx = (weight * q / modulus for q in (gx * gx, gy * gy, -gy * gx))
    matrix = np.array([[pyy.sum(), pyx.sum()], [pyx.sum(), pxx.sum()]])
    vector = np.array([(pyy * y + pyx * x).sum(), (pyx * y + pxx * x).sum()])
    if np.linalg.det(matrix) <= 1e-9 * np.trace(matrix) ** 2:
        return middle
    cy, cx = np.linalg.solve(matrix, vector)
    return _inside(frame, float(cy), float(cx))


CENTER_METHODS: tuple[Method[FindCenter], ...] = (
    Method("CoM", "center of mass", center_of_mass),
    Method(
        "thresholded CoM",
        "center of mass above a fraction of the maximum",
        threshold_center,
        ((0.1, 1.0), (0.25, 1.0), (0.5, 1.0), (0.5, 3.0), (0.75, 3.0), (0.9, 3.0)),
    ),
    Method(
        "iterative CoM",
        "center of mass in a shrinking window, true beam radius given",
        iterative_center,
        ((1.2,), (2.0,), (4.0,)),
    ),
    Method(
        "blurred argmax + CoM",
        "py4DSTEM get_origin: Savitzky et al., Microsc. Microanal. 27 (2021) 712; true radius",
        blurred_maximum_center,
        ((1.2,), (2.0,)),
    ),
    Method(
        "Friedel correlation",
        "phase correlation with the own 180° rotation, Kuglin & Hines 1975; or plain correlation",
        friedel_center,
        ((1.0, 1.0), (0.5, 1.0), (0.0, 0.5), (0.0, 2.0)),
    ),
    Method(
        "disk correlation",
        "py4DSTEM Bragg-disk template, upsampled peak; true radius given",
        disk_correlation_center,
    ),
    Method(
        "radial symmetry",
        "R. Parthasarathy, Nature Methods 9 (2012) 724",
        radial_symmetry_center,
        ((1.0, 0.0), (3.0, 0.0), (1.0, 1.5), (3.0, 1.5)),
    ),
)
