"""The one resampling that corrects a pattern, and the shift that feeds the running mean.

Both interpolate with cubic convolution (Keys 1981, a = −½, "Catmull-Rom"): it reproduces linear and
quadratic intensity exactly, so centroids do not move, and reaches over 4×4 pixels only, so a bad
pixel stays local. torch's own bicubic kernel has a = −¾, which moves centroids by up to 0.05 px.
Keys' kernel is linear in a, and at a = 0 it is a bilinear one with the fraction f replaced by
3f² − 2f³; hence ⅔ of torch's bicubic and ⅓ of such a bilinear sampling, both fast on every device.
(In two dimensions that sum differs from the product of two 1-D kernels by a term in xy of at most
0.005 px²; constants, gradients and curvatures along the axes come out exact.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from prenet4d_engines.geometry import Ellipticity

MIN_VALID_WEIGHT = 0.8
"""A pixel whose valid neighbours carry less of the interpolation weight than this becomes NaN."""


def resample(
    images: Tensor,
    centers: Tensor,
    reference: tuple[float, float],
    ellipticity: Ellipticity,
    valid: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Center and undistort images in one interpolation: out(p) = image(c + D (p − c_ref)).

    All channels of an image move alike, so that several outputs of one frame cost one set of
    coordinates. The Jacobian is 1: counts are preserved. A pixel whose source lies outside the
    image is NaN. Invalid pixels never bleed into others: their weight in the interpolation is
    shared among the valid ones, and where too little remains (``MIN_VALID_WEIGHT``) the result
    is NaN.

    Args:
        images: (n, k, h, w) float32, finite.
        centers: (n, 2) ``[cy, cx]`` of each image, pixels.
        reference: ``(cy, cx)`` where the centers shall lie afterwards.
        ellipticity: the distortion to take out.
        valid: (h, w) bool, ``False`` where a pixel is not to be trusted; ``None``: all are.
        out: takes the result, where given.

    Returns:
        (n, k, h, w) float32, NaN where there is no source.
    """
    n, k, h, w = images.shape
    device = images.device
    if valid is not None:
        weights = valid.to(images.dtype).expand(n, 1, h, w)
        images = torch.cat((torch.where(valid, images, 0.0), weights), dim=1)
    D = torch.as_tensor(ellipticity.matrix, dtype=torch.float64)
    size = torch.tensor((w, h), dtype=torch.float64)
    # In double until the offsets are small: source (x, y) = column part + row part + center part,
    # in grid_sample's coordinates, where −1 and 1 are the centers of the first and last pixel.
    scale = 2 / (size - 1).clamp(min=1)
    columns = (D[:, :1] * (torch.arange(w) - reference[1])) * scale[:, None]
    rows = (D[:, 1:] * (torch.arange(h) - reference[0])) * scale[:, None]
    middles = centers.to("cpu", torch.float64).flip(1) * scale - 1
    columns, rows, middles = (t.to(device, torch.float32) for t in (columns, rows, middles))
    half = ((size - 1) / 2).to(device, torch.float32)[:, None, None]
    tolerance = 1 + 1e-3 * scale.to(device, torch.float32)[:, None, None]

    if out is None:
        out = torch.empty((n, k, h, w), dtype=torch.float32, device=device)
    step = 4 if device.type == "cpu" else n  # a few at a time: the coordinates stay in the cache
    for start in range(0, n, step):
        part = slice(start, start + step)
        grid = (middles[part, :, None] + columns)[:, :, None, :] + rows[:, :, None]  # (m, 2, h, w)
        outside = (grid.abs() > tolerance).any(1, keepdim=True)
        cubic = _sample(images[part], grid, "bicubic")
        grid.add_(1).mul_(half)
        whole = grid.floor()
        fraction = grid.sub_(whole)
        smooth = (3 - 2 * fraction).mul_(fraction).mul_(fraction)
        grid = smooth.add_(whole).div_(half.clamp(min=0.5)).sub_(1)
        sampled = torch.lerp(_sample(images[part], grid, "bilinear"), cubic, 2 / 3)
        if valid is not None:
            weight = sampled[:, k:]
            outside |= weight < MIN_VALID_WEIGHT
            sampled = sampled[:, :k] / weight
        out[part] = sampled.masked_fill_(outside, math.nan)
    return out


def _sample(images: Tensor, grid: Tensor, mode: str) -> Tensor:
    return functional.grid_sample(
        images, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="border", align_corners=True
    )


def recentered_sum(
    images: Tensor, shifts: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add up images, each moved by its own shift, and the interpolation weights beside them.

    Sums of different images merge by addition; the mean is sum / weight where the weight counts.
    Being separable, this costs a tenth of :func:`resample`.

    Args:
        images: (n, h, w) float32; invalid pixels are left out whatever they hold.
        shifts: (n, 2) ``[dy, dx]``, pixels: out(p + shift) takes image(p).
        valid: (h, w) bool, ``False`` where a pixel is not to be trusted; ``None``: all are.

    Returns:
        sum (h, w) float32, weight (h, w) float32: 1 per image where all of its pixels are valid.
    """
    _, h, w = images.shape
    total = torch.zeros((h, w), dtype=torch.float32, device=images.device)
    weight = torch.zeros_like(total)
    column, row = torch.ones_like(total[:, :1]), torch.ones_like(total[:1])
    mask = None if valid is None else valid.to(torch.float32)
    for image, (dy, dx) in zip(images, shifts.tolist(), strict=True):
        if mask is None:
            _add_moved(total, image, dy, dx)
            weight.addmm_(_moved(column, dy, 0), _moved(row, dx, 1))
        else:
            _add_moved(total, torch.where(mask > 0, image, 0.0), dy, dx)
            _add_moved(weight, mask, dy, dx)
    return total, weight


def _add_moved(total: Tensor, image: Tensor, dy: float, dx: float) -> None:
    _moved(_moved(image, dy, 0), dx, 1, into=total)


def _moved(image: Tensor, shift: float, dim: int, into: Tensor | None = None) -> Tensor:
    """Move an image along one axis, with zeros beyond its border; add it to ``into`` if given."""
    out = torch.zeros_like(image) if into is None else into
    size = image.shape[dim]
    base = math.floor(-shift)
    for offset, weight in zip(range(base - 1, base + 3), _taps(-shift - base), strict=True):
        first, last = max(0, -offset), min(size, size - offset)
        if weight and first < last:
            source = image.narrow(dim, first + offset, last - first)
            out.narrow(dim, first, last - first).add_(source, alpha=weight)
    return out


def _taps(f: float) -> tuple[float, float, float, float]:
    """Keys' cubic convolution kernel, a = −½, for the pixels at −1, 0, 1, 2 around fraction f."""
    f2, f3 = f * f, f * f * f
    return (
        -0.5 * f3 + f2 - 0.5 * f,
        1.5 * f3 - 2.5 * f2 + 1,
        -1.5 * f3 + 2 * f2 + 0.5 * f,
        0.5 * f3 - 0.5 * f2,
    )
