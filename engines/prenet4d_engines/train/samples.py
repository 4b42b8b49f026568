"""Endless batches of simulated samples, reproducible from a seed, one recipe per network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from prenet4d_engines import processor
from prenet4d_engines import weights as shipped
from prenet4d_engines.geometry import reference_center
from prenet4d_engines.models import center, refine
from prenet4d_engines.models.bins import Bins, bin_factor
from prenet4d_engines.models.inversion import Inversion, inversion
from prenet4d_engines.reading import Look, left_of, looks
from prenet4d_engines.resample import kernel_taps
from prenet4d_engines.simulate.detector import (
    HIGHEST_DOSE,
    Detector,
    draw_detector,
    draw_dose,
    expose,
)
from prenet4d_engines.simulate.difficult import EDGE_REACH, draw_difficult, draw_wide_beam
from prenet4d_engines.simulate.draw import (
    draw_center,
    draw_ellipticity,
    draw_optics,
    draw_pattern,
    speckled,
)
from prenet4d_engines.simulate.materials import TRAINING, Material, relatives
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.simulate.pattern import EDGE, Kind, Pattern
from prenet4d_engines.simulate.render import render
from prenet4d_engines.weights import Name

Sample = dict[str, Tensor]

VALIDATION_SEED: Final = 9_000_000
"""Seeds from here are validation's; from 10,000,000 evaluation's. Training stays below."""

_CENTER_SHAPES: Final = (
    *3 * ((128, 128),),
    (64, 64),
    (96, 96),
    (160, 160),
    (96, 192),
    (256, 256),
    (100, 100),
    (120, 136),
)
"""The last two are no multiples of 16: what is added to them is not to be taken for masked."""
_DIFFICULT: Final = 0.5
"""Share of the center network's rendered frames that `draw_difficult` draws."""
_WIDE: Final = 0.1
"""Share of the denoiser's and the center networks' rendered frames that one wide disk fills."""
_SPECKLED: Final = 0.3
"""Share of the denoiser's and the center networks' rendered patterns that show speckle."""
_COMPUTED: Final = 0.25
"""Share of patterns that were computed by multislice, where there are any."""
_WINDOW_DOSE: Final = 1e7
"""Most electrons in a window of the denoiser's: 10^6 in a frame of 128 x 128 lie well inside."""
_RELATIVES: Final = 2
"""Crystals invented for each of the table's, that patterns are drawn of at any time."""
_RENEWED: Final = 4
"""Invented crystals that give way to new ones after each batch: their reflections take time."""
_EXPOSURES: Final = 2
"""How often one expectation is exposed: rendering costs more than counting."""


@dataclass(frozen=True)
class _Seen:
    """One frame as the camera took it, and the truth about it."""

    frame: Tensor  # (h, w) electrons
    rate: Tensor  # (h, w) expected electrons
    mask: Tensor  # (h, w) bool
    center: tuple[float, float]


def _one_of(rng: np.random.Generator, materials: Sequence[Material]) -> Material:
    return materials[int(rng.integers(len(materials)))]


def _some_speckled(rng: np.random.Generator, pattern: Pattern) -> Pattern:
    return speckled(rng, pattern) if rng.random() < _SPECKLED else pattern


Computed = tuple[Pattern, NDArray[np.float32]]
"""What is known of a computed pattern (kind, center, ellipticity), and the pattern itself."""


def _draw_computed(
    rng: np.random.Generator, shape: tuple[int, int], computed: Multislice, reach: float
) -> Computed:
    center, ellipticity = draw_center(rng, shape, reach), draw_ellipticity(rng)
    image, _ = computed.draw(rng, shape, center=center, ellipticity=ellipticity)
    return Pattern("cbed", center, ellipticity), image


def denoise_batch(
    rng: np.random.Generator,
    batch_size: int,
    materials: Sequence[Material],
    computed: Multislice | None = None,
) -> Sample:
    """Frames, rates and masks (n, 128, 128): windows of frames of 128 to 384 pixels.

    The network is local; a window of a larger frame trains it for that frame at a fraction of
    the cost. Disks and background share the window's electrons as the whole frame's would be
    shared, so that a window beside the beam may show them in other proportions than the frame.
    """
    side = 128
    patterns: list[Pattern] = []
    images: dict[int, NDArray[np.float32]] = {}
    for i in range(batch_size // _EXPOSURES):
        if computed is not None and rng.random() < _COMPUTED:
            pattern, images[i] = _draw_computed(rng, (side, side), computed, 0.45)
            patterns.append(pattern)
            continue
        virtual = int(rng.choice([128, 192, 256, 256, 384]))
        whole, material = (virtual, virtual), _one_of(rng, materials)
        if rng.random() < _WIDE:
            pattern = draw_wide_beam(rng, whole, material)
        else:
            pattern = draw_pattern(rng, whole, material=material)
        pattern = _some_speckled(rng, pattern)
        # windows crowd around the beam, where the structure is
        middle = np.asarray(pattern.center) + rng.normal(0, 0.3 * virtual, 2)
        corner = np.clip(np.round(middle) - side // 2, 0, virtual - side)
        patterns.append(
            pattern.moved((pattern.center[0] - corner[0], pattern.center[1] - corner[1]))
        )
    seen = _expose_all(rng, patterns, (side, side), images, highest_dose=_WINDOW_DOSE)
    return {
        "frame": torch.stack([s.frame for s in seen]),
        "rate": torch.stack([s.rate for s in seen]),
        "mask": torch.stack([s.mask for s in seen]),
    }


def center_batch(
    rng: np.random.Generator,
    batch_size: int,
    materials: Sequence[Material],
    computed: Multislice | None = None,
) -> Sample:
    """Frames and masks (n, h, w), center (n, 2) in px, usable (n,) 0 or 1; half are difficult."""
    shape = _CENTER_SHAPES[rng.integers(len(_CENTER_SHAPES))]
    patterns: list[Pattern] = []
    cameras: list[Detector | None] = []
    images: dict[int, NDArray[np.float32]] = {}
    for i in range(batch_size // _EXPOSURES):
        if computed is not None and rng.random() < _COMPUTED:
            reach = EDGE_REACH if rng.random() < 0.25 else 0.2
            pattern, images[i] = _draw_computed(rng, shape, computed, reach)
            patterns.append(pattern)
            cameras.append(None)
            continue
        material = _one_of(rng, materials)
        content = rng.random()
        if content < _DIFFICULT:
            pattern, camera = draw_difficult(rng, shape, material=material)
        elif content < _DIFFICULT + _WIDE:
            pattern, camera = draw_wide_beam(rng, shape, material), None
        else:
            pattern, camera = draw_pattern(rng, shape, material=material), None
        patterns.append(_some_speckled(rng, pattern))
        cameras.append(camera)
    seen = _expose_all(rng, patterns, shape, images, cameras)
    usable = [float(p.has_beam) for p in patterns for _ in range(_EXPOSURES)]
    return {
        "frame": torch.stack([s.frame for s in seen]),
        "mask": torch.stack([s.mask for s in seen]),
        "center": torch.tensor([s.center for s in seen]),
        "usable": torch.tensor(usable),
    }


def refine_batch(
    rng: np.random.Generator,
    batch_size: int,
    materials: Sequence[Material],
    computed: Multislice | None = None,
) -> Sample:
    """What `center_batch` makes, and the guesses that the shipped center network leads to.

    guess and sigma (n, 2) in px, counting (n, 2), asymmetry (n,).
    """
    sample = center_batch(rng, batch_size, materials, computed)
    short = torch.autocast("cpu", torch.bfloat16, enabled=processor.has_bfloat16_units())
    with torch.inference_mode(), short:
        bins = Bins.of(sample["frame"], sample["mask"])
        x = center.prepare(bins).contiguous(memory_format=torch.channels_last)
        maps = _shipped_center_network()(x)
    found = center.decode(maps.clone(), bins)
    seen = inversion(bins, found.center)
    return sample | {
        "guess": seen.center,
        "sigma": found.sigma,
        "counting": seen.counting,
        "asymmetry": seen.asymmetry,
    }


def near_guesses(sample: Sample) -> tuple[Inversion, Tensor]:
    """Return a `refine_batch`'s guesses, and (n,) bool which of them are at the right beam."""
    guess = Inversion(
        factor=bin_factor((sample["frame"].shape[1], sample["frame"].shape[2])),
        center=sample["guess"],
        counting=sample["counting"],
        asymmetry=sample["asymmetry"],
    )
    off = (sample["guess"] - sample["center"]).abs() / guess.factor
    return guess, (sample["usable"] > 0.5) & (off < refine.REACH).all(1)


def looks_at(sample: Sample, network: Callable[[Tensor], Tensor]) -> Iterator[tuple[Look, Tensor]]:
    """Have a network look at an `ellipse_batch`; yield each look and what was left (n, 2) then."""
    means = sample["mean"].masked_fill(sample["valid"] <= 0, torch.nan)
    truth = sample["vector"].double()
    reference = truth.new_tensor(reference_center((means.shape[1], means.shape[2])))
    for look in looks(means, reference, network):
        yield look, left_of(truth, look.before).float()


@cache
def _shipped_center_network() -> torch.nn.Module:
    return shipped.load("center")


def _expose_all(
    rng: np.random.Generator,
    patterns: list[Pattern],
    shape: tuple[int, int],
    images: Mapping[int, NDArray[np.float32]],
    cameras: Sequence[Detector | None] | None = None,
    highest_dose: float = HIGHEST_DOSE,
) -> list[_Seen]:
    """Expose every pattern a few times, each with its own dose, symmetry and drawn camera.

    `images` are computed patterns by their place in the list; the others are rendered. Where
    `cameras` holds one for a pattern, all its exposures are taken with that one.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    seen = []
    given = cameras or [None] * len(patterns)
    rendered = render(patterns, shape)
    for i, image in images.items():
        rendered[i] = torch.from_numpy(image)
    for pattern, expected, own in zip(patterns, rendered, given, strict=True):
        for _ in range(_EXPOSURES):
            beam = pattern.center if pattern.has_beam else None
            camera = own or draw_detector(rng, shape, beam)
            dose = draw_dose(rng, highest_dose)
            frame, rate = expose(expected[None], dose, camera, generator)
            mask = torch.from_numpy(camera.valid)
            seen.append(
                turned(
                    _Seen(frame[0], rate[0], mask, pattern.center),
                    flip_y=bool(rng.integers(2)),
                    flip_x=bool(rng.integers(2)),
                    swap=shape[0] == shape[1] and bool(rng.integers(2)),
                )
            )
    return seen


def turned(seen: _Seen, *, flip_y: bool, flip_x: bool, swap: bool) -> _Seen:
    """Apply one of the eight symmetries of the square to a frame and its center, exactly."""
    images = [seen.frame, seen.rate, seen.mask]
    cy, cx = seen.center
    h, w = seen.frame.shape
    if flip_y:
        images, cy = [i.flip(0) for i in images], h - 1 - cy
    if flip_x:
        images, cx = [i.flip(1) for i in images], w - 1 - cx
    if swap:
        images, (cy, cx) = [i.T for i in images], (cx, cy)
    return _Seen(images[0], images[1], images[2], (cy, cx))


_MEAN_KINDS: Final[dict[Kind, float]] = {
    "cbed": 0.42,
    "spots": 0.16,
    "rings": 0.16,
    "grains": 0.12,
    "amorphous": 0.12,
    "vacuum": 0.02,
}


def draw_mean(
    rng: np.random.Generator,
    shape: tuple[int, int],
    ellipticity: tuple[float, float],
    materials: Sequence[Material],
) -> list[Pattern]:
    """Draw the grains that one mean pattern is made of, each with its residual center error."""
    kind = list(_MEAN_KINDS)[rng.choice(len(_MEAN_KINDS), p=list(_MEAN_KINDS.values()))]
    material = _one_of(rng, materials)
    optics = draw_optics(rng, kind, material, shape)
    jitter = rng.uniform(0, 0.5)
    offset = rng.normal(0, 0.15, 2)
    grains = int(rng.integers(1, 9)) if kind in ("cbed", "spots", "grains") else 1
    patterns = []
    for _ in range(grains):
        at = np.asarray(shape) / 2 - 0.5 + offset + rng.normal(0, 0.3 * jitter, 2)
        pattern = draw_pattern(
            rng,
            shape,
            kind=kind,
            material=material,
            optics=optics,
            center=(float(at[0]), float(at[1])),
            ellipticity=ellipticity,
        )
        disks = pattern.disks.copy()
        disks[:, EDGE] = np.hypot(disks[:, EDGE], jitter / 1.8)
        patterns.append(replace(pattern, disks=disks))
    return patterns


def _interpolated(noise: Tensor) -> Tensor:
    """Smooth white noise (h, w) as it is in a mean of patterns that were each moved to a center."""
    kernel = _smoothing()
    padding = len(kernel) // 2
    down = functional.conv2d(noise[None, None], kernel[None, None, :, None], padding=(padding, 0))
    return functional.conv2d(down, kernel[None, None, None, :], padding=(0, padding))[0, 0]


@cache
def _smoothing() -> Tensor:
    """Return the kernel that leaves of noise as much as interpolation does, at any place."""
    fractions = (torch.arange(64) + 0.5) / 64
    power = torch.fft.rfft(torch.stack(kernel_taps(fractions), 1), 32).abs().square().mean(0)
    kernel: Tensor = torch.fft.irfft(power.sqrt()).roll(4)[:9]
    return kernel


def ellipse_batch(
    rng: np.random.Generator,
    batch_size: int,
    materials: Sequence[Material],
    computed: Multislice | None = None,
) -> Sample:
    """Mean patterns and validity (n, h, w) and the distortion's vector (n, 2)."""
    side = int(rng.choice([128, 128, 128, 192, 256]))
    shape = (side, side)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    means, weights, vectors = [], [], []
    for _ in range(batch_size // _EXPOSURES):
        # half broad, half what is left after a first correction
        largest = 1.13 if rng.random() < 0.5 else 1.02
        ratio, theta = draw_ellipticity(rng, largest)
        if computed is not None and rng.random() < _COMPUTED:
            middle = np.asarray(shape) / 2 - 0.5 + rng.normal(0, 0.15, 2)
            drawn, _ = computed.draw(
                rng, shape, center=(middle[0], middle[1]), ellipticity=(ratio, theta)
            )
            expected = torch.from_numpy(drawn)[None]
        else:
            grains = draw_mean(rng, shape, (ratio, theta), materials)
            expected = render(grains, shape).mean(0, keepdim=True)
        for _ in range(_EXPOSURES):
            camera: Detector = replace(draw_detector(rng, shape), saturation=float("inf"))
            dose = draw_dose(rng) * float(np.exp(rng.uniform(np.log(32), np.log(1024))))
            frame, rate = expose(expected, min(max(dose, 2e3), 1e8), camera, generator)
            valid, angle = torch.from_numpy(camera.valid), theta
            image = rate[0] + _interpolated(torch.where(valid, frame[0] - rate[0], 0.0))
            if rng.integers(2):
                image, valid, angle = image.flip(1), valid.flip(1), np.pi - angle
            if rng.integers(2):
                image, valid, angle = image.T, valid.T, np.pi / 2 - angle
            means.append(image)
            weights.append(valid.float())
            vectors.append(np.log(ratio) * np.array([np.cos(2 * angle), np.sin(2 * angle)]))
    return {
        "mean": torch.stack(means),
        "valid": torch.stack(weights),
        "vector": torch.from_numpy(np.stack(vectors)).float(),
    }


BATCHES: Final[dict[Name, Callable[..., Sample]]] = {
    "denoise": denoise_batch,
    "center": center_batch,
    "refine": refine_batch,
    "ellipse": ellipse_batch,
}
"""``batch(rng, batch_size, materials, computed=None)`` of each task."""


class Samples(IterableDataset[Sample]):
    """Batches of a task without end; (seed, start, worker) fixes every one of them.

    A third of the crystals is in the table, the others are invented, ever new ones. A quarter of
    the patterns is dealt from `computed`, where it is given.
    """

    def __init__(
        self,
        task: Name,
        batch_size: int,
        seed: int,
        start: int = 0,
        computed: Multislice | None = None,
    ):
        self.task, self.batch_size, self.seed, self.start = task, batch_size, seed, start
        self.computed = computed

    def __iter__(self) -> Iterator[Sample]:
        """Yield batches."""
        info = get_worker_info()
        if info is not None:  # without workers this is the optimiser's process
            torch.set_num_threads(1)
        worker = info.id if info else 0
        rng = np.random.default_rng([self.seed, self.start, worker])
        invented = relatives(rng, _RELATIVES * len(TRAINING))
        while True:
            crystals = [*TRAINING.values(), *invented]
            yield BATCHES[self.task](rng, self.batch_size, crystals, self.computed)
            invented = invented[_RENEWED:] + relatives(rng, _RENEWED)
