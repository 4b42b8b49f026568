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
from typing import TypeVar

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

    Returns:
        (n, k, h, w) float32, NaN where there is no source.
    """
    motion = (torch.as_tensor(ellipticity.matrix), torch.tensor(reference, dtype=torch.float64))
    matrix, origin = (part.to(images.device) for part in motion)
    centers = centers.to(images.device, torch.float64)
    return resample_by(images, centers, origin, matrix, valid)


def resample_by(
    images: Tensor,
    centers: Tensor,
    reference: Tensor,
    matrix: Tensor,
    valid: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The same as :func:`resample`, with everything on the images' device.

    Nothing is read back and nothing depends on values, so that it can be recorded in a CUDA graph.

    Args:
        images: (n, k, h, w) float32, finite.
        centers: (n, 2) float64 ``[cy, cx]``, pixels.
        reference: (2,) float64 ``[cy, cx]``, pixels.
        matrix: (2, 2) float64, the distortion ``D`` on (x, y).
        valid: (h, w) bool, or ``None``.
        out: (n, k, h, w) float32, takes the result; ``None``: new memory does.
    """
    n, k, h, w = images.shape
    device = images.device
    if valid is not None:
        weights = valid.to(images.dtype).expand(n, 1, h, w)
        images = torch.cat((torch.where(valid, images, 0.0), weights), dim=1)

    def pair(x: float, y: float) -> Tensor:
        return torch.stack((matrix.new_full((), x), matrix.new_full((), y)))

    # In double until the offsets are small: source (x, y) = column part + row part + center part,
    # in grid_sample's coordinates, where −1 and 1 are the centers of the first and last pixel.
    scale = pair(2 / max(w - 1, 1), 2 / max(h - 1, 1))
    across = torch.arange(w, dtype=torch.float64, device=device) - reference[1]
    down = torch.arange(h, dtype=torch.float64, device=device) - reference[0]
    columns = (matrix[:, :1] * across * scale[:, None]).float()
    rows = (matrix[:, 1:] * down * scale[:, None]).float()
    middles = (centers.flip(1) * scale - 1).float()
    half = pair((w - 1) / 2, (h - 1) / 2).float()[:, None, None]
    per_pixel = 1 / half.clamp(min=0.5)
    minus_one, nan = half.new_full((), -1.0), half.new_full((), math.nan)
    tolerance = 1 + 1e-3 * scale.float()[:, None, None]

    if out is None:
        out = torch.empty((n, k, h, w), dtype=torch.float32, device=device)
    step = 4 if device.type == "cpu" else n  # a few at a time: the coordinates stay in the cache
    for start in range(0, n, step or 1):
        part = slice(start, start + step)
        grid = (middles[part, :, None] + columns)[:, :, None, :] + rows[:, :, None]  # (m, 2, h, w)
        outside = (grid.abs() > tolerance).any(1, keepdim=True)
        cubic = _sample(images[part], grid, "bicubic")
        pixel = torch.addcmul(half, grid, half)
        whole = pixel.floor()
        fraction = pixel.sub_(whole)
        smooth = torch.rsub(fraction, 3, alpha=2).mul_(fraction)  # (3 − 2 f) f, once more times f
        grid = torch.addcmul(minus_one, whole.addcmul_(smooth, fraction), per_pixel)
        sampled = torch.lerp(_sample(images[part], grid, "bilinear"), cubic, 2 / 3)
        if valid is not None:
            weight = sampled[:, k:]
            outside |= weight < MIN_VALID_WEIGHT
            sampled = sampled[:, :k] / weight
        torch.where(outside, nan, sampled, out=out[part])
    return out


def _sample(images: Tensor, grid: Tensor, mode: str) -> Tensor:
    return functional.grid_sample(
        images, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="border", align_corners=True
    )


def recentered_sum(
    images: Tensor, shifts: Tensor, valid: Tensor | None = None, which: Tensor | None = None
) -> Tensor:
    """Add up images, each moved by its own shift, and the interpolation weights beside them.

    Sums of different images merge by addition; the mean is sum / weight where the weight counts.
    Being separable, this costs a tenth of :func:`resample`.

    Args:
        images: (n, h, w) float32, finite; invalid pixels are left out whatever they hold.
        shifts: (n, 2) ``[dy, dx]``, pixels: out(p + shift) takes image(p).
        valid: (h, w) bool, ``False`` where a pixel is not to be trusted; ``None``: all are.
        which: (n,) which of them to add up, ones and zeros; ``None``: all.

    Returns:
        (2, h, w) float32: the sum, and the weight: 1 per image where all of its pixels are valid.
    """
    on_cpu = images.device.type == "cpu"
    return (sum_one_by_one if on_cpu else sum_by_products)(images, shifts, valid, which)


def sum_one_by_one(
    images: Tensor, shifts: Tensor, valid: Tensor | None, which: Tensor | None
) -> Tensor:
    """`recentered_sum` as a CPU does it: 16 multiplications a pixel, one image after the other."""
    _, h, w = images.shape
    sums = torch.zeros((2, h, w), dtype=torch.float32, device=images.device)
    total, weight = sums
    column, row = torch.ones_like(total[:, :1]), torch.ones_like(total[:1])
    mask = None if valid is None else valid.to(torch.float32)
    wanted = [True] * len(images) if which is None else which.tolist()
    for image, (dy, dx), want in zip(images, shifts.tolist(), wanted, strict=True):
        if not want:
            continue
        if mask is None:
            _add_moved(total, image, dy, dx)
            weight.addmm_(_moved(column, dy, 0), _moved(row, dx, 1))
        else:
            _add_moved(total, torch.where(mask > 0, image, 0.0), dy, dx)
            _add_moved(weight, mask, dy, dx)
    return sums


def sum_by_products(
    images: Tensor, shifts: Tensor, valid: Tensor | None, which: Tensor | None
) -> Tensor:
    """`recentered_sum` as a GPU does it: moving is a product with a banded matrix on either side.

    No value is read back, so that it can be recorded in a CUDA graph.
    """
    n, h, w = images.shape
    down = _moving(shifts[:, 0], h)  # (n, h, h)
    if which is not None:
        down = down * which.to(down.dtype)[:, None, None]
    across = _moving(shifts[:, 1], w)  # (n, w, w)

    def moved_sum(each: Tensor) -> Tensor:
        # the sum over the images is part of the second product
        return torch.einsum("npq,nrq->pr", down @ each, across)

    if valid is None:
        return torch.stack((moved_sum(images), down.sum(2).T @ across.sum(2)))
    mask = valid.to(torch.float32).expand(n, h, w)
    return torch.stack((moved_sum(torch.where(valid, images, 0.0)), moved_sum(mask)))


def _moving(shift: Tensor, size: int) -> Tensor:
    """(n, size, size): the matrices that move a column of pixels by (n,) shifts, pixels."""
    base = (-shift).floor()
    taps = torch.stack(kernel_taps(-shift - base), 1).float()[:, None]  # (n, 1, 4)
    place = torch.arange(size, device=shift.device)[:, None]
    source = place + base.long()[:, None, None] + torch.arange(-1, 3, device=shift.device)
    inside = (source >= 0) & (source < size)  # (n, size, 4)
    matrix = torch.zeros((len(shift), size, size), device=shift.device)
    return matrix.scatter_add_(2, source.clamp(0, size - 1), torch.where(inside, taps, 0.0))


def _add_moved(total: Tensor, image: Tensor, dy: float, dx: float) -> None:
    _moved(_moved(image, dy, 0), dx, 1, into=total)


def _moved(image: Tensor, shift: float, dim: int, into: Tensor | None = None) -> Tensor:
    """Move an image along one axis, with zeros beyond its border; add it to ``into`` if given."""
    out = torch.zeros_like(image) if into is None else into
    size = image.shape[dim]
    base = math.floor(-shift)
    for offset, weight in zip(range(base - 1, base + 3), kernel_taps(-shift - base), strict=True):
        first, last = max(0, -offset), min(size, size - offset)
        if weight and first < last:
            source = image.narrow(dim, first + offset, last - first)
            out.narrow(dim, first, last - first).add_(source, alpha=weight)
    return out


_F = TypeVar("_F", float, Tensor)


def kernel_taps(f: _F) -> tuple[_F, _F, _F, _F]:
    """Keys' cubic convolution kernel, a = −½, for the pixels at −1, 0, 1, 2 around fraction f."""
    f2, f3 = f * f, f * f * f
    return (
        -0.5 * f3 + f2 - 0.5 * f,
        1.5 * f3 - 2.5 * f2 + 1,
        -1.5 * f3 + 2 * f2 + 0.5 * f,
        0.5 * f3 - 0.5 * f2,
    )
