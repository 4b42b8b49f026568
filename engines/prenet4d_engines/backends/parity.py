"""Does an arithmetic agree with float32 where it matters: in counts and in pixels?

A faster arithmetic is used for a network only if a few patterns, decoded to physical quantities,
come out the same within the bounds below. It is measured once, when a backend starts: libraries,
processors and weights differ, and a wrong kernel has to be found before the first frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prenet4d_engines.models import center, denoiser

CENTER_BOUND = 0.02
"""Largest deviation of a center, in pixels, or in tenths of its sigma where that is more."""
COUNTS_BOUND = 0.005
"""Largest mean absolute deviation of denoised counts, as a share of the mean."""

Network = Callable[[Tensor], Tensor]


def patterns(device: torch.device) -> Tensor:
    """Return six plain patterns, (6, 128, 128) counts: disks and a halo at 10³ to 10⁵ electrons."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    frames = []
    for number in range(6):
        cy, cx = (55 + 18 * torch.rand(2, generator=random)).tolist()
        expected = 0.02 * torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 30.0**2))
        for ky in range(-3, 4):
            for kx in range(-3, 4):
                r = torch.hypot(y - cy - 17.3 * ky - 4 * kx, x - cx - 19.1 * kx)
                strength = 0.5 ** (abs(kx) + abs(ky))
                expected = expected + strength * torch.sigmoid(2 * (5.5 - r))
        dose = 10.0 ** (3 + number % 3)
        frames.append(torch.poisson(expected * (dose / expected.sum()), generator=random))
    return torch.stack(frames).to(device)


def denoiser_deviation(network: Network, reference: Network, frames: Tensor) -> float:
    """Return the mean absolute deviation in counts of the worst pattern, as a share of its mean."""
    x, context = denoiser.stabilise(frames, torch.ones_like(frames[0], dtype=torch.bool))
    expected = denoiser.restore(reference(x), context)
    found = denoiser.restore(network(x), context)
    share = (found - expected).abs().mean((1, 2)) / expected.mean((1, 2))
    return float(share.max())


def center_deviation(network: Network, reference: Network, frames: Tensor) -> float:
    """Return the worst deviation of a center in pixels, discounted by its sigma (CENTER_BOUND)."""
    x, grid = center.prepare(frames, torch.ones_like(frames[0], dtype=torch.bool))
    expected = center.decode(reference(x), grid)
    found = center.decode(network(x), grid)
    allowed = (0.1 * expected.sigma / CENTER_BOUND).clamp(min=1)
    return float(((found.center - expected.center).abs() / allowed).max())
