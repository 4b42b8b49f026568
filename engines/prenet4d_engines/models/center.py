"""Where the direct beam is: a fully convolutional network that says so with its own sigma.

The network reads raw counts in bins. It answers on a grid of stride 4 with a heatmap, a local
offset and a log-sigma per cell; `decode` turns them into pixels in FP32, outside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models.bins import MULTIPLE, Bins
from prenet4d_engines.models.layers import Attention, Conv, Down, Residual, unshuffled

IN_CHANNELS: Final = 6
STRIDE: Final = 4
"""Bins a side of a cell of the output grid."""
HEAT, OFFSET_Y, OFFSET_X, LOG_SIGMA_Y, LOG_SIGMA_X, USABLE = range(6)
LOG_SIGMA_RANGE: Final = (-6.0, 4.0)
OTHERS: Final = 3
"""Beams that are named beside the likeliest one."""
OTHER_SIGMA: Final = 1.0
"""One sigma in bins of where they lie, which only the first look tells; on training materials."""
_SPARED: Final = 32
"""Of so many bins along a side, the network can do without one."""


@dataclass(frozen=True)
class CenterConfig:
    """Width and depth: channels and residual blocks at strides 2, 4, 8 and 16."""

    channels: tuple[int, int, int, int] = (24, 48, 64, 96)
    blocks: tuple[int, int, int, int] = (1, 1, 2, 2)
    heads: int = 4


@dataclass(frozen=True)
class CenterEstimate:
    """Centers of n frames.

    Attributes:
        center: (n, 2) float32, (cy, cx) in frame pixels.
        sigma: (n, 2) float32, one standard deviation of each in pixels.
        usable: (n,) float32, probability that the frame shows a usable beam.
        others: (n, OTHERS, 4) float32, beams that may be the direct one instead, the likeliest
            first: cy, cx and one sigma in frame pixels, and how likely each is in units of the
            beam in `center`; 0 where there are no more.
    """

    center: Tensor
    sigma: Tensor
    usable: Tensor
    others: Tensor


class CenterNet(nn.Module):
    """ResNet trunk, attention on the coarsest map, a small feature pyramid back to stride 4."""

    def __init__(self, config: CenterConfig | None = None):
        super().__init__()
        self.config = config or CenterConfig()
        c1, c2, c3, c4 = self.config.channels
        b1, b2, b3, b4 = self.config.blocks
        self.stem = Conv(4 * IN_CHANNELS, c1)
        self.stage1 = nn.Sequential(*(Residual(c1) for _ in range(b1)))
        self.stage2 = nn.Sequential(Down(c1, c2), *(Residual(c2) for _ in range(b2)))
        self.stage3 = nn.Sequential(Down(c2, c3), *(Residual(c3) for _ in range(b3)))
        self.stage4 = nn.Sequential(
            Down(c3, c4),
            *(Residual(c4) for _ in range(b4)),
            Attention(c4, self.config.heads),
            Residual(c4),
        )
        self.lateral3, self.lateral2 = nn.Conv2d(c4, c3, 1), nn.Conv2d(c3, c2, 1)
        self.pyramid3, self.pyramid2 = Residual(c3), Residual(c2)
        self.head = nn.Sequential(Conv(c2, c2), nn.Conv2d(c2, 5, 1))
        self.usable = nn.Linear(2 * c4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 6, h, w) from `prepare` -> maps (n, 6, h / 4, w / 4) for `decode`."""
        x = unshuffled(x)  # (n, 24, h/2, w/2)
        x1 = self.stage1(self.stem(x))  # (n, c1, h/2, w/2)
        x2 = self.stage2(x1)  # (n, c2, h/4, w/4)
        x3 = self.stage3(x2)  # (n, c3, h/8, w/8)
        x4 = self.stage4(x3)  # (n, c4, h/16, w/16)
        x3 = self.pyramid3(x3 + functional.interpolate(self.lateral3(x4), scale_factor=2.0))
        x2 = self.pyramid2(x2 + functional.interpolate(self.lateral2(x3), scale_factor=2.0))
        maps = self.head(x2)  # (n, 5, h/4, w/4)
        # a beam is in one place, and a mean over all places hardly shows it
        overall = torch.cat([x4.mean((2, 3)), x4.amax((2, 3))], dim=1)
        usable = self.usable(overall)[:, :, None, None]  # (n, 1, 1, 1)
        return torch.cat([maps, usable.expand(-1, -1, maps.shape[2], maps.shape[3])], dim=1)


def prepare(bins: Bins) -> Tensor:
    """Scale binned frames for the network, in FP32.

    Returns:
        The network's input (n, 6, H, W): amplitude, logarithm, blurred logarithm, valid share, and
        the coordinates y and x from -1 to 1 over the frame. Empty bins look like masked pixels,
        under which there may be a beam; so a frame of a few bins more than a multiple of 16 is read
        without those.
    """
    (h, w), factor, counts = bins.frame_shape, bins.factor, bins.counts
    # the intensity that a typical electron sees: at least one count
    level = (counts**2).sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1.0)
    rows = torch.arange(counts.shape[2], device=counts.device, dtype=counts.dtype)
    columns = torch.arange(counts.shape[3], device=counts.device, dtype=counts.dtype)
    y = (rows * factor / (0.5 * h) - 1.0)[:, None].expand_as(counts)
    x = (columns * factor / (0.5 * w) - 1.0)[None, :].expand_as(counts)
    channels = [
        (counts / level.clamp_min(1.0)).sqrt(),
        torch.log1p(counts) * 0.25,
        torch.log(bins.near + 0.02) * 0.25,
        bins.valid.expand_as(counts),
        y,
        x,
    ]
    height, width = (_read(-(-side // factor)) for side in (h, w))
    return torch.cat(channels, dim=1)[:, :, :height, :width]


def _read(side: int) -> int:
    """Return how many of so many bins the network reads: no empty ones, if that costs few."""
    over = side % MULTIPLE
    return side - over if over <= max(1, side // _SPARED) else side - over + MULTIPLE


def at_cell(maps: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Read center and log-sigma from the 3x3 cells around a cell, in bins.

    Args:
        maps: (n, 6, H, W) float32.
        cell: (n, 2) int64 row and column of the middle cell.

    Returns:
        (n, 2) center and (n, 2) log-sigma, [y, x], averaged with the softmax of the heatmap over
        the nine cells.
    """
    n, _, height, width = maps.shape
    steps = torch.arange(-1, 2, device=maps.device)
    rows = cell[:, 0, None, None] + steps[None, :, None]  # (n, 3, 1)
    columns = cell[:, 1, None, None] + steps[None, None, :]  # (n, 1, 3)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (n, 3, 3)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = (rows * width + columns).view(n, 1, 9)
    near = maps.flatten(2).gather(2, index.expand(-1, maps.shape[1], -1))  # (n, 6, 9)
    heat = near[:, HEAT].masked_fill(~inside.view(n, 9), float("-inf"))
    weight = heat.softmax(-1)[:, None]  # (n, 1, 9)
    corner = torch.stack([rows.expand(n, 3, 3), columns.expand(n, 3, 3)], 1).view(n, 2, 9)
    place = STRIDE * (corner + near[:, OFFSET_Y : OFFSET_X + 1]) + 0.5 * (STRIDE - 1)
    log_sigma = near[:, LOG_SIGMA_Y : LOG_SIGMA_X + 1].clamp(*LOG_SIGMA_RANGE)
    return (weight * place).sum(-1), (weight * log_sigma).sum(-1)


def likely_cells(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the direct beam may be, the cell to settle on first.

    That is the peak of the heatmap from which the direct beam is the least far off on average, if
    the heatmap is right about the probability of each cell: where nothing tells which of a
    lattice's beams it is, the one amid them. Mostly it is the highest peak.

    Returns:
        (n, 1 + OTHERS, 2) int64 row and column of the highest peaks, after the first the likeliest
        first; and (n, 1 + OTHERS) logarithms of how likely they are, in units of the first.
    """
    heat = maps[:, HEAT]
    n, height, width = heat.shape
    lower = heat < functional.max_pool2d(heat, 3, stride=1, padding=1)
    peaks = heat.masked_fill(lower, float("-inf")).flatten(1).topk(1 + OTHERS)
    rows, columns = peaks.indices // width, peaks.indices % width  # (n, 1 + OTHERS)
    down = torch.arange(height, device=maps.device) - rows[:, :, None]
    right = torch.arange(width, device=maps.device) - columns[:, :, None]
    far = (down.square()[:, :, :, None] + right.square()[:, :, None, :]).sqrt()
    likely = heat.flatten(1).softmax(1)
    risk = (far.view(n, 1 + OTHERS, height * width) @ likely[:, :, None])[:, :, 0]
    first = risk.masked_fill(peaks.values.isneginf(), float("inf")).argmin(1, keepdim=True)
    order = peaks.values.scatter(1, first, float("inf")).argsort(1, descending=True)
    cells = torch.stack([rows, columns], 2).gather(1, order[:, :, None].expand(-1, -1, 2))
    values = peaks.values.gather(1, order)
    return cells, values - values[:, :1]


def decode(maps: Tensor, bins: Bins) -> CenterEstimate:
    """Turn the network's maps (n, 6, H, W) into centers in frame pixels, in FP32.

    Cells that lie wholly beyond the frame take no part: a center there is an edge cell's to tell.
    """
    h, w = (-(-side // (bins.factor * STRIDE)) for side in bins.frame_shape)
    maps = maps[:, :, :h, :w].float()
    cells, odds = likely_cells(maps)
    place, log_sigma = at_cell(maps, cells[:, 0])
    others = [bins.pixels(at_cell(maps, cells[:, k])[0]) for k in range(1, 1 + OTHERS)]
    sigmas = torch.full_like(odds[:, 1:], OTHER_SIGMA * bins.factor)
    return CenterEstimate(
        center=bins.pixels(place),
        sigma=bins.factor * log_sigma.exp(),
        usable=maps[:, USABLE].mean((1, 2)).sigmoid(),
        others=torch.cat([torch.stack(others, 1), torch.stack([sigmas, odds[:, 1:].exp()], 2)], 2),
    )
