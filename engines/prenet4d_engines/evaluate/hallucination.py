"""Does the denoiser invent what is not there, and does it keep what hardly is?

On the direct beam alone and on even illumination every peak besides the beam is invented. A peak is
a 5 x 5 window that holds more than those around it, and more than the true expectation by over five
standard deviations of Poisson noise: what a microscopist would take for a reflection. The noisy
frames hold none but by chance; a denoiser must not either. Faint real reflections of ten electrons,
on the other hand, should not vanish with the noise.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, label, maximum_filter, uniform_filter

from prenet4d_engines.evaluate.datasets import FIRST_SEED
from prenet4d_engines.evaluate.report import NOISY, OURS, Check, Part, Table, largest
from prenet4d_engines.evaluate.run import Run, dose_label
from prenet4d_engines.simulate import HELD_OUT, Kind, Pattern, draw_pattern, render
from prenet4d_engines.simulate.pattern import RADIUS

Array = NDArray[np.float64]

_SHAPE: Final = (128, 128)
_WINDOW: Final = 5
_SIGMAS: Final = 5.0
_FAINT: Final = 10.0
"""Electrons of a faint reflection."""
_APERTURE: Final = 4.5
_KINDS: Final[tuple[tuple[Kind, str], ...]] = (
    ("vacuum", "direct beam alone"),
    ("blank", "even illumination"),
)


def invented_peaks(found: Array, truth: Array) -> int:
    """Count the peaks of a pattern (h, w) that its true expectation (h, w) does not hold.

    A peak stands out from its surroundings: the direct beam's softened edge or foot is none.
    """
    area = _WINDOW**2
    counts = area * uniform_filter(found, _WINDOW, mode="constant")
    expected = area * uniform_filter(truth, _WINDOW, mode="constant")
    # twice the square root of counts has a standard deviation of one, also where counts are few
    excess = 2 * (np.sqrt(np.maximum(counts, 0.0)) - np.sqrt(np.maximum(expected, 0.0)))
    beam = truth > 0.02 * truth.max()
    away = ~binary_dilation(beam, iterations=_WINDOW) if not beam.all() else beam
    regions, number = label(away & (excess > _SIGMAS))
    highest = counts >= maximum_filter(counts, 2 * _WINDOW + 1)
    return len(set(regions[highest & (regions > 0)].tolist())) if number else 0


def evaluate_hallucination(run: Run) -> Part:
    """Count invented peaks, lost counts and lost faint reflections at every dose."""
    columns = tuple(dose_label(dose) for dose in run.doses)
    n = max(6, run.patterns // 3)
    peaks: list[tuple[str, tuple[float, ...]]] = []
    counts_error: list[float] = []
    for kind, title in _KINDS:
        patterns = _patterns(kind, n, run.seed)
        rows: dict[str, list[float]] = {OURS: [], NOISY: []}
        for dose in run.doses:
            frames, clean = _exposed(patterns, dose, run.seed)
            ours = run.networks.denoise(frames, np.ones(frames.shape, np.bool_))
            for name, images in ((OURS, ours), (NOISY, frames)):
                found = [
                    invented_peaks(image, truth)
                    for image, truth in zip(images.astype(np.float64), clean, strict=True)
                ]
                rows[name].append(float(np.mean(found)))
            changed = ours.sum((1, 2), dtype=np.float64) / frames.sum((1, 2), dtype=np.float64) - 1
            counts_error.append(100 * float(np.abs(changed).mean()))
        peaks += [(f"{name}, {title}", tuple(values)) for name, values in rows.items()]
    faint = [_faint_kept(run, dose, n) for dose in run.doses]
    kept = (
        ("of its counts kept, mean", tuple(mean for mean, _ in faint)),
        ("reflections with more than half of them", tuple(share for _, share in faint)),
    )
    tables = (
        Table(
            name="denoise.invented",
            title="Denoising: invented peaks per pattern",
            heading="frames",
            columns=columns,
            rows=tuple(peaks),
            note=f"A peak: {_WINDOW} × {_WINDOW} px with over {_SIGMAS:g} sigma of Poisson noise"
            " more than the truth.",
        ),
        Table(
            name="denoise.faint",
            title=f"Denoising: reflections of {_FAINT:g} electrons beside a direct beam, %",
            heading="what",
            columns=columns,
            rows=kept,
        ),
    )
    of_ours = (value for name, values in peaks if name.startswith(OURS) for value in values)
    checks = (
        Check("Peaks invented per vacuum or even frame, at any dose", largest(of_ours), 0.05),
        Check(
            "Counts lost or made up in vacuum and even frames, mean over frames, %",
            largest(counts_error),
            1.0,
        ),
    )
    return Part(tables, checks)


def _patterns(kind: Kind, n: int, seed: int) -> list[Pattern]:
    rng = np.random.default_rng([FIRST_SEED + seed, *_SHAPE, 4])
    materials = list(HELD_OUT.values())
    return [draw_pattern(rng, _SHAPE, kind=kind, material=materials[0]) for _ in range(n)]


def _exposed(patterns: list[Pattern], dose: float, seed: int) -> tuple[NDArray[np.float32], Array]:
    generator = torch.Generator().manual_seed(FIRST_SEED + seed + round(dose))
    clean = dose * render(patterns, _SHAPE)
    return torch.poisson(clean, generator=generator).numpy(), clean.double().numpy()


def _faint_kept(run: Run, dose: float, n: int) -> tuple[float, float]:
    """Return in % the mean share of a faint reflection's counts that is left, and how many live."""
    rng = np.random.default_rng([FIRST_SEED + run.seed, *_SHAPE, 5])
    h, w = _SHAPE
    plain, places = [], []
    for pattern in _patterns("vacuum", n, run.seed):
        # A small beam in the middle and an even, weak floor: the reflection lies free.
        disks = pattern.disks[:1].copy()
        disks[:, RADIUS] = np.minimum(disks[:, RADIUS], 8.0)
        plain.append(Pattern("vacuum", ((h - 1) / 2, (w - 1) / 2), disks=disks, floor=1e-4))
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(28, 50)
        places.append((away * np.sin(angle), away * np.cos(angle)))
    spot = _reflection()
    clean = dose * render(plain, _SHAPE).double().numpy()
    with_spot = clean.copy()
    apertures = []
    y, x = np.mgrid[:h, :w]
    for image, (dy, dx) in zip(with_spot, places, strict=True):
        cy, cx = round((h - 1) / 2 + dy), round((w - 1) / 2 + dx)
        half = spot.shape[0] // 2
        image[cy - half : cy + half + 1, cx - half : cx + half + 1] += _FAINT * spot
        apertures.append(np.hypot(y - cy, x - cx) <= _APERTURE)
    generator = torch.Generator().manual_seed(FIRST_SEED + run.seed + round(dose) + 1)
    frames = torch.poisson(torch.from_numpy(with_spot), generator=generator).float().numpy()
    found = run.networks.denoise(frames, np.ones(frames.shape, np.bool_)).astype(np.float64)
    shares = [
        (image[a].sum() - truth[a].sum()) / _FAINT
        for image, truth, a in zip(found, clean, apertures, strict=True)
    ]
    return 100 * float(np.mean(shares)), 100 * float(np.mean(np.array(shares) > 0.5))


def _reflection() -> Array:
    """Return a reflection of 2.5 px radius, (11, 11), with sum 1."""
    y, x = np.mgrid[-5:6, -5:6]
    image = 1 / (1 + np.exp((np.hypot(y, x) - 2.5) / 0.4))
    return np.asarray(image / image.sum(), np.float64)
