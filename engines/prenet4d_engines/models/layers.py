"""What the networks share: residual convolutions, attention, halving, all FP16-safe; a box sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """3x3 convolution, batch norm, optional ReLU; zero padding, or circular along columns."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = True, circular: bool = False):
        super().__init__()
        self.circular = circular
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=(1, 0 if circular else 1), bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h, w)."""
        if self.circular:
            x = torch.cat([x[..., -1:], x, x[..., :1]], dim=-1)
        x = self.norm(self.conv(x))
        return functional.relu(x) if self.relu else x


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int, *, circular: bool = False):
        super().__init__()
        self.one = Conv(channels, channels, circular=circular)
        self.two = Conv(channels, channels, relu=False, circular=circular)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        return functional.relu(x + self.two(self.one(x)))


class Down(nn.Module):
    """Halve both sides by a 2x2 convolution: cells merge without overlap, none is favoured."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / 2, w / 2)."""
        return functional.relu(self.norm(self.conv(x)))


class Attention(nn.Module):
    """Self-attention over all cells of a coarse map, added to it."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm2d(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        n, c, h, w = x.shape
        d = c // self.heads
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, d, h * w).unbind(1)
        # both factors are scaled before the product: no intermediate leaves FP16's range
        scores = (q * d**-0.25).transpose(-1, -2) @ (k * d**-0.25)  # (n, heads, hw, hw)
        mixed = v @ scores.softmax(-1).transpose(-1, -2)  # (n, heads, d, hw)
        change: Tensor = self.out(mixed.reshape(n, c, h, w))
        return x + change


def unshuffled(x: Tensor) -> Tensor:
    """`pixel_unshuffle` by 2: (n, c, h, w) -> (n, 4 c, h / 2, w / 2).

    In bfloat16 on a CPU two neighbours in a row are moved as one number of 32 bits, straight to
    where the channels of a pixel lie side by side: in less than half of the time.
    """
    n, c, h, w = x.shape
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return functional.pixel_unshuffle(x, 2)
    pairs = x.view(torch.int32).view(n, c, h // 2, 2, w // 2)
    beside = pairs.permute(0, 2, 4, 1, 3).reshape(n, h // 2, w // 2, 2 * c)
    return beside.view(torch.bfloat16).permute(0, 3, 1, 2)


def box_sum(x: Tensor, size: int) -> Tensor:
    """Sum over a size x size window around each pixel of (n, 1, h, w), zeros beyond the border."""
    return sum_by_shifts(x, size) if x.device.type == "cpu" else sum_by_pooling(x, size)


def sum_by_shifts(x: Tensor, size: int) -> Tensor:
    """`box_sum` as a CPU does it: adding shifted views is 20 times as fast there as pooling."""
    half = size // 2
    rows = _sum_of_next(functional.pad(x, (half, half)), size, 3)
    return _sum_of_next(functional.pad(rows, (0, 0, half, half)), size, 2)


def _sum_of_next(x: Tensor, size: int, dim: int) -> Tensor:
    """Sum each value along a dimension and the ``size`` - 1 after it, from sums of half as many."""
    if size == 1:
        return x
    half, odd = divmod(size, 2)
    length = x.shape[dim] - size + 1
    halves = _sum_of_next(x, half, dim)
    total = halves.narrow(dim, 0, length) + halves.narrow(dim, half, length)
    return total.add_(x.narrow(dim, size - 1, length)) if odd else total


def sum_by_pooling(x: Tensor, size: int) -> Tensor:
    """`box_sum` as a GPU does it: pooling reads and writes each pixel once along either axis."""
    half = size // 2
    rows = functional.avg_pool2d(x, (1, size), 1, (0, half), divisor_override=1)
    return functional.avg_pool2d(rows, (size, 1), 1, (half, 0), divisor_override=1)
