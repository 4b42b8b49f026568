"""From counts to rates: a small U-Net that sees every noise level as the same noise.

Poisson noise of n counts has variance n; 2 sqrt(n + 3/8) has variance one (Anscombe 1948). The
network reads differences in that domain, logarithms for the scale, and returns a *residual in
units of the noise*. `stabilise` and `restore` do everything that needs FP32 outside the engine:
the residual is added to a baseline that is the pixel itself where counts are many and its
neighbourhood's mean where they are few. So a half-precision engine never has to carry a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models.layers import box_sum, unshuffled

IN_CHANNELS: Final = 4
WINDOW: Final = 5
"""Side in px of the windows whose counts the network may not contradict."""
_CONSISTENT: Final = 1.5
"""Largest difference of the square roots of counts: three standard deviations."""
_MANY: Final = 500.0
"""Counts of a window, its middle pixel's left out, from which on it also has a lower bound."""
_EVEN: Final = 0.2
"""... and the share of the window's mean that the middle pixel must reach for that."""
MULTIPLE: Final = 16
"""Sides of the network's input are multiples of this."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Channels at strides 2, 4, 8 and 16, and residual blocks per level and direction."""

    channels: tuple[int, int, int, int] = (24, 32, 64, 96)
    blocks: int = 1
    heads: int = 4


@dataclass(frozen=True)
class Stabilised:
    """What `restore` needs to return to counts.

    Attributes:
        baseline: (n, h, w) float32, 2 sqrt(rate) that the residual is added to.
        valid: (n, h, w) float32, 1 where the pixel is valid, else 0.
        electrons: (n,) float32, counts in the valid pixels.
        least: (n, h, w) float32, fewest counts that the window around each pixel may end up with.
        most: (n, h, w) float32, the same for the highest number.
    """

    baseline: Tensor
    valid: Tensor
    electrons: Tensor
    least: Tensor
    most: Tensor


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity; no normalisation, the input is already scaled."""

    def __init__(self, channels: int):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        change: Tensor = self.two(functional.relu(self.one(functional.relu(x))))
        return x + change


class ChannelAttention(nn.Module):
    """Attention between channels (as in Restormer, Zamir et al. 2022): linear in the pixels.

    It gathers the whole frame at any size, with a cost that does not grow with its square.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, self.heads, c // self.heads, h * w).unbind(1)
        # root mean squares, not norms: means over many pixels stay inside FP16's range
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-3)
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-3) * (1.0 / (h * w))
        weight = (q @ k.transpose(-1, -2) * self.temperature).softmax(-1)  # (n, heads, d, d)
        mixed: Tensor = self.out((weight @ v).reshape(n, c, h, w))
        return x + mixed


class Denoiser(nn.Module):
    """U-Net on the pixel-unshuffled frame, skips added, attention at the bottom."""

    def __init__(self, config: DenoiserConfig | None = None):
        super().__init__()
        self.config = config or DenoiserConfig()
        channels, blocks = self.config.channels, self.config.blocks

        def level(width: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width) for _ in range(blocks)))

        self.stem = nn.Conv2d(4 * IN_CHANNELS, channels[0], 3, padding=1)
        self.encoders = nn.ModuleList(level(c) for c in channels[:-1])
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.bottom = nn.Sequential(
            Block(channels[-1]),
            ChannelAttention(channels[-1], self.config.heads),
            Block(channels[-1]),
        )
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(channels))
        self.decoders = nn.ModuleList(level(c) for c in channels[:-1])
        self.head = nn.Conv2d(channels[0], 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, h, w) from `stabilise` -> residual in units of noise (n, 1, h, w)."""
        x = self.stem(unshuffled(x))  # (n, c0, h/2, w/2)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)  # (n, c_k, h / 2^(k+1), w / 2^(k+1))
        x = self.bottom(x)
        for decoder, up, skip in zip(
            reversed(self.decoders), reversed(self.ups), reversed(skips), strict=True
        ):
            x = decoder(skip + functional.interpolate(up(x), scale_factor=2.0))
        return functional.pixel_shuffle(self.head(functional.relu(x)), 2)  # (n, 1, h, w)


def _mean_around(counts: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean of the valid pixels around each, and their share.

    Weights fall linearly to the sides, over 2 size - 1 pixels: where counts are few, the edges of
    an even window around each of them would be seen in the result.
    """
    total, number = (box_sum(box_sum(x, size), size) for x in (counts, valid))
    return total / number.clamp_min(1e-6), number / size**4


def _bounds(counts: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    """Fewest and most counts that are consistent with what was counted around each pixel.

    Twice the square root of counts has a standard deviation of one. There is no lower bound where a
    window's counts are few, or in one pixel alone (a hot one), or not in its middle.
    """
    root = around.sqrt()
    many = (around - counts > _MANY) & (counts > _EVEN / WINDOW**2 * around)
    least = torch.where(many, (root - _CONSISTENT).square(), 0.0)
    return least, (root + _CONSISTENT).square()


def _asinh(x: Tensor) -> Tensor:
    """`torch.asinh`, to 10⁻⁶, in steps that torch computes with vectors on a CPU."""
    if x.device.type != "cpu":
        return torch.asinh(x)
    return torch.copysign(torch.log(x.abs() + (x * x + 1.0).sqrt()), x)


def stabilise(frames: Tensor, mask: Tensor) -> tuple[Tensor, Stabilised]:
    """Scale frames for the network, in FP32.

    Args:
        frames: (n, h, w) float32 counts, not negative.
        mask: (h, w) or (n, h, w) bool, True where the pixel is valid; other pixels are filled
            from their surroundings.

    Returns:
        The network's input (n, 4, H, W), H and W padded to multiples of 16 by replication: the
        pixel's deviation from its neighbourhood in units of noise (asinh), the logarithms of the
        pixel and of its wide neighbourhood (the noise level), and the mask; and what `restore`
        needs. All values stay within +-10 for any count up to 10^6.
    """
    n, h, w = frames.shape
    # (n, 1, h, w), or (1, 1, h, w) where one mask serves all frames
    valid = mask.to(frames.dtype).reshape(-1, 1, h, w)
    counts = frames[:, None] * valid
    near, near_share = _mean_around(counts, valid, 3)
    wide, wide_share = _mean_around(counts, valid, 7)
    electrons = counts.sum((2, 3), keepdim=True)
    overall = electrons / valid.sum((2, 3), keepdim=True).clamp_min(1.0)
    wide = torch.where(wide_share > 1e-6, wide, overall)
    near = torch.where(near_share > 1e-6, near, wide)
    filled = torch.where(valid > 0, counts, near)

    trust = near / (near + 3.0) * valid
    baseline = 2.0 * (torch.lerp(wide, filled, trust) + 1e-4).sqrt()
    deviation = 2.0 * ((filled + 0.375).sqrt() - (near + 0.375).sqrt())
    channels = [
        _asinh(deviation),
        torch.log1p(filled) * 0.5,
        torch.log(wide + 1e-3) * 0.5,
        valid.expand(n, 1, h, w),
    ]
    x = torch.cat(channels, 1)
    if w % MULTIPLE or h % MULTIPLE:
        x = functional.pad(x, (0, -w % MULTIPLE, 0, -h % MULTIPLE), mode="replicate")
    least, most = _bounds(counts, box_sum(counts, WINDOW))
    context = Stabilised(baseline[:, 0], valid[:, 0], electrons.flatten(), least[:, 0], most[:, 0])
    return x, context


def restore(y: Tensor, context: Stabilised) -> Tensor:
    """Turn the network's residual (n, 1, H, W) into rates in counts (n, h, w), float32, > 0.

    Each frame is scaled to hold as many electrons in its valid pixels as were counted there: the
    network moves electrons, it does not make them. The factor is bounded to [1/2, 2], so a frame
    without a count keeps a finite rate. Then, where the window around a pixel holds three standard
    deviations of Poisson noise more or less than was counted in it, the pixel is scaled as the
    window would have to be: what the network put there beyond that, it has made up.
    """
    h, w = context.baseline.shape[1:]
    value = context.baseline + y[:, 0, :h, :w].float()
    # a smooth positive part: the gradient never dies where the rate is nearly zero
    root = (0.25 * (value + torch.sqrt(value * value + 4e-4))).clamp_min(5e-5)
    rate = root.square()
    counted = rate * context.valid
    factor = (context.electrons / counted.sum((1, 2)).clamp_min(1e-12)).clamp(0.5, 2.0)
    around = box_sum(counted[:, None], WINDOW)[:, 0].clamp_min(1e-12)
    # of the windows, and so of their pixels, once the frame is scaled
    wanted = torch.clamp(around * factor[:, None, None], context.least, context.most)
    return rate * (wanted / around)
