"""What everything that looks for centers reads: raw counts summed to about 128 x 128 bins.

Sums lose no electron and keep Poisson noise. A frame is binned once; the center network, the
inversion symmetry and the refining network all read the same bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import Tensor
from torch.nn import functional

from prenet4d_engines.models.layers import box_sum

BINS: Final = 128
"""The smaller side of a frame is binned to about this many."""
MULTIPLE: Final = 16
"""Sides of the binned frames are multiples of this."""


@dataclass(frozen=True)
class Bins:
    """n frames summed over squares of pixels; bin k lies at ``factor * k + (factor - 1) / 2``.

    Attributes:
        frame_shape: (h, w) of the frames in pixels.
        factor: Pixels a side of a bin.
        counts: (n, 1, H, W) float32, for what invalid pixels would have held, too; bins without
            valid pixels are added below and on the right, up to multiples of 16.
        valid: (n, 1, H, W) float32, the valid share of each bin, or (1, 1, H, W) where one mask
            serves all frames.
    """

    frame_shape: tuple[int, int]
    factor: int
    counts: Tensor
    valid: Tensor

    @classmethod
    def of(cls, frames: Tensor, mask: Tensor) -> Bins:
        """Bin raw frames.

        Args:
            frames: (n, h, w) float32 counts.
            mask: (h, w) or (n, h, w) bool, True where the pixel is valid.
        """
        h, w = frames.shape[1:]
        factor = bin_factor((h, w))
        step = factor * MULTIPLE
        valid = mask.to(frames.dtype).reshape(-1, 1, h, w)
        counts = frames[:, None] * valid
        if h % step or w % step:
            pad = (0, -w % step, 0, -h % step)
            counts, valid = functional.pad(counts, pad), functional.pad(valid, pad)
        if factor > 1:
            counts = functional.avg_pool2d(counts, factor) * factor**2
            valid = functional.avg_pool2d(valid, factor)
        return cls((h, w), factor, counts / valid.clamp_min(1.0 / factor**2), valid)

    @cached_property
    def near(self) -> Tensor:
        """(n, 1, H, W) mean counts of the bins in 5 x 5 that saw anything, 0 where none did."""
        seen = (self.valid > 0).to(self.counts.dtype)
        return box_sum(self.counts * seen, 5) / box_sum(seen, 5).clamp_min(1.0)

    def place(self, pixels: Tensor) -> Tensor:
        """Return where positions in frame pixels lie in bins."""
        return (pixels - 0.5 * (self.factor - 1)) / self.factor

    def pixels(self, place: Tensor) -> Tensor:
        """Return where positions in bins lie in frame pixels."""
        return self.factor * place + 0.5 * (self.factor - 1)


def bin_factor(frame_shape: tuple[int, int]) -> int:
    """Return how many pixels a side go into one bin of a frame of this ``(h, w)``."""
    return max(1, round(min(frame_shape) / BINS))
