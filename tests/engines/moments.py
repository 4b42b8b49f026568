"""A backend that reads plain ring patterns by their moments instead of by networks.

It takes the same inputs and returns the same maps as the networks do, so that the corrector's own
work (geometry, track, calibration, states) can be tested whatever the shipped weights can do.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from prenet4d_engines.models import center, ellipse, refine

T = TypeVar("T")


class MomentBackend:
    name = "moments"
    description = "Center of mass and ring radius; for tests."
    device = torch.device("cpu")

    def spread(self, work: Callable[[slice], T], n: int) -> list[T]:
        """In two parts, so that what is put together again is tested, too."""
        half = -(-n // 2)
        return [work(slice(at, min(at + half, n))) for at in range(0, n, half)]

    def denoise(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 1, *x.shape[2:])

    def refine(self, x: Tensor) -> Tensor:
        """No vote against the guess, and no doubt about it."""
        votes = torch.zeros(len(x), refine.SPREAD + 1, 24, 24)
        votes[:, refine.DIRECTIONS : refine.SPREAD] = -2.0  # 0.08 bins in all
        return votes

    def center(self, x: Tensor) -> Tensor:
        """Center of mass; no beam where the brightest pixel does not stand out."""
        n, _, h, w = x.shape
        counts = torch.expm1(4 * x[:, 1].double())
        total = counts.sum((1, 2)).clamp(min=1e-9)
        maps = torch.zeros(n, 6, h // center.STRIDE, w // center.STRIDE)
        maps[:, center.HEAT] = -50
        for axis, size in ((1, h), (2, w)):
            along = torch.arange(size, dtype=torch.float64)
            mean = (counts.sum(3 - axis) * along).sum(1) / total
            cell = (mean - 0.5 * (center.STRIDE - 1)) / center.STRIDE
            if axis == 1:
                row, dy = cell.round().long(), cell - cell.round()
            else:
                column, dx = cell.round().long(), cell - cell.round()
        each = torch.arange(n)
        maps[each, center.HEAT, row, column] = 50
        maps[each, center.OFFSET_Y, row, column] = dy.float()
        maps[each, center.OFFSET_X, row, column] = dx.float()
        log_sigma = (30 / total.sqrt()).log().float()[:, None, None]
        maps[:, center.LOG_SIGMA_Y] = maps[:, center.LOG_SIGMA_X] = log_sigma
        stands_out = counts.amax((1, 2)) > 10 * counts.mean((1, 2))
        maps[:, center.USABLE] = torch.where(stands_out, 50.0, -50.0)[:, None, None]
        return maps

    def ellipse(self, x: Tensor) -> Tensor:
        """Second harmonic of ln(radius) over the azimuth; sigma 0.002."""
        amplitude = x[:, 0].double() ** 2
        rows, columns = amplitude.shape[1:]
        log_radius = torch.arange(rows) / rows * -math.log(ellipse.INNERMOST)
        radius = (amplitude * log_radius[:, None]).sum(1) / amplitude.sum(1)
        phi = 2 * torch.pi * (torch.arange(columns) + 0.5) / columns
        v0 = 4 * (radius * torch.cos(2 * phi)).mean(1)[:, None]
        v1 = 4 * (radius * torch.sin(2 * phi)).mean(1)[:, None]
        phi = 2 * torch.pi * (torch.arange(columns // 8) + 0.5) / (columns // 8)
        c, s = torch.cos(2 * phi), torch.sin(2 * phi)
        votes = torch.zeros(len(x), ellipse.SPREAD + 1, rows // 8, columns // 8)
        votes[:, 0] = ((v0 * c + v1 * s) / ellipse.SCALE)[:, None].float()
        votes[:, 1] = ((v1 * c - v0 * s) / ellipse.SCALE)[:, None].float()
        return votes
