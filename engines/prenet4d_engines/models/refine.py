"""Where in the direct beam the center lies: every cell of a window around a first guess votes.

Two things tell the center: the beam's own edge, and Friedel's law, by which a pattern is nearly the
same turned by 180 degrees about its center. The network sees a window around the guess beside the
same window turned; how far a cell's content and its counterpart's lie apart is twice how far the
window is off. Dynamical diffraction makes counterparts unequal and edges uneven, so every cell says
along four directions how far the guess is off, and how sure it is of that: `decode` solves the
weighted least squares of all votes in FP32. Its normal matrix would be the estimate's inverse
covariance, were votes independent and errors normal. They are not, and least of all where electrons
are many or another beam may be the direct one; so the network says besides how wide errors spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import Inversion
from prenet4d_engines.models.layers import Attention, Conv, Down, Residual, unshuffled

IN_CHANNELS: Final = 15
SIDE: Final = 96
"""Bins a side of the window."""
REACH: Final = 12.0
"""How far in bins a guess may be off, along each axis, in training."""
DIRECTIONS: Final = 4
SPREAD: Final = 2 * DIRECTIONS
"""Which of its channels says how wide its errors spread."""
UNSURE: Final = 2.0
"""Sigma in bins from which on the center network may have taken another beam for the direct one."""
_ASYMMETRIC: Final = 1.0
"""Logarithm of the odds, before a pattern is looked at, that its symmetry fails."""
_LEAST_PRECISION: Final = 0.02
"""What is known without a vote: the center is within a few bins of the guess."""


@dataclass(frozen=True)
class RefineConfig:
    """Channels and residual blocks at strides 2, 4 and 8."""

    channels: tuple[int, int, int] = (32, 48, 64)
    blocks: tuple[int, int, int] = (1, 1, 2)
    heads: int = 4


@dataclass(frozen=True)
class Refined:
    """What the votes of n frames say.

    Attributes:
        center: (n, 2) float32, (cy, cx) in frame pixels.
        sigma: (n, 2) float32, one standard deviation of each in pixels, if votes are independent.
        spread: (n, 1) float32, what `settle` multiplies sigmas by, to hold 68.3 % of the errors.
    """

    center: Tensor
    sigma: Tensor
    spread: Tensor


class RefineNet(nn.Module):
    """ResNet trunk with attention on its coarsest map, back to stride 4, nine numbers a cell."""

    def __init__(self, config: RefineConfig | None = None):
        super().__init__()
        self.config = config or RefineConfig()
        c1, c2, c3 = self.config.channels
        b1, b2, b3 = self.config.blocks
        self.stage1 = nn.Sequential(Conv(4 * IN_CHANNELS, c1), *(Residual(c1) for _ in range(b1)))
        self.stage2 = nn.Sequential(Down(c1, c2), *(Residual(c2) for _ in range(b2)))
        self.stage3 = nn.Sequential(
            Down(c2, c3),
            *(Residual(c3) for _ in range(b3)),
            Attention(c3, self.config.heads),
            Residual(c3),
        )
        self.lateral = nn.Conv2d(c3, c2, 1)
        self.pyramid = Residual(c2)
        self.head = nn.Conv2d(c2, SPREAD + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 15, 96, 96) from `prepare` -> votes (n, 9, 24, 24) for `decode`."""
        x1 = self.stage1(unshuffled(x))  # (n, c1, 48, 48)
        x2 = self.stage2(x1)  # (n, c2, 24, 24)
        x3 = self.stage3(x2)  # (n, c3, 12, 12)
        x2 = self.pyramid(x2 + functional.interpolate(self.lateral(x3), scale_factor=2.0))
        votes: Tensor = self.head(x2)
        return votes


def prepare(bins: Bins, guess: Inversion, sigma: Tensor) -> Tensor:
    """Cut the windows around guesses out of binned frames and scale them, in FP32.

    Args:
        bins: The frames.
        guess: What the frames' inversion symmetry says.
        sigma: (n, 2) float32 pixels, how sure the center network is.

    Returns:
        The network's input (n, 15, 96, 96): amplitude, logarithm, blurred logarithm and validity,
        the same turned by 180 degrees, y and x from -1 to 1, and as even planes where between the
        bins the guess lies and how much it is worth.
    """
    counts, device = bins.counts, bins.counts.device
    n, _, height, width = counts.shape
    half = SIDE // 2
    place = bins.place(guess.center) - (half - 0.5)  # (n, 2)
    corner = torch.round(place).long()
    steps = torch.arange(SIDE, device=device)
    rows = corner[:, :1] + half + steps  # (n, 96), in the padded frame
    columns = corner[:, 1:] + half + steps
    rows, columns = rows.clamp(0, height + SIDE - 1), columns.clamp(0, width + SIDE - 1)
    both = torch.cat([counts, bins.near, bins.valid.expand_as(counts)], 1)
    padded = functional.pad(both, (half, half, half, half))
    each = torch.arange(n, device=device)[:, None, None]
    window = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    counts, near, valid = window[:, :1], window[:, 1:2], window[:, 2:]

    level = (counts**2).sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1.0)
    shown = torch.cat(
        [
            (counts / level.clamp_min(1.0)).sqrt(),
            torch.log1p(counts) * 0.25,
            torch.log(near + 0.02) * 0.25,
            valid,
        ],
        1,
    )
    along = ((steps - (half - 0.5)) / half).to(counts.dtype)
    y = along[:, None].expand_as(counts)
    x = along[None, :].expand_as(counts)
    worth = torch.stack(
        [
            guess.counting.log().mean(1) * 0.25,
            guess.asymmetry.log() * 0.25,
            (sigma / bins.factor).log().mean(1) * 0.25,
        ],
        1,
    )
    planes = torch.cat([place - corner, worth], 1)[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    return torch.cat([shown, shown.flip((2, 3)), y, x, planes], 1)


def settle(guess: Inversion, refined: Refined, first: Tensor) -> tuple[Tensor, Tensor]:
    """Move guesses as far as their corrections stand out from the corrections' own doubt.

    For a pattern whose symmetry holds, the guess is as good as the counts allow, and a correction
    is nothing but the votes' noise; where it fails, the correction is many sigma. The probability
    p of the latter grows with the squared length z^2 in sigmas as a logistic function of z^2 / 2.
    On patterns like those of the training nothing is won or lost by that; on measured patterns,
    which differ from them, the votes are noisier.

    Args:
        guess: What the frames' inversion symmetry says.
        refined: What the votes say.
        first: (n, 2) float32 pixels, sigma of the center network.

    Returns:
        (n, 2) float32 centers, the means of both cases by their probabilities, and (n, 2) float32
        sigmas, in pixels: those of a mixture of two normal distributions, the guess's as wide as
        the noise of the counts (or the votes, where those know it better), the corrected one's as
        wide as the votes say, times the spread. Where the center network hesitates between beams,
        how well one of them is known says little, and sigma is not below its own.
    """
    correction = refined.center - guess.center
    length = (correction / refined.sigma).square().sum(1, keepdim=True)
    p = torch.sigmoid(0.5 * length + _ASYMMETRIC)  # (n, 1)
    counted = torch.minimum(guess.factor * guess.counting, refined.sigma)
    variance = torch.lerp(counted.square(), refined.sigma.square(), p)
    variance = variance + p * (1 - p) * correction.square()
    sigma = refined.spread * variance.sqrt()
    unsure = first > UNSURE * guess.factor
    return guess.center + p * correction, torch.where(unsure, torch.maximum(first, sigma), sigma)


def decode(votes: Tensor, guess: Inversion) -> Refined:
    """Solve for the center that all votes (n, 9, H, W) agree on best, in FP32.

    Votes are, per cell and for each of four directions, how far the center is from the guess along
    it, in bins, and the logarithm of its precision; the mean of the last channel is the logarithm
    of the spread.
    """
    votes = votes.float()
    angle = torch.pi * torch.arange(DIRECTIONS, device=votes.device) / DIRECTIONS
    s, c = torch.sin(angle), torch.cos(angle)
    precision = votes[:, DIRECTIONS:SPREAD].clamp(-12.0, 12.0).exp()
    total = precision.sum((2, 3))  # (n, 4)
    weighted = (precision * votes[:, :DIRECTIONS]).sum((2, 3))
    yy = (total * s * s).sum(1) + _LEAST_PRECISION
    xx = (total * c * c).sum(1) + _LEAST_PRECISION
    xy = (total * s * c).sum(1)
    by, bx = (weighted * s).sum(1), (weighted * c).sum(1)
    determinant = (yy * xx - xy * xy).clamp_min(1e-12)
    offset = torch.stack([xx * by - xy * bx, yy * bx - xy * by], 1) / determinant[:, None]
    sigma = (torch.stack([xx, yy], 1) / determinant[:, None]).sqrt()
    spread = votes[:, SPREAD:].mean((2, 3)).clamp(-3.0, 6.0).exp()
    return Refined(guess.center + guess.factor * offset, guess.factor * sigma, spread)
