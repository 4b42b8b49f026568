"""Figures of merit: plain functions of what was found and what is true."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.geometry import Ellipticity

Array = NDArray[np.float64]

_LEAST_LIMIT: Final = 3 / 128
"""Of a frame's shorter side."""


def squared_error(found: Array, truth: Array, valid: NDArray[np.bool_] | None = None) -> float:
    """Return the mean squared difference over the valid pixels, in counts squared."""
    return _mean_square(found - truth, valid)


def squared_root_error(found: Array, truth: Array, valid: NDArray[np.bool_] | None = None) -> float:
    """Return the mean squared difference of the square roots over the valid pixels, in counts.

    The square root makes Poisson noise equally strong everywhere, so that this figure weighs weak
    and strong features alike; the linear one is made by the few brightest pixels.
    """
    return _mean_square(np.sqrt(np.maximum(found, 0.0)) - np.sqrt(np.maximum(truth, 0.0)), valid)


def _mean_square(difference: Array, valid: NDArray[np.bool_] | None) -> float:
    chosen = difference if valid is None else difference[valid]
    return float(np.mean(chosen * chosen))


def counts_error(found: Array, truth: Array, valid: NDArray[np.bool_] | None = None) -> float:
    """Return the relative error of the pattern's total counts over the valid pixels."""
    if valid is not None:
        found, truth = found[valid], truth[valid]
    return float(found.sum() / truth.sum() - 1.0)


def lengths(deviations: Array) -> Array:
    """Return the lengths in pixels of found minus true centers (n, 2), (n,)."""
    return np.asarray(np.hypot(*deviations.T), np.float64)


def beam_limits(
    radii: Array, frame_shape: tuple[int, ...], spacings: Array | float = np.inf
) -> Array:
    """Return the errors in px beyond which another beam was taken for the direct one, (n,).

    What lies further from the true center than the direct beam's radius is not in that beam, and
    where disks overlap, what lies further than half the way to the nearest reflection is in the
    middle of another. Limits below 3 px on frames of 128 x 128 px (in proportion on others) are
    raised to it: noise alone may carry an estimate as far.

    Args:
        radii: (n,) the direct beam's radius in px.
        frame_shape: (h, w).
        spacings: (n,) distance in px of the nearest reflection; infinite where there is none or
            it is not known.
    """
    return np.maximum(np.minimum(radii, spacings / 2), _LEAST_LIMIT * min(frame_shape))


def wrong_beams(errors: Array, limits: Array) -> NDArray[np.bool_]:
    """Return where errors (..., n) exceed their limits (n,), both in px; what is NaN does."""
    return ~np.asarray(errors <= limits)


def within_sigma(deviations: Array, sigma: Array, factor: float = 1.0) -> float:
    """Return the share of components (n, 2) that are within ``factor`` sigma of the truth.

    A calibrated Gaussian sigma gives 0.683 for one sigma, 0.954 for two.
    """
    return float(np.mean(np.abs(deviations) <= factor * sigma))


def ratio_error(found: Array, truth: Array) -> float:
    """Return |ratio / true ratio - 1| in percent, for distortion vectors (2,)."""
    return 100.0 * abs(float(np.exp(np.hypot(*found) - np.hypot(*truth))) - 1.0)


def ring_nonuniformity(found: Array, truth: Array) -> float:
    """Return in percent how much the radius of a ring swings over azimuth once it is corrected.

    Correcting by the distortion that was found, ``D_f``, turns a round ring that the true one,
    ``D_t``, had distorted into the ellipse ``D_f^-1 D_t`` of a circle. Its radius swings twice on
    the way around; the figure is that swing's amplitude, half of largest minus smallest, over the
    middle between them: ``tanh(L / 2)`` with ``L`` the ln of the ratio that is left. It is the same
    for rings of all radii, and unlike `ratio_error` it counts a wrong angle too.

    Args:
        found: Distortion vector (2,); zero gives what there was before any correction.
        truth: True distortion vector (2,).
    """
    applied, true = (Ellipticity.from_vector(*vector).matrix for vector in (found, truth))
    left = Ellipticity.from_matrix(np.asarray(np.linalg.solve(applied, true), np.float64))
    return 100.0 * float(np.tanh(0.5 * np.log(left.ratio)))


def angle_error(found: Array, truth: Array) -> float:
    """Return the error of the major axis' angle in degrees, in [0, 90]."""
    one, other = (Ellipticity.from_vector(*vector).theta for vector in (found, truth))
    difference = abs(one - other)
    return float(np.degrees(min(difference, np.pi - difference)))
