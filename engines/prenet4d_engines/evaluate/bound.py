"""How well a center can be known at all: the Cramér-Rao bound of patterns and their cameras.

The bound holds for an unbiased estimate by one who knows everything but the center: the noise-free
pattern, its distortion, the dose and the camera. No method has that, so none need reach it; what
is above it by a factor is what better knowledge could still gain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, poisson

from prenet4d_engines.evaluate.datasets import MOVE, PatternSet
from prenet4d_engines.simulate import expected_counts

Array = NDArray[np.float64]

BOUND: Final = "Cramér-Rao bound"
_DRAWS: Final = 256
_FEW: Final = 10.0
"""Electrons from which on a pixel's reading is as good as normally distributed."""
_MANY: Final = 50
"""Electrons that a pixel never counts where fewer than `_FEW` are expected."""
_SINGULAR: Final = 1e12
"""Condition from which on an information matrix says nothing about one of the directions."""


def center_covariance(patterns: PatternSet, dose: float) -> Array:
    """Return the smallest possible covariance (n, 2, 2) of each center in px^2, [y, x].

    The inverse of Fisher's information ``I_ij = sum J(m) dm/dc_i dm/dc_j`` over the valid pixels,
    m the electrons that are expected and J what a pixel's reading says of them
    (`pixel_information`). Infinite where the counts do not tell the center.

    Raises:
        ValueError: How the patterns change with their centers is not known.
    """
    if patterns.moved is None:
        raise ValueError(f"The set {patterns.name!r} does not say how its patterns move.")
    bounds = np.full((len(patterns), 2, 2), np.inf)
    for i, detector in enumerate(patterns.detectors):
        images = np.concatenate([patterns.expected[i : i + 1], patterns.moved[i]])
        # What reaches a pixel goes on changing where what it reads is cut off.
        open_ended = replace(detector, saturation=float("inf"))
        counts = expected_counts(torch.from_numpy(images), dose, open_ended).numpy()
        here, up, down, left, right = counts.astype(np.float64)[:, detector.valid]
        slopes = np.stack([down - up, right - left]) / (2 * MOVE)
        told = pixel_information(here, detector.readout, detector.saturation)
        information = (slopes * told) @ slopes.T
        if np.linalg.cond(information) < _SINGULAR:
            bounds[i] = np.linalg.inv(information)
    return bounds


def pixel_information(mean: Array, readout: float, saturation: float) -> Array:
    """Return Fisher's information (n,) on the mean electrons (n,) of pixels from their readings.

    Poisson counts hold ``1 / mean``, of which a camera leaves a share. Readout noise leaves
    ``mean / (mean + readout^2)`` where electrons are many, and more where they are few: one that is
    there stands out from none. A reading at the saturation says only that there were as many. Where
    a camera does both, the shares are multiplied.

    Args:
        mean: Expected electrons.
        readout: Standard deviation of the readout noise in electrons; readings below 0 read 0.
        saturation: Highest electrons that a pixel reports.
    """
    mean = np.maximum(mean, 1e-12)
    share = np.ones_like(mean)
    if readout > 0:
        share = np.where(mean < _FEW, _told_apart(mean, readout), mean / (mean + readout**2))
    if np.isfinite(saturation):
        share *= _told_below(mean, int(np.ceil(saturation)))
    return share / mean


def _told_apart(mean: Array, readout: float) -> Array:
    """Return the share (n,) that readout noise leaves of what few electrons say of their mean.

    Of a reading y the score is ``E[electrons | y] / mean - 1``; the information is its variance.
    """
    means = np.geomspace(1e-9, _FEW, 64)
    electrons = np.arange(_MANY)
    chance = poisson.pmf(electrons[:, None], means)
    step = min(readout, 0.5) / 4
    readings = (np.arange(round(_MANY / step)) + 0.5) * step
    likely = np.vstack(
        [
            norm.pdf(readings[:, None], electrons, readout) * step,
            norm.cdf(-electrons / readout),  # all that read 0
        ]
    )
    density = likely @ chance
    score = likely @ (chance * (electrons[:, None] / means - 1)) / np.maximum(density, 1e-300)
    share = (density * score**2).sum(0) * means
    return np.asarray(np.exp(np.interp(np.log(mean), np.log(means), np.log(share))))


def _told_below(mean: Array, highest: int) -> Array:
    """Return the share (n,) that counts cut off at ``highest`` leave of what they say of a mean."""
    one, two = (poisson.pmf(highest - k, mean) for k in (1, 2))
    cut_off = np.maximum(poisson.sf(highest - 1, mean), 1e-300)
    return np.asarray(poisson.cdf(highest - 2, mean) + mean * (one - two + one**2 / cut_off))


def bounding_errors(patterns: PatternSet, dose: float) -> Array:
    """Return distances in px that estimates at the bound would have from the truth, (n * draws,).

    Drawn from normal distributions with the bound's covariances, so that median, mean and
    quantiles compare with those of a method's errors. Infinite where the counts do not tell.
    """
    covariance = center_covariance(patterns, dose)
    known = np.isfinite(covariance).all((1, 2))
    roots = np.linalg.cholesky(covariance[known] + 1e-12 * np.eye(2))
    draws = np.random.default_rng(0).normal(size=(_DRAWS, 2))
    errors = np.full((len(patterns), _DRAWS), np.inf)
    errors[known] = np.linalg.norm(np.einsum("nij,dj->ndi", roots, draws), axis=-1)
    return errors.ravel()
