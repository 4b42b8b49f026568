"""How far the mean pattern is from round: every cell of a log-polar map votes, with a weight.

Around the center, an elliptical distortion with vector v = ln(ratio) (cos 2 theta, sin 2 theta)
moves ln r at azimuth phi by v . e / 2, e = (cos 2 phi, sin 2 phi), and shears by v . e' / 2 with
e' = (-sin 2 phi, cos 2 phi). A convolutional network on the (ln r, phi) map, circular in phi,
reads both components in each cell's own frame, with two log-weights. `decode` solves the weighted
least squares of all votes in FP32: its normal matrix would be the estimate's inverse covariance,
were votes independent and errors normal, so rings, disks and lattices are fused as their
information deserves. How much wider errors spread, the network says besides: noise makes them
normal, a lattice that may be another one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models.layers import Conv, Down, Residual, unshuffled

IN_CHANNELS: Final = 6
RADII: Final = 256
"""Rows of the log-polar map."""
AZIMUTHS: Final = 128
"""Columns of the log-polar map, each the mean of OVERSAMPLE samples."""
OVERSAMPLE: Final = 4
INNERMOST: Final = 1 / 40
"""Smallest radius as a share of half the smaller side, which is the largest."""
LARGEST_SIDE: Final = 256
"""Frames whose smaller side is a multiple of this are binned by that multiple."""
SPREAD: Final = 4
"""Which of its channels says how wide its errors spread."""
SCALE: Final = 0.05
"""Votes are in units of this much ln(ratio); one sigma of it is about what lenses do, too."""


@dataclass(frozen=True)
class EllipseConfig:
    """Channels and residual blocks at strides 2, 4 and 8 of the log-polar map."""

    channels: tuple[int, int, int] = (16, 48, 64)
    blocks: tuple[int, int, int] = (1, 1, 3)


@dataclass(frozen=True)
class EllipseEstimate:
    """Distortion of n mean patterns.

    Attributes:
        vector: (n, 2) float32, ln(ratio) (cos 2 theta, sin 2 theta).
        sigma: (n,) float32, one standard deviation of each component: 68.3 % of errors lie within.
        spread: (n,) float32, by how much that is wider than if votes were independent.
    """

    vector: Tensor
    sigma: Tensor
    spread: Tensor


class EllipseNet(nn.Module):
    """ResNet on the log-polar map; it knows the radius of a cell but not its azimuth."""

    def __init__(self, config: EllipseConfig | None = None):
        super().__init__()
        self.config = config or EllipseConfig()
        c1, c2, c3 = self.config.channels
        b1, b2, b3 = self.config.blocks

        def level(width: int, blocks: int) -> list[nn.Module]:
            return [Residual(width, circular=True) for _ in range(blocks)]

        self.stage1 = nn.Sequential(Conv(4 * IN_CHANNELS, c1, circular=True), *level(c1, b1))
        self.stage2 = nn.Sequential(Down(c1, c2), *level(c2, b2))
        self.down = Down(c2, c3)
        self.stage3 = nn.Sequential(*level(c3, b3))
        self.radius = nn.Parameter(torch.zeros(1, c3, RADII // 8, 1))
        self.head = nn.Conv2d(c3, SPREAD + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 6, 256, 128) from `prepare` -> votes (n, 5, 32, 16) for `decode`."""
        x = self.stage1(unshuffled(x))  # (n, c1, 128, 64)
        x = self.down(self.stage2(x)) + self.radius  # (n, c3, 32, 16)
        votes: Tensor = self.head(self.stage3(x))
        return votes


def prepare(mean: Tensor, valid: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Resample mean patterns to log-polar maps and scale them, in FP32.

    Args:
        mean: (h, w) or (n, h, w) float32 counts, centered on ((h - 1) / 2, (w - 1) / 2).
        valid: The same shape: weight of each pixel, 0 where it has no source.
        sigma: (n,) float32, one sigma of each component of the distortion, as far as it is known
            before this look; `SCALE` where nothing is.

    Returns:
        (n, 6, 256, 128): amplitude, contrast against the azimuthal mean, logarithms of the
        azimuthal mean and of the contrast's unit, validity, and as an even plane what is known.
    """
    if mean.dim() == 2:
        mean, valid = mean[None], valid[None]
    n, h, w = mean.shape
    known = mean.new_zeros(n) if sigma is None else 0.5 * torch.log(sigma / SCALE)
    middle_y, middle_x = 0.5 * (h - 1), 0.5 * (w - 1)
    weight = (valid > 0).to(mean.dtype)
    both = torch.stack([mean * weight, weight], 1)
    factor = max(1, round(min(h, w) / LARGEST_SIDE))
    if factor > 1:  # the outer rows of the map are coarser than the frame: bin, lose no electron
        both = functional.avg_pool2d(both, factor)
        middle_y, middle_x = (
            (middle - 0.5 * (factor - 1)) / factor for middle in (middle_y, middle_x)
        )
    h, w = both.shape[2:]
    rows = RADII * (2 if min(h, w) > LARGEST_SIDE // 2 + 32 else 1)
    columns = AZIMUTHS * OVERSAMPLE
    steps = (torch.arange(rows, device=mean.device, dtype=torch.float32) + 0.5) / rows
    r = 0.5 * (min(h, w) - 1) * INNERMOST ** (1.0 - steps)
    phi = 2 * torch.pi * (torch.arange(columns, device=mean.device) + 0.5) / columns
    y = (middle_y + r[:, None] * torch.sin(phi)) * (2.0 / (h - 1)) - 1.0
    x = (middle_x + r[:, None] * torch.cos(phi)) * (2.0 / (w - 1)) - 1.0
    grid = torch.stack([x, y], -1)[None].expand(n, -1, -1, -1)
    polar = functional.grid_sample(both, grid, mode="bilinear", align_corners=True)
    polar = functional.avg_pool2d(polar, (rows // RADII, OVERSAMPLE))  # (n, 2, 256, 128)
    weight = polar[:, 1:]
    value = polar[:, :1].clamp_min(0.0) / weight.clamp_min(0.05)

    per_radius = weight.sum(3, keepdim=True)
    radial = (value * weight).sum(3, keepdim=True) / per_radius.clamp_min(1e-3)
    radial = torch.where(per_radius > 0.5, radial, radial.amin(2, keepdim=True))
    value = torch.where(weight > 0.05, value, radial)
    level = (value**2).mean((2, 3), keepdim=True) / value.mean((2, 3), keepdim=True).clamp_min(
        1e-20
    )
    level = level.clamp_min(1e-20)
    amplitude = (value / level).sqrt()
    middle = (radial / level).sqrt()
    spread = (amplitude - middle).square().mean(3, keepdim=True).sqrt()
    unit = spread + 0.05 * middle + 1e-4
    contrast = (amplitude - middle) / unit
    channels = [
        amplitude,
        contrast.clamp(-4.0, 4.0),
        (torch.log(radial / level + 1e-6) * 0.2).expand_as(value),
        weight,
        (torch.log(unit) * 0.2).expand_as(value),
        known[:, None, None, None].expand_as(value),
    ]
    return torch.cat(channels, 1)


def decode(votes: Tensor) -> EllipseEstimate:
    """Solve for the distortion that all votes (n, 5, R, P) agree on best, in FP32.

    Votes are, per cell, the component along e, the one along e', and the logarithms of the
    precisions of both; the mean of the last channel is the logarithm of the spread.
    """
    votes = votes.float()
    columns = votes.shape[3]
    phi = 2 * torch.pi * (torch.arange(columns, device=votes.device) + 0.5) / columns
    c, s = torch.cos(2 * phi), torch.sin(2 * phi)  # (P,)
    along, across = votes[:, 0], votes[:, 1]  # (n, R, P)
    one, two = votes[:, 2].clamp(-12.0, 12.0).exp(), votes[:, 3].clamp(-12.0, 12.0).exp()
    xx = (one * c * c + two * s * s).sum((1, 2)) + 1e-3
    yy = (one * s * s + two * c * c).sum((1, 2)) + 1e-3
    xy = ((one - two) * c * s).sum((1, 2))
    bx = (one * along * c - two * across * s).sum((1, 2))
    by = (one * along * s + two * across * c).sum((1, 2))
    determinant = (xx * yy - xy * xy).clamp_min(1e-12)
    vector = torch.stack([yy * bx - xy * by, xx * by - xy * bx], 1) / determinant[:, None]
    variance = 0.5 * (xx + yy) / determinant
    spread = votes[:, SPREAD].mean((1, 2)).clamp(-3.0, 6.0).exp()
    return EllipseEstimate(SCALE * vector, SCALE * spread * variance.sqrt(), spread)
