"""From a finished training to shipped weights: calibrate the sigmas, measure, write the card.

Sigmas are calibrated with fresh samples of invented crystals (seeds that neither training nor
validation used); the card's figures come from materials that training never saw.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from prenet4d_engines import weights
from prenet4d_engines.centers import find_centers
from prenet4d_engines.models import RefineNet, center, denoiser, ellipse
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.simulate import (
    HELD_OUT,
    TRAINING,
    Material,
    Pattern,
    draw_ellipticity,
    draw_pattern,
    expose,
    ideal_detector,
    render,
)
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.train.samples import draw_mean
from prenet4d_engines.train.sigmas import ONE_SIGMA_RADIUS, calibrate
from prenet4d_engines.weights import FOLDER, Name
from prenet4d_engines.whole_file import write_whole

_FIGURES_SEED: Final = 10_000_001
DOSES: Final = (1e2, 1e3, 1e4, 1e5)


def ship(
    task: Name,
    trained: Path,
    *,
    training: dict[str, Any],
    limits: Sequence[str],
    computed: Multislice | None = None,
    folder: Path = FOLDER,
    samples: int = 512,
) -> dict[str, Any]:
    """Calibrate trained weights, measure them, and put them into the package with their card.

    Args:
        task: Which network.
        trained: The safetensors that `train` returned.
        training: What the card shall say of how they came about: data, schedule, seed, machine,
            duration, command.
        limits: What they cannot do, one sentence each.
        computed: Multislice patterns of training materials, to calibrate the sigmas with.
        folder: Where to put both files.
        samples: Samples per figure.

    Returns:
        The card.
    """
    network = weights.untrained(task)
    network.load_state_dict(load_file(trained))
    network.eval()
    if task != "denoise":
        calibrate(task, network, samples=4 * samples, computed=computed)
    content = as_safetensors({k: v.contiguous() for k, v in network.state_dict().items()})
    card = {
        "name": task,
        "network": type(network).__name__,
        "config": asdict(network.config),  # type: ignore[call-overload]
        "parameters": sum(p.numel() for p in network.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
        "training": {**training, "materials": list(TRAINING)},
        "held_out_materials": list(HELD_OUT),
        "figures": figures(task, network, samples),
        "limits": list(limits),
    }
    # One right after the other: weights that their card does not describe are never loaded.
    write_whole(folder / f"{task}.safetensors", content)
    write_whole(folder / f"{task}.json", (json.dumps(card, indent=2) + "\n").encode())
    return card


def figures(
    task: Name, network: nn.Module, samples: int, doses: Sequence[float] = DOSES
) -> dict[str, Any]:
    """Measure a network on held-out materials and an ideal counting detector, dose by dose."""
    materials = tuple(HELD_OUT.values())
    with torch.no_grad():
        if task == "denoise":
            return _denoise_figures(network, materials, samples, doses)
        if task in ("center", "refine"):
            return _center_figures(network, materials, samples, doses)
        return _ellipse_figures(network, materials, samples, doses)


def _expected(
    rng: np.random.Generator, materials: Sequence[Material], shape: tuple[int, int], n: int
) -> tuple[Tensor, Tensor]:
    """Render n patterns that show a beam: expectations (n, h, w) of sum 1 and centers (n, 2)."""
    patterns: list[Pattern] = []
    while len(patterns) < n:
        material = materials[int(rng.integers(len(materials)))]
        pattern = draw_pattern(rng, shape, material=material)
        if pattern.has_beam:
            patterns.append(pattern)
    return render(patterns, shape), torch.tensor([p.center for p in patterns])


def _denoise_figures(
    network: nn.Module, materials: Sequence[Material], samples: int, doses: Sequence[float]
) -> dict[str, Any]:
    """Error against the clean rate, as a share of the noisy frame's, in both domains."""
    shape, n = (256, 256), max(16, samples // 4)
    mask = torch.ones(shape, dtype=torch.bool)
    expected, _ = _expected(np.random.default_rng(_FIGURES_SEED), materials, shape, n)
    table: dict[str, Any] = {"frame": "256x256", "patterns_per_dose": n}
    for dose in doses:
        rows = []
        for frames, rates in _exposed(expected, dose, 16):
            x, context = denoiser.stabilise(frames, mask)
            found = denoiser.restore(network(x), context)
            linear = (found - rates).square().mean((1, 2)) / (frames - rates).square().mean((1, 2))
            root = (found.sqrt() - rates.sqrt()).square().mean((1, 2)) / (
                frames.sqrt() - rates.sqrt()
            ).square().mean((1, 2))
            kept = found.sum((1, 2)) / rates.sum((1, 2))
            rows.append(torch.stack([linear, root, kept, (linear > 1).float()], 1))
        all_rows = torch.cat(rows)
        table[f"dose_{dose:.0e}"] = {
            "linear_gain_db_median": _round(-10 * all_rows[:, 0].log10().median()),
            "square_root_gain_db_median": _round(-10 * all_rows[:, 1].log10().median()),
            "counts_kept_mean": _round(all_rows[:, 2].mean()),
            "share_worse_than_input": _round(all_rows[:, 3].mean()),
        }
    return table


def _center_figures(
    network: nn.Module, materials: Sequence[Material], samples: int, doses: Sequence[float]
) -> dict[str, Any]:
    """Distance of the single-frame answer from the truth in px."""
    shape = (128, 128)
    mask = torch.ones(shape, dtype=torch.bool)
    expected, truth = _expected(np.random.default_rng(_FIGURES_SEED), materials, shape, samples)
    table: dict[str, Any] = {"frame": "128x128", "patterns_per_dose": samples}
    find = _center_finder(network)
    for dose in doses:
        answers = [find(frames, mask) for frames, _ in _exposed(expected, dose, 32)]
        deviation = torch.cat([answer.center for answer in answers]) - truth
        covered = deviation.abs() < torch.cat([answer.sigma for answer in answers])
        distance = deviation.norm(dim=1)
        table[f"dose_{dose:.0e}"] = {
            "median_px": _round(distance.median()),
            "mean_px": _round(distance.mean()),
            "p90_px": _round(distance.quantile(0.9)),
            "share_within_sigma": _round(covered.float().mean()),
        }
    return table


def _exposed(expected: Tensor, dose: float, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Take frames of expectations (n, h, w) with a faultless camera; yield them and their rates."""
    generator = torch.Generator().manual_seed(_FIGURES_SEED + int(dose))
    for part in torch.split(expected, batch):
        yield expose(part, dose, ideal_detector((part.shape[1], part.shape[2])), generator)


def _center_finder(network: nn.Module) -> Callable[[Tensor, Tensor], center.CenterEstimate]:
    """Return what finds centers with one network: the shipped one of the other kind helps it."""
    if isinstance(network, RefineNet):
        both = SimpleNamespace(center=weights.load("center"), refine=network)
        return lambda frames, mask: find_centers(frames, mask, both)

    def alone(frames: Tensor, mask: Tensor) -> center.CenterEstimate:
        bins = Bins.of(frames, mask)
        return center.decode(network(center.prepare(bins)), bins)

    return alone


def _ellipse_figures(
    network: nn.Module, materials: Sequence[Material], samples: int, doses: Sequence[float]
) -> dict[str, Any]:
    """Error of the vector on means of 256 patterns, one look (the corrector takes several)."""
    shape = (128, 128)
    valid = torch.ones(1, *shape)
    table: dict[str, Any] = {"frame": "128x128", "patterns_averaged": 256, "looks": 1}
    for dose in doses:
        rng = np.random.default_rng([_FIGURES_SEED, int(dose)])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for largest in (1.02, 1.1):
            errors, covered = [], []
            for _ in range(samples // 4):
                ratio, theta = draw_ellipticity(rng, largest)
                patterns = draw_mean(rng, shape, (ratio, theta), materials)
                expected = render(patterns, shape).mean(0, keepdim=True)
                mean, _ = expose(expected, 256 * dose, ideal_detector(shape), generator)
                found = ellipse.decode(network(ellipse.prepare(mean, valid)))
                truth = math.log(ratio) * torch.tensor([math.cos(2 * theta), math.sin(2 * theta)])
                error = (found.vector[0] - truth).norm()
                errors.append(error)
                covered.append(error < ONE_SIGMA_RADIUS * found.sigma[0])
            table[f"dose_{dose:.0e}_ratio_to_{largest}"] = {
                "median_percent": _round(100 * torch.stack(errors).median()),
                "p90_percent": _round(100 * torch.stack(errors).quantile(0.9)),
                "share_within_sigma": _round(torch.stack(covered).float().mean()),
            }
    return table


def _round(value: Tensor) -> float:
    return float(f"{float(value):.4g}")
