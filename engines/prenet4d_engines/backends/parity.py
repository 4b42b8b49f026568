"""Does an arithmetic agree with float32 where it matters: in counts, in pixels, in the ratio?

A faster arithmetic is used for a network only if simulated patterns, decoded to the physical
quantities a user gets, come out the same within bounds, and the network's own output too. It is
measured where it runs, before the first frame: libraries, processors and weights differ, and a
wrong kernel has to be found. The patterns hold 10³ to 10⁵ electrons, and 10⁶ in a single disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from prenet4d_engines.models import center, denoiser, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import inversion
from prenet4d_engines.weights import Name

Network = Callable[[Tensor], Tensor]
"""Maps a network's float32 input to its float32 output, on the device where it runs."""

_UNITS: Final[dict[Name, str]] = {
    "denoise": "of the counts",
    "center": "px in the center",
    "refine": "px in the refined center",
    "ellipse": "in the ratio",
}


@dataclass(frozen=True)
class Bounds:
    """How far an arithmetic may be from float32.

    Attributes:
        physical: For each network, the largest deviation of what it is for, in the worst pattern:
            mean absolute deviation of counts as a share of their mean; distance of centers in
            pixels; difference of ln(ratio) vectors, which is that of the ratio near one.
        relative: The largest norm of the difference of a network's outputs, as a share of theirs.
    """

    physical: Mapping[Name, float]
    relative: float


ENGINE: Final = Bounds(
    MappingProxyType({"denoise": 0.005, "center": 0.005, "refine": 0.005, "ellipse": 2e-4}), 0.01
)
"""For a compiled engine, which computes in float16."""
TORCH: Final = Bounds(
    MappingProxyType({"denoise": 0.005, "center": 0.02, "refine": 0.01, "ellipse": 1e-3}), 0.05
)
"""For torch in bfloat16 or float16."""


@dataclass(frozen=True)
class Deviation:
    """How far a network in another arithmetic is from float32; `Bounds` says how it is counted."""

    network: Name
    physical: float
    relative: float

    def within(self, bounds: Bounds) -> bool:
        """Say whether both figures keep the bounds; one that is no number does not."""
        return self.physical <= bounds.physical[self.network] and self.relative <= bounds.relative

    def brief(self, bounds: Bounds) -> str:
        """Say the physical figure, and what is allowed."""
        allowed = f"{bounds.physical[self.network]:g} allowed"
        return f"{self.physical:.2g} {_UNITS[self.network]} ({allowed})"

    def told(self, bounds: Bounds) -> str:
        """Say both figures, and what is allowed."""
        relative = f"{self.relative:.2g} of the output ({bounds.relative:g} allowed)"
        return f"{self.network}: {self.brief(bounds)}, {relative}"


def measure(
    name: Name,
    network: Network,
    reference: Network,
    frame_shape: tuple[int, int] = (128, 128),
    device: torch.device | None = None,
) -> Deviation:
    """Compare a network with its float32 reference on simulated patterns.

    Args:
        name: Which network both are.
        network: The one to judge. It may answer with several rounds of the same patterns, one after
            the other; the worst counts.
        reference: The same in float32, on the CPU.
        frame_shape: ``(h, w)`` of the patterns, for networks that take one shape only.
        device: Where ``network`` runs; unset: the CPU.
    """
    with torch.inference_mode():
        x, distance = _SETUPS[name](frame_shape)
        wanted, found = reference(x), network(x.to(device)).cpu()
        rounds = found.reshape(-1, *wanted.shape)
        physical = torch.stack([distance(wanted, each).max() for each in rounds]).max()
        difference = torch.stack([(each - wanted).norm() for each in rounds]).max()
    return Deviation(name, float(physical), float(difference / wanted.norm()))


def patterns(frame_shape: tuple[int, int] = (128, 128)) -> Tensor:
    """Return eight plain patterns, (8, h, w) counts on the CPU.

    Six show disks and a halo, at 10³ to 10⁵ electrons, two a single disk with 10⁶.
    """
    return _drawn(frame_shape)[0]


def _drawn(frame_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the patterns, and where their centers are, (8, 2) pixels."""
    random = torch.Generator().manual_seed(0)
    h, w = frame_shape
    scale = min(h, w) / 128
    y, x = torch.meshgrid(torch.arange(h) / scale, torch.arange(w) / scale, indexing="ij")
    first = torch.tensor([(h / scale - 128) / 2, (w / scale - 128) / 2]) + 55
    frames, centers = [], []
    for number in range(6):
        cy, cx = (first + 18 * torch.rand(2, generator=random)).tolist()
        expected = 0.02 * torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 30.0**2))
        for ky in range(-3, 4):
            for kx in range(-3, 4):
                r = torch.hypot(y - cy - 17.3 * ky - 4 * kx, x - cx - 19.1 * kx)
                strength = 0.5 ** (abs(kx) + abs(ky))
                expected = expected + strength * torch.sigmoid(2 * (5.5 - r))
        centers.append((cy, cx))
        dose = 10.0 ** (3 + number % 3)
        frames.append(torch.poisson(expected * (dose / expected.sum()), generator=random))
    for radius in (2.5, 12.0):
        cy, cx = (first + 18 * torch.rand(2, generator=random)).tolist()
        centers.append((cy, cx))
        expected = torch.sigmoid(2 * (radius - torch.hypot(y - cy, x - cx)))
        frames.append(torch.poisson(expected * (1e6 / expected.sum()), generator=random))
    return torch.stack(frames), scale * torch.tensor(centers)


def means(frame_shape: tuple[int, int] = (128, 128)) -> Tensor:
    """Return four centered mean patterns, (4, h, w) counts on the CPU: rings, and disks, distorted.

    The ellipticities' vectors ln(ratio) (cos 2θ, sin 2θ) are up to 0.05 long.
    """
    h, w = frame_shape
    scale = min(h, w) / 128
    y = (torch.arange(h) - (h - 1) / 2) / scale
    x = (torch.arange(w) - (w - 1) / 2) / scale
    y, x = torch.meshgrid(y, x, indexing="ij")
    frames = []
    for number, (a, b) in enumerate([(0.0, 0.0), (0.03, 0.01), (-0.02, 0.04), (0.0, -0.05)]):
        # to first order, ideal coordinates are the distorted ones times 1 - v·(…)/2
        u, v = x - 0.5 * (a * x + b * y), y - 0.5 * (b * x - a * y)
        r = torch.hypot(u, v)
        expected = 2.0 * torch.exp(-r / 20)
        for radius in (17.0, 28.0, 33.0, 46.0):
            expected = expected + torch.exp(-0.5 * (r - radius) ** 2)
        if number % 2:
            for k in range(6):
                angle = torch.tensor(torch.pi * k / 3 + 0.2)
                apart = torch.hypot(u - 37 * torch.cos(angle), v - 37 * torch.sin(angle))
                expected = expected + 3 * torch.sigmoid(2 * (5 - apart))
        frames.append(1000 * expected)
    return torch.stack(frames)


Distance = Callable[[Tensor, Tensor], Tensor]
"""From the wanted and the found output to the physical deviation of each pattern, (n,)."""


def _denoiser_setup(frame_shape: tuple[int, int]) -> tuple[Tensor, Distance]:
    frames = patterns(frame_shape)
    x, context = denoiser.stabilise(frames, torch.ones(frame_shape, dtype=torch.bool))

    def share_of_counts(wanted: Tensor, found: Tensor) -> Tensor:
        expected = denoiser.restore(wanted, context)
        difference = (denoiser.restore(found, context) - expected).abs()
        return difference.mean((1, 2)) / expected.mean((1, 2))

    return x, share_of_counts


def _center_setup(frame_shape: tuple[int, int]) -> tuple[Tensor, Distance]:
    bins = Bins.of(patterns(frame_shape), torch.ones(frame_shape, dtype=torch.bool))

    def pixels(wanted: Tensor, found: Tensor) -> Tensor:
        found_by = (center.decode(y, bins).center for y in (wanted, found))
        one, other = (inversion(bins, guess).center for guess in found_by)
        apart: Tensor = (one - other).norm(dim=1)
        return apart

    return center.prepare(bins), pixels


def _refine_setup(frame_shape: tuple[int, int]) -> tuple[Tensor, Distance]:
    frames, centers = _drawn(frame_shape)
    bins = Bins.of(frames, torch.ones(frame_shape, dtype=torch.bool))
    guess = inversion(bins, centers)
    sigma = torch.full_like(centers, 0.2 * bins.factor)  # what the center network says of these

    def pixels(wanted: Tensor, found: Tensor) -> Tensor:
        one, other = (refine.decode(votes, guess).center for votes in (wanted, found))
        apart: Tensor = (one - other).norm(dim=1)
        return apart

    return refine.prepare(bins, guess, sigma), pixels


def _ellipse_setup(frame_shape: tuple[int, int]) -> tuple[Tensor, Distance]:
    frames = means(frame_shape)

    def logarithms(wanted: Tensor, found: Tensor) -> Tensor:
        difference = ellipse.decode(wanted).vector - ellipse.decode(found).vector
        apart: Tensor = difference.norm(dim=1)
        return apart

    return ellipse.prepare(frames, torch.ones_like(frames)), logarithms


_SETUPS: Final[dict[Name, Callable[[tuple[int, int]], tuple[Tensor, Distance]]]] = {
    "denoise": _denoiser_setup,
    "center": _center_setup,
    "refine": _refine_setup,
    "ellipse": _ellipse_setup,
}
