"""A pattern looks the same turned by 180 degrees about its center, or nearly so.

The center network knows *which* beam is the direct one; where exactly its center lies, Friedel's
law says: the frame's correlation with itself turned by 180 degrees, ``A(s) = sum_p f(p) f(s - p)``,
peaks at twice the center. It is evaluated only within a short reach of the network's answer, where
no other beam can win, from one Fourier transform, in FP32 and on any device. How far the law holds
for this pattern is left to `refine`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from prenet4d_engines.models.bins import Bins

REACH: Final = 2.0
"""The refined center lies within this many bins of the network's, along each axis."""
_STEP: Final = 0.25
"""Step in bins at which the correlation is evaluated; a parabola gives the rest."""
_GUESS_SIGMA: Final = 0.2
"""Sigma in bins of a guess at the right beam, on training materials."""
_BLUR: Final = 1.0
"""Sigma in bins of the Gaussian that single electrons are smoothed with."""


@dataclass(frozen=True)
class Inversion:
    """What the inversion symmetry of n frames says.

    Attributes:
        factor: Pixels a side of a bin.
        center: (n, 2) float32, in frame pixels: the guess moved toward the symmetry's maximum, by
            how much less noise that has; the guess itself where no maximum lies within reach.
        counting: (n, 2) float32, in bins, sigma that Poisson noise alone would leave.
        asymmetry: (n,) float32, 0 for perfect symmetry, at most 1.
    """

    factor: int
    center: Tensor
    counting: Tensor
    asymmetry: Tensor


def inversion(bins: Bins, guess: Tensor) -> Inversion:
    """Look for the center of inversion near a guess and average both by their precision.

    Args:
        bins: The frames, n > 0; what was not seen counts as 0.
        guess: (n, 2) float32, (cy, cx) in frame pixels.
    """
    smooth = _blurred((bins.counts * bins.valid)[:, 0])
    n, device = len(smooth), smooth.device
    middle = bins.place(guess)

    reach = round(2 * REACH / _STEP)
    steps = torch.arange(-reach, reach + 1, device=device)
    places = 2 * middle[:, :, None] + steps.to(middle) * _STEP  # (n, 2, k): s along y and x
    map_ = _self_correlation(smooth, places)  # (n, k, k)

    k = len(steps)
    best = map_.flatten(1).argmax(1)
    row, column = best // k, best % k
    inside = (row > 0) & (row < k - 1) & (column > 0) & (column < k - 1)
    row, column = row.clamp(1, k - 2), column.clamp(1, k - 2)
    each = torch.arange(n, device=device)
    y = places[each, 0, row] + _STEP * _vertex(*(map_[each, row + i, column] for i in (-1, 0, 1)))
    x = places[each, 1, column] + _STEP * _vertex(
        *(map_[each, row, column + i] for i in (-1, 0, 1))
    )
    counting = _counting_sigma(smooth)
    # Where electrons are few, symmetry is noisier than the guess: their mean has the least error.
    share = 1 / (1 + (counting / _GUESS_SIGMA) ** 2)
    share = share * inside[:, None]
    center = guess + share * (bins.pixels(torch.stack([y, x], 1) / 2) - guess)

    asymmetry = 1 - map_[each, row, column] / smooth.square().sum((1, 2)).clamp_min(1e-12)
    return Inversion(
        factor=bins.factor,
        center=center,
        counting=counting,
        asymmetry=asymmetry.clamp(1e-6, 1.0),
    )


def _blurred(counts: Tensor) -> Tensor:
    """Smooth with a Gaussian: convolutions of one channel are slow."""
    return (blur_by_shifts if counts.device.type == "cpu" else blur_by_products)(counts)


def blur_by_shifts(counts: Tensor) -> Tensor:
    """Smooth as a CPU does it: by sums of shifted views."""
    reach = math.ceil(3 * _BLUR)
    taps = [math.exp(-0.5 * (at / _BLUR) ** 2) for at in range(-reach, reach + 1)]
    taps = [tap / sum(taps) for tap in taps]
    _, h, w = counts.shape
    padded = functional.pad(counts, (reach, reach, reach, reach))
    rows, blurred = torch.zeros_like(padded[:, :h]), torch.zeros_like(counts)
    for i, tap in enumerate(taps):
        rows.add_(padded[:, i : i + h], alpha=tap)
    for i, tap in enumerate(taps):
        blurred.add_(rows[:, :, i : i + w], alpha=tap)
    return blurred


def blur_by_products(counts: Tensor) -> Tensor:
    """Smooth as a GPU does it: by a product with a banded matrix on either side."""
    down, across = (_band(size, counts) for size in counts.shape[1:])
    return down @ counts @ across


def _band(size: int, like: Tensor) -> Tensor:
    """(size, size), symmetric: the matrix that smooths a column of bins."""
    reach = math.ceil(3 * _BLUR)
    total = sum(math.exp(-0.5 * (at / _BLUR) ** 2) for at in range(-reach, reach + 1))
    at = torch.arange(size, device=like.device, dtype=like.dtype)
    apart = (at - at[:, None]).abs()
    return (-0.5 * (apart / _BLUR) ** 2).exp().mul_(apart <= reach) / total


def _self_correlation(image: Tensor, places: Tensor) -> Tensor:
    """Return ``sum_p f(p) f(s - p)``, (n, k, k), at the products of places (n, 2, k)."""
    h, w = image.shape[1:]
    # Twice the size keeps the correlation from wrapping around.
    spectrum = torch.fft.rfft2(image, s=(2 * h, 2 * w)).square()
    fy = torch.fft.fftfreq(2 * h, device=image.device, dtype=torch.float64)
    fx = torch.fft.rfftfreq(2 * w, device=image.device, dtype=torch.float64)
    twice = torch.full_like(fx, 2.0)  # the other half of the spectrum
    twice[:1] = twice[-1:] = 1.0  # slices: a single element would be copied from the host
    y, x = places.double().unbind(1)
    rows = torch.polar(torch.ones_like(fy), 2 * torch.pi * y[:, :, None] * fy)
    columns = torch.polar(twice[:, None], 2 * torch.pi * fx[:, None] * x[:, None, :])
    summed: Tensor = rows.to(spectrum.dtype) @ spectrum @ columns.to(spectrum.dtype)
    return summed.real / (4 * h * w)


def _vertex(before: Tensor, top: Tensor, after: Tensor) -> Tensor:
    """Return the offset in steps of the vertex of a parabola through three values."""
    curvature = before - 2 * top + after
    return torch.where(curvature < 0, 0.5 * (before - after) / curvature.clamp_max(-1e-30), 0.0)


def _counting_sigma(image: Tensor) -> Tensor:
    """Return what Poisson noise alone would leave: sigma of the center (n, 2) in bins.

    With the gradient g of the expectation f, ``sigma^2 = sum f g^2 / (sum g^2)^2``; as far as is
    looked where there is no gradient.
    """
    inner = image[:, 1:-1, 1:-1]
    squared = (  # of twice the gradient
        (image[:, 2:, 1:-1] - image[:, :-2, 1:-1]).square(),
        (image[:, 1:-1, 2:] - image[:, 1:-1, :-2]).square(),
    )
    totals = torch.stack([each.sum((1, 2)) for each in squared], 1)
    noise = torch.stack([(inner * each).sum((1, 2)) for each in squared], 1)
    sigmas = 2 * noise.sqrt() / totals.clamp_min(4e-12)
    return torch.where(totals > 0, sigmas.clamp_min(1e-6), REACH)
