"""The networks as the evaluation calls them: arrays in, physical figures out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prenet4d_engines.backends import Backend
from prenet4d_engines.calibrator import PatternSum
from prenet4d_engines.centers import find_centers
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.geometry import reference_center
from prenet4d_engines.models import center, denoiser
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.reading import read_ellipticity
from prenet4d_engines.resample import recentered_sum
from prenet4d_engines.tracking import CenterTracker

Array = NDArray[np.float64]

BATCH = 16
USABLE: Final = CorrectorConfig().min_beam_probability
"""Frames with at least this probability of a beam count as showing one, as in the corrector."""


@dataclass(frozen=True)
class Track:
    """Centers over a scan of n frames, pixels.

    Attributes:
        single: (n, 2) of each frame on its own.
        tracked: (n, 2) with the scan so far taken into account; NaN before the first beam.
        sigma: (n, 2) of the tracked ones.
        good: (n,) bool, the frames that the corrector would average.
    """

    single: Array
    tracked: Array
    sigma: Array
    good: NDArray[np.bool_]


class Networks:
    """The networks on one backend, each with the FP32 work around it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def denoise(self, frames: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return denoised counts (n, h, w) of frames (n, h, w); ``masks`` the same shape."""

        def step(counts: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
            x, context = denoiser.stabilise(counts, valid)
            return (denoiser.restore(self.backend.denoise(x), context),)

        (denoised,) = self._batched(step, frames, masks)
        return denoised

    def centers(
        self, frames: NDArray[np.float32], masks: NDArray[np.bool_], *, refined: bool = True
    ) -> tuple[Array, Array, Array]:
        """Return centers (n, 2) and sigmas (n, 2) in px, [y, x], and P(usable beam) (n,).

        Without ``refined`` they are the center network's own, before they are refined.
        """
        found = self._find(frames, masks, refined)
        return found[0], found[1], found[2]

    def track(self, frames: NDArray[np.float32], scan_shape: tuple[int, int]) -> Track:
        """Find and track the centers of a scan's frames (n, h, w)."""
        single, sigmas, usable, others = self._find(frames, np.ones(frames.shape, np.bool_), True)
        beam = usable >= USABLE
        tracked, sigma, outlier = CenterTracker(scan_shape).update(
            np.arange(len(frames)), single, sigmas, beam, others
        )
        return Track(single, tracked, sigma, beam & ~outlier & np.isfinite(tracked).all(1))

    def _find(
        self, frames: NDArray[np.float32], masks: NDArray[np.bool_], refined: bool
    ) -> list[Array]:
        def step(counts: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
            if refined:
                found = find_centers(counts, valid, self.backend)
            else:
                bins = Bins.of(counts, valid)
                found = center.decode(self.backend.center(center.prepare(bins)), bins)
            return found.center, found.sigma, found.usable, found.others

        return [column.astype(np.float64) for column in self._batched(step, frames, masks)]

    @torch.inference_mode()
    def ellipse(self, mean: NDArray[np.float32]) -> tuple[Array, float]:
        """Return ``ln(ratio) (cos 2 theta, sin 2 theta)`` of a mean pattern and its sigma.

        ``mean`` is (h, w), its center on the reference center, NaN where nothing was measured.
        """
        image = torch.from_numpy(mean).to(self.backend.device)
        reading = read_ellipticity(image, reference_center(mean.shape), self.backend)
        return np.array(reading.ellipticity.vector), reading.sigma

    def _batched(
        self,
        step: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        frames: NDArray[np.float32],
        masks: NDArray[np.bool_],
    ) -> tuple[NDArray[np.float32], ...]:
        device = self.backend.device

        def work(part: slice) -> list[tuple[Tensor, ...]]:
            return [
                step(
                    torch.from_numpy(frames[i : min(i + BATCH, part.stop)]).to(device),
                    torch.from_numpy(masks[i : min(i + BATCH, part.stop)]).to(device),
                )
                for i in range(part.start, part.stop, BATCH)
            ]

        parts = [done for several in self.backend.spread(work, len(frames)) for done in several]
        return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))


def recentered_mean(frames: NDArray[np.float32], centers: Array) -> NDArray[np.float32]:
    """Return the mean (h, w) of frames (n, h, w) moved from their centers to the reference center.

    The corrector's own averaging; NaN where too few frames had a source.
    """
    shape = frames.shape[1:]
    total = PatternSum(shape, torch.device("cpu"))
    shifts = torch.from_numpy(np.array(reference_center(shape)) - centers)
    total.add(recentered_sum(torch.from_numpy(frames), shifts), len(frames))
    return total.mean().numpy()
