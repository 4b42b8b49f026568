"""Scans of rings whose distortion and drift are known."""

import numpy as np

from prenet4d_engines.geometry import Ellipticity

SHAPE = (96, 96)
SCAN = (6, 8)
TRUE = Ellipticity(1.05, 0.6)


def rings(scan=SCAN, dose=30_000.0, seed=0):
    """(ny, nx, 96, 96) uint16 noisy rings and a direct beam; the center drifts by a plane."""
    rng = np.random.default_rng(seed)
    ny, nx = scan
    frames = np.empty((*scan, *SHAPE), np.uint16)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    inverse = np.linalg.inv(TRUE.matrix)
    for i, j in np.ndindex(scan):
        cy, cx = 47.5 + 2 * i / ny - 1, 47.5 - 1.5 * j / nx
        points = inverse @ np.stack([(x - cx).ravel(), (y - cy).ravel()])
        r = np.hypot(*points).reshape(SHAPE)
        expected = 20 / (1 + np.exp((r - 3.5) / 0.4)) + 0.02
        for radius, strength in ((18.0, 1.0), (26.0, 0.7), (34.0, 0.5)):
            expected += strength * np.exp(-((r - radius) ** 2) / (2 * 1.2**2))
        frames[i, j] = rng.poisson(dose * expected / expected.sum())
    return frames
