"""Rings with drifting centers, and the fields of batches put together: for overlap and recovery."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from prenet4d_engines import CorrectorConfig, Ellipticity
from prenet4d_engines.batch import CorrectedBatch
from prenet4d_engines.geometry import reference_center

SHAPE = (48, 56)
CONFIG = CorrectorConfig(
    ellipse_every=16, patterns_to_lock=32, averaging_window=96, lost_after=2, min_dose=500
)
BATCHES = (16, 16, 5, 16, 1, 10, 16, 10)
PER_FRAME = (
    *("indices", "corrected", "aligned", "center", "center_sigma", "tracked", "tracked_sigma"),
    *("shift", "shift_sigma", "dose", "flags", "virtual"),
)


def rings() -> np.ndarray:
    """Noisy rings (90, h, w), uint16, with a beam in all of them but every 17th."""
    return _rings().copy()


@functools.cache
def _rings() -> np.ndarray:
    n, random = 90, np.random.default_rng(0)
    first = np.array(reference_center(SHAPE)) + np.array((1.5, -2.0))
    centers = first + np.cumsum(random.normal(0, 0.1, (n, 2)), axis=0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    inverse = np.linalg.inv(Ellipticity(1.05, 0.6).matrix)
    frames = []
    for number, (cy, cx) in enumerate(centers):
        points = inverse @ np.stack([(x - cx).ravel(), (y - cy).ravel()])
        r = np.hypot(*points).reshape(SHAPE)
        ring = np.exp(-((r - 14) ** 2) / 3)
        frames.append(random.poisson(ring * 30_000 / ring.sum()) if number % 17 != 9 else 0 * y)
    return np.stack(frames).astype(np.uint16)


def parts(sizes: Sequence[int] = BATCHES) -> Iterator[slice]:
    """One slice after the other."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def together(batches: Sequence[CorrectedBatch]) -> dict[str, np.ndarray]:
    """All frames' fields, in the order in which they were returned."""
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in PER_FRAME}


def assert_same(found: Sequence[CorrectedBatch], wanted: Sequence[CorrectedBatch]) -> None:
    """Batches and their frames are the same, but for the order in which sums were added up."""
    one, other = together(found), together(wanted)
    for name in PER_FRAME:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=2e-3, err_msg=name)
    for a, b in zip(found, wanted, strict=True):
        assert (a.state, a.patterns_averaged) == (b.state, b.patterns_averaged)
        np.testing.assert_allclose(a.ellipticity.vector, b.ellipticity.vector, atol=1e-5)
        assert a.reference_center == b.reference_center
