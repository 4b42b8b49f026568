"""How well a center can be known at all: the Cramér-Rao bound of patterns and their cameras.

The bound holds for an unbiased estimate by one who knows everything but the center: the noise-free
pattern, its distortion, the dose and the camera. No method has that, so none need reach it; what
is above it by a factor is what better knowledge could still gain.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from prenet4d_engines.evaluate.datasets import MOVE, PatternSet
from prenet4d_engines.simulate import expected_counts

Array = NDArray[np.float64]

BOUND: Final = "Cramér-Rao bound"
_DRAWS: Final = 256


def center_covariance(patterns: PatternSet, dose: float) -> Array:
    """Return the smallest possible covariance (n, 2, 2) of each center in px^2, [y, x].

    Fisher's information of counts with expectation m(c) and variance m + r^2 (Poisson and a readout
    noise r; what that noise's variance says of m is left out) is
    ``I_ij = sum dm/dc_i dm/dc_j / (m + r^2)``, over the valid pixels.

    Raises:
        ValueError: How the patterns change with their centers is not known.
    """
    if patterns.moved is None:
        raise ValueError(f"The set {patterns.name!r} does not say how its patterns move.")
    bounds = np.empty((len(patterns), 2, 2))
    for i, detector in enumerate(patterns.detectors):
        images = np.concatenate([patterns.expected[i : i + 1], patterns.moved[i]])
        counts = expected_counts(torch.from_numpy(images), dose, detector).numpy()
        here, up, down, left, right = counts.astype(np.float64)[:, detector.valid]
        slopes = np.stack([down - up, right - left]) / (2 * MOVE)
        information = (slopes / np.maximum(here + detector.readout**2, 1e-12)) @ slopes.T
        bounds[i] = np.linalg.pinv(information, hermitian=True)
    return bounds


def bounding_errors(patterns: PatternSet, dose: float) -> Array:
    """Return distances in px that estimates at the bound would have from the truth, (n * draws,).

    Drawn from normal distributions with the bound's covariances, so that median, mean and
    quantiles compare with those of a method's errors.
    """
    roots = np.linalg.cholesky(center_covariance(patterns, dose) + 1e-12 * np.eye(2))
    draws = np.random.default_rng(0).normal(size=(_DRAWS, 2))
    return np.asarray(np.linalg.norm(np.einsum("nij,dj->ndi", roots, draws), axis=-1).ravel())
