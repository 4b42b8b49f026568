"""From a finished training to shipped weights: choose, calibrate sigmas, measure, write the card.

Weights are chosen, and sigmas calibrated, with fresh samples of invented crystals (seeds that
neither training nor validation used); the card's figures come from materials that training never
saw.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from prenet4d_engines import weights
from prenet4d_engines.centers import find_centers
from prenet4d_engines.errors import TrainingError, WeightsError
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.models import RefineNet, center, denoiser
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.reading import LOOKS, looks
from prenet4d_engines.simulate import (
    HELD_OUT,
    TRAINING,
    Material,
    Pattern,
    draw_ellipticity,
    draw_pattern,
    expose,
    ideal_detector,
    relatives,
    render,
)
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.train.loop import RECORD
from prenet4d_engines.train.losses import LOSSES
from prenet4d_engines.train.samples import BATCHES, VALIDATION_SEED, draw_mean
from prenet4d_engines.train.sigmas import calibrate
from prenet4d_engines.weights import FOLDER, Name
from prenet4d_engines.whole_file import write_whole

_FIGURES_SEED: Final = 10_000_001
_CHOICE_SEED: Final = VALIDATION_SEED + 2
_BATCH: Final = 32
_INVENTED: Final = 256
"""Crystals that weights are compared on."""
DOSES: Final = (1e2, 1e3, 1e4, 1e5)


@dataclass(frozen=True)
class Shipping:
    """What became of trained weights.

    Attributes:
        chosen: "trained", "shipped" (what the folder held stays) or "mean" (of both).
        losses: The loss of each, on the same fresh samples; empty where there was no choice.
        changed: Whether the folder's weights and card were written.
    """

    chosen: str
    losses: dict[str, float]
    changed: bool


def ship(
    task: Name,
    trained: Path,
    *,
    note: str = "",
    computed: Multislice | None = None,
    folder: Path = FOLDER,
    samples: int = 512,
    on_progress: Callable[[float, str], None] = lambda _share, _note: None,
) -> Shipping:
    """Put trained weights into the package with their card, if they are better than those there.

    Compared on fresh samples are the trained weights, those that the folder holds, and the mean
    of both: weights that were trained on from others often do best halfway (Wortsman et al. 2022).
    The sigmas of all are calibrated first; what is chosen is measured for the card. Weights that
    the folder holds already are calibrated and measured anew.

    Args:
        task: Which network.
        trained: The safetensors that `train` left, beside its record.
        note: What the card shall say of this training, beside the record.
        computed: Multislice patterns of training materials, for a quarter of the fresh samples.
        folder: Holds the shipped weights and their cards; by default the package's own.
        samples: Samples per figure of the card; four times as many calibrate, eight times choose.
        on_progress: Told the share that is done, and what is done now.

    Raises:
        TrainingError: The weights do not fit the network, or have no record beside them.
        WeightsError: The folder has no card to go on with.
        OSError: Something cannot be read or written.
    """
    card = weights.card(task, folder)
    candidates = _candidates(task, trained, folder)
    record = None if set(candidates) == {"shipped"} else _record(trained)
    losses: dict[str, float] = {}
    chosen = next(iter(candidates))
    if task != "denoise":
        # All before they are compared: the sigmas that a loss likes best are not the calibrated.
        for number, each in enumerate(candidates.values()):
            on_progress(0.4 * number / len(candidates), "calibrating sigmas")
            calibrate(task, each, samples=4 * samples, computed=computed)
    if len(candidates) > 1:
        losses = _losses(task, candidates, 8 * samples, computed, on_progress)
        chosen = min(losses, key=losses.__getitem__)
        if chosen == "shipped":
            return Shipping(chosen, losses, changed=False)
    network = candidates[chosen]
    on_progress(0.8, "measuring")
    measured = figures(task, network, samples)
    training = card["training"]
    if record is not None:
        compared = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        record |= {"shipped": chosen, "loss of each": compared}
        training["stretches"].append(record)
        training["note"] = f"{training['note']} {note}".strip()
    training["materials"] = list(TRAINING)
    content = as_safetensors({k: v.contiguous() for k, v in network.state_dict().items()})
    card |= {
        "config": asdict(network.config),  # type: ignore[call-overload]
        "parameters": sum(p.numel() for p in network.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
        "held_out_materials": list(HELD_OUT),
        "figures": measured,
    }
    # One right after the other: weights that their card does not describe are never loaded.
    write_whole(folder / f"{task}.safetensors", content)
    write_whole(folder / f"{task}.json", (json.dumps(card, indent=2) + "\n").encode())
    return Shipping(chosen, losses, changed=True)


def _candidates(task: Name, trained: Path, folder: Path) -> dict[str, nn.Module]:
    """Return what may be shipped, in eval mode."""
    network = weights.untrained(task)
    try:
        network.load_state_dict(load_file(trained))
    except (SafetensorError, RuntimeError) as error:
        raise TrainingError(f"{trained} holds no weights of {task!r} ({error}).") from error
    network.eval()
    try:
        shipped = weights.load(task, folder)
    except WeightsError:  # of a network that was changed since
        return {"trained": network}
    ours, theirs = network.state_dict(), shipped.state_dict()
    if all(torch.equal(value, theirs[name]) for name, value in ours.items()):
        return {"shipped": shipped}
    mean = copy.deepcopy(network)
    mean.load_state_dict({name: _halfway(value, theirs[name]) for name, value in ours.items()})
    return {"trained": network, "shipped": shipped, "mean": mean}


def _halfway(one: Tensor, other: Tensor) -> Tensor:
    return one.lerp(other, 0.5) if one.is_floating_point() else one


def _record(trained: Path) -> dict[str, Any]:
    path = trained.with_name(RECORD)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"How {trained} came about cannot be read ({error}): ship weights from the folder "
            "that their training left them in."
        ) from error
    return found


@torch.no_grad()
def _losses(
    task: Name,
    candidates: dict[str, nn.Module],
    samples: int,
    computed: Multislice | None,
    on_progress: Callable[[float, str], None],
) -> dict[str, float]:
    """Return each network's mean loss on the same samples, of invented crystals."""
    rng = np.random.default_rng(_CHOICE_SEED)
    materials = relatives(rng, _INVENTED)
    totals = dict.fromkeys(candidates, 0.0)
    batches = samples // _BATCH
    for done in range(batches):
        sample = BATCHES[task](rng, _BATCH, materials, computed)
        for name, network in candidates.items():
            loss, _ = LOSSES[task](network, sample)
            totals[name] += float(loss) / batches
        on_progress(0.4 + 0.4 * done / batches, "comparing")
    return totals


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
    """Error of the vector on means of 256 patterns."""
    shape = (128, 128)
    reference = torch.tensor(reference_center(shape), dtype=torch.float64)
    table: dict[str, Any] = {"frame": "128x128", "patterns_averaged": 256, "looks": LOOKS}
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
                *_, look = looks(mean, reference, network)
                truth = torch.tensor(Ellipticity(ratio, theta).vector, dtype=torch.float64)
                deviation = look.vector[0] - truth
                errors.append(deviation.norm())
                covered.append(deviation.abs() < look.left.sigma[0])
            table[f"dose_{dose:.0e}_ratio_to_{largest}"] = {
                "median_percent": _round(100 * torch.stack(errors).median()),
                "p90_percent": _round(100 * torch.stack(errors).quantile(0.9)),
                "share_within_sigma": _round(torch.stack(covered).float().mean()),
            }
    return table


def _round(value: Tensor) -> float:
    return float(f"{float(value):.4g}")
