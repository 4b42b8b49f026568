"""From descriptions to images: patterns drawn analytically in distorted coordinates.

Every disk, ring and halo is evaluated at the ideal coordinate of each pixel,
``u = D^-1 (p - c)``, so positions are exact: nothing is drawn first and warped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prenet4d_engines.simulate.pattern import RADIAL_STEP, SX, SY, Pattern

_PATCHES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
"""Sides in px of the patches that disks are drawn on: enough for frames of 8192 px a side."""


def distortion(ellipticity: tuple[float, float]) -> NDArray[np.float64]:
    """Return D of an ellipticity, for coordinates in (y, x) order, (2, 2), det 1.

    ``D = R(theta) diag(sqrt(ratio), 1/sqrt(ratio)) R(-theta)``, theta from +x toward +y; the
    frame shows at c + D u what the ideal pattern shows at u.
    """
    ratio, theta = ellipticity
    mean, half = 0.5 * (ratio**0.5 + ratio**-0.5), 0.5 * (ratio**0.5 - ratio**-0.5)
    c, s = half * np.cos(2 * theta), half * np.sin(2 * theta)
    return np.array([[mean - c, s], [s, mean + c]])


def render(
    patterns: Sequence[Pattern],
    frame_shape: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return expected intensities (n, h, w) float32, each frame with sum 1.

    Args:
        patterns: What to draw; centers and sizes in pixels of the frame.
        frame_shape: (h, w).
        device: Where to compute.
    """
    h, w = frame_shape
    image = _render_disks(patterns, frame_shape, torch.device(device)).clamp_min_(0.0)
    speckle = {
        i: _speckle(pattern, frame_shape, torch.device(device)) - 1
        for i, pattern in enumerate(patterns)
        if len(pattern.speckle)
    }
    for i, change in speckle.items():
        image[i] *= 1 + patterns[i].speckled[0] * change
    sums = image.sum((1, 2), keepdim=True)
    image /= sums.clamp_min(1e-20)

    smooth, shares = _render_radial(patterns, frame_shape, torch.device(device))
    for i, pattern in enumerate(patterns):
        if len(pattern.bands) and shares[i] > 0:
            kikuchi = _kikuchi(pattern, frame_shape, torch.device(device))
            _modulate(smooth[i], kikuchi, shares[i])
        if i in speckle and shares[i] > 0:
            _modulate(smooth[i], 1 + pattern.speckled[1] * speckle[i], shares[i])
    for i, pattern in enumerate(patterns):
        for y, x, sigma, share in pattern.blobs:
            gy = torch.arange(h, device=device) - (pattern.center[0] + y)
            gx = torch.arange(w, device=device) - (pattern.center[1] + x)
            blob = torch.outer(
                torch.exp(-0.5 * (gy / sigma) ** 2), torch.exp(-0.5 * (gx / sigma) ** 2)
            )
            total = blob.sum()
            if total > 1e-6 * h * w:
                smooth[i] += blob * (share / total)
    floor = torch.tensor([p.floor for p in patterns], device=device, dtype=torch.float32)
    smooth += (floor / (h * w))[:, None, None]
    beam = torch.where(sums.flatten() > 0, (1.0 - shares).clamp_min(0.0), 0.0)
    image = image * beam[:, None, None] + smooth
    image /= image.sum((1, 2), keepdim=True).clamp_min(1e-20)
    return image


def _render_radial(
    patterns: Sequence[Pattern], frame_shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Radial profiles as images that sum to their shares, (n, h, w); the shares, (n,)."""
    h, w = frame_shape
    n = len(patterns)
    length = max((len(p.radial) for p in patterns), default=0)
    shares = np.array([p.radial_share if len(p.radial) else 0.0 for p in patterns], np.float32)
    share = torch.from_numpy(shares).to(device)
    if length == 0:
        return torch.zeros(n, h, w, device=device), share
    table = np.zeros((n, length), np.float32)
    for row, pattern in zip(table, patterns, strict=True):
        if len(pattern.radial):
            row[: len(pattern.radial)] = pattern.radial / max(float(pattern.radial.max()), 1e-30)
            row[len(pattern.radial) :] = row[len(pattern.radial) - 1]
    inverse = _inverse_distortions(patterns).to(device)
    center = torch.tensor([p.center for p in patterns], device=device, dtype=torch.float32)
    dy = torch.arange(h, device=device)[None, :, None] - center[:, 0, None, None]
    dx = torch.arange(w, device=device)[None, None, :] - center[:, 1, None, None]
    # |D^-1 (dy, dx)|^2 as a quadratic form: one pass over the pixels
    q = inverse.transpose(1, 2) @ inverse
    yy, yx, xx = (v[:, None, None] for v in (q[:, 0, 0], 2 * q[:, 0, 1], q[:, 1, 1]))
    rho = (yy * dy * dy + xx * dx * dx + yx * dy * dx).clamp_min_(0.0).sqrt_()
    rho = rho.mul_(1.0 / RADIAL_STEP).clamp_max_(length - 1.001)
    low = rho.floor()
    part = rho.sub_(low)
    index = low.long().view(n, -1)
    values = torch.from_numpy(table).to(device)
    below = values.gather(1, index).view(n, h, w)
    above = values.gather(1, index.add_(1)).view(n, h, w)
    image = below.lerp_(above, part)
    image *= (share / image.sum((1, 2)).clamp_min(1e-20))[:, None, None]
    return image, share


def _kikuchi(pattern: Pattern, frame_shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return what a pattern's Kikuchi bands multiply its diffuse scattering with, (h, w)."""
    h, w = frame_shape
    inverse = _inverse_distortions([pattern])[0].to(device)
    bands = torch.from_numpy(pattern.bands.astype(np.float32)).to(device)
    normal = bands[:, :2] @ inverse  # (b, 2): what turns pixels into distances along each normal
    dy = torch.arange(h, device=device) - pattern.center[0]
    dx = torch.arange(w, device=device) - pattern.center[1]
    middle, half, soft, change = (v[:, None, None] for v in bands[:, 2:].T)
    along = normal[:, 0, None, None] * dy[:, None] + normal[:, 1, None, None] * dx - middle
    below, above = (along + half) / soft, (along - half) / soft
    inside = 0.5 * (torch.tanh(below) - torch.tanh(above))
    # The line farther from the beam gains what the nearer one loses: none where it is central.
    lean = torch.tanh(middle / half)
    lines = lean * (1 / (1 + above**2) - 1 / (1 + below**2))
    factor: Tensor = (1 + (change * (inside + lines)).sum(0)).clamp_min(0.1)
    return factor


def _modulate(image: Tensor, factor: Tensor, share: Tensor) -> None:
    """Multiply an image (h, w) in place, and have it sum to its share again."""
    image *= factor
    image *= share / image.sum().clamp_min(1e-20)


def _speckle(pattern: Pattern, frame_shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return the squared modulus of the sum of a pattern's waves, (h, w), 1 in the mean."""
    h, w = frame_shape
    inverse = _inverse_distortions([pattern])[0].to(device)
    waves = torch.from_numpy(pattern.speckle.astype(np.float32)).to(device)
    vectors = waves[:, :2] @ inverse  # (k, 2): phases per px of the frame
    dy = torch.arange(h, device=device) - pattern.center[0]
    dx = torch.arange(w, device=device) - pattern.center[1]
    # exp(i (a + b)) = exp(i a) exp(i b): the sum over waves is a product of two matrices
    rows = torch.exp(1j * dy[:, None] * vectors[:, 0])  # (h, k)
    columns = torch.exp(1j * vectors[:, 1, None] * dx) * torch.complex(waves[:, 2:3], waves[:, 3:])
    field = rows @ columns
    return field.real.square() + field.imag.square()


def _inverse_distortions(patterns: Sequence[Pattern]) -> Tensor:
    return torch.from_numpy(
        np.stack([np.linalg.inv(distortion(p.ellipticity)) for p in patterns]).astype(np.float32)
    )


def _render_disks(
    patterns: Sequence[Pattern], frame_shape: tuple[int, int], device: torch.device
) -> Tensor:
    """All disks of all patterns, in relative units, (n, h, w)."""
    h, w = frame_shape
    n = len(patterns)
    image = torch.zeros(n * h * w, device=device)
    counts = [len(p.disks) for p in patterns]
    if not sum(counts):
        return image.view(n, h, w)
    owner = np.repeat(np.arange(n), counts)
    disks = np.concatenate([p.disks for p in patterns])
    matrices = np.stack([distortion(p.ellipticity) for p in patterns])[owner]
    centers = np.array([p.center for p in patterns])[owner]
    at = centers + np.einsum("kij,kj->ki", matrices, disks[:, :2])
    ratio = np.array([p.ellipticity[0] for p in patterns])[owner]
    # the profile has fallen below 1e-4 where (rho^2 - r^2) = 2 r e * 9.2
    outer = np.sqrt(disks[:, 4] ** 2 + 18.4 * disks[:, 4] * disks[:, 5]) * np.sqrt(ratio)
    half = np.ceil(outer).astype(int) + 1
    seen = (at[:, 0] > -half) & (at[:, 0] < h + half) & (at[:, 1] > -half) & (at[:, 1] < w + half)
    bucket = np.searchsorted(_PATCHES, 2 * half)
    inverse: NDArray[np.float64] = np.linalg.inv(matrices).astype(np.float64)
    for b in np.unique(bucket[seen]):
        rows = np.flatnonzero(seen & (bucket == b))
        for part in np.array_split(rows, max(1, len(rows) * _PATCHES[b] ** 2 // 4_000_000)):
            _add_patches(
                image, frame_shape, owner[part], disks[part], at[part], inverse[part], _PATCHES[b]
            )
    return image.view(n, h, w)


def _add_patches(
    image: Tensor,
    frame_shape: tuple[int, int],
    owner: NDArray[np.int64],
    disks: NDArray[np.float64],
    at: NDArray[np.float64],
    inverse: NDArray[np.float64],
    size: int,
) -> None:
    """Add k disks, each evaluated on its own size x size patch, into the flat image."""
    h, w = frame_shape
    device = image.device
    corner = np.round(at).astype(np.int64) - size // 2

    def column(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)[:, None, None]

    grid = torch.arange(size, device=device, dtype=torch.float32)
    dy = grid[None, :, None] + column(corner[:, 0] - at[:, 0])
    dx = grid[None, None, :] + column(corner[:, 1] - at[:, 1])
    uy = column(inverse[:, 0, 0]) * dy + column(inverse[:, 0, 1]) * dx
    ux = column(inverse[:, 1, 0]) * dy + column(inverse[:, 1, 1]) * dx
    _, _, flat, rock, radius, edge, s0, sy, sx, epsilon = (column(v) for v in disks.T)
    value = torch.sigmoid((radius**2 - uy * uy - ux * ux) / (2 * radius * edge))
    if bool((rock != 0).any()):
        s = s0 + sy * uy + sx * ux
        root = (s * s + epsilon * epsilon + 1e-12).sqrt()
        # the mean over a pixel of sin² = (1 - cos) / 2: fringes finer than pixels fade
        per_row, per_column = np.einsum("ki,kij->jk", disks[:, [SY, SX]], inverse)
        fringes = torch.cos(2 * torch.pi * root)
        for change in (per_row, per_column):
            fringes *= torch.sinc(s / root * column(change))
        curve = 0.5 * (epsilon / root) ** 2 * (1 - fringes)
        value = value * (flat + rock * curve)
    else:
        value = value * flat
    rows = torch.from_numpy(corner[:, 0]).to(device)[:, None] + torch.arange(size, device=device)
    cols = torch.from_numpy(corner[:, 1]).to(device)[:, None] + torch.arange(size, device=device)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((cols >= 0) & (cols < w))[:, None, :]
    base = torch.from_numpy(owner).to(device)[:, None, None] * (h * w)
    index = base + rows.clamp(0, h - 1)[:, :, None] * w + cols.clamp(0, w - 1)[:, None, :]
    image.index_add_(0, index.flatten(), (value * inside).flatten())
