"""The training loop, the same for all networks: reads top to bottom.

Samples are simulated on the fly by worker processes. Weights are averaged (EMA); the averages are
what is validated and shipped. Every few hundred steps a checkpoint holds all that is needed to go
on: weights, averages, optimiser, step and time spent.
"""

from __future__ import annotations

import copy
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prenet4d_engines import processor
from prenet4d_engines.errors import TrainingError
from prenet4d_engines.simulate.materials import TRAINING, relatives
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.train.losses import LOSSES
from prenet4d_engines.train.muon import optimisers
from prenet4d_engines.train.samples import BATCHES, VALIDATION_SEED, Sample, Samples
from prenet4d_engines.weights import NAMES, Name, untrained
from prenet4d_engines.whole_file import write_whole

_PEAK_RATE: Final[dict[Name, float]] = {
    "denoise": 1e-3,
    "center": 2e-3,
    "refine": 2e-3,
    "ellipse": 2e-3,
}
_WARM_UP_STEPS: Final = 200
_EMA_DECAY: Final = 0.998
_VALIDATION_BATCHES: Final = 6
_LOG_EVERY: Final = 20
_UNREADABLE: Final = (RuntimeError, UnpicklingError, EOFError, LookupError, TypeError, ValueError)
"""What torch raises at a file that is no checkpoint of this network."""
CHECKPOINT_EVERY: Final = 240
"""Steps between two checkpoints."""
CHECKPOINT: Final = "checkpoint.pt"
"""The file in a training's folder that it can be resumed from."""
RECORD: Final = "training.json"
"""The file beside trained weights that says how they came about, for their model card."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        step: Steps done.
        share: Of the training, done: of its steps or of its time, whichever is further.
        loss: Training loss, averaged over the last steps.
        validation: Validation figures of the averaged weights, where this step made them.
        samples_per_second: Training speed.
        seconds_left: Estimated time left.
    """

    step: int
    share: float
    loss: float
    validation: dict[str, float]
    samples_per_second: float
    seconds_left: float


def train(
    task: Name,
    *,
    steps: int,
    out_dir: Path,
    batch_size: int = 64,
    seed: int = 0,
    threads: int = 2,
    workers: int = 1,
    resume: bool = False,
    minutes: float | None = None,
    start_from: Path | None = None,
    peak_rate: float | None = None,
    multislice: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train one network from simulated patterns.

    Args:
        task: Which network.
        steps: Optimiser steps; the learning rate falls to zero over them.
        out_dir: Takes `checkpoint.pt`, `log.jsonl`, `loss.png`, `<task>.safetensors` and
            `training.json`, which says by what command, how long and where they were trained.
        batch_size: Samples per step, even.
        seed: Below 9,000,000; the same seed on the same machine gives the same samples.
        threads: Threads of the optimiser.
        workers: Simulator processes; 0 simulates in this process.
        resume: Go on from `checkpoint.pt` in `out_dir`, with the rate, batch size, seed and
            computed patterns that it was begun with; steps and minutes may be others.
        minutes: Stop after that long even if steps are left; the schedule then follows the
            clock, so that the rate still reaches zero.
        start_from: Weights (safetensors) to begin with instead of random ones; those of a network
            with fewer channels are widened. A training that is resumed goes on with its own.
        peak_rate: Learning rate after the warm-up; None for the network's own. Half of it or less
            suits weights that were trained before.
        multislice: Computed patterns of training materials (`prenet4d simulate --multislice`), of
            which a quarter of the samples is made; validation is the same with and without them.
        on_progress: Called every few steps.

    Returns:
        The path of the averaged weights as safetensors.

    Raises:
        TrainingError: Unknown task, bad numbers, nothing that can be resumed, a training in
            `out_dir` that would be lost, one that was begun otherwise, weights that do not fit,
            computed patterns of materials that are kept for evaluation, or a loss that is not
            finite.
        SimulationError: `multislice` holds no computed patterns.
        OSError: What is to be kept cannot be written.
    """
    _refuse_nonsense(task, steps, batch_size, threads, workers, seed, minutes, peak_rate)
    checkpoint, log = out_dir / CHECKPOINT, out_dir / "log.jsonl"
    if checkpoint.exists() and not resume:
        raise TrainingError(
            f"{out_dir} holds a training already: go on with it (--resume), or train into another "
            "folder (--out)."
        )
    computed = _computed(multislice)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    rate = _PEAK_RATE[task] if peak_rate is None else peak_rate
    begun = {"rate": rate, "batch-size": batch_size, "seed": seed, "multislice": bool(multislice)}
    training = _Training.begin(task, None if resume else start_from, rate, begun, device)
    if resume:
        training.restore(checkpoint)
        _cut(log, training.step)
    else:
        out_dir.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
    options = {
        "minutes": minutes,
        "steps": steps,
        "batch-size": batch_size,
        "threads": threads,
        "workers": workers,
        "seed": seed,
        "rate": rate,
        "from": start_from and start_from.name,
        "multislice": multislice and multislice.name,
    }
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    command = ["prenet4d train", task, *given, *(["--resume"] if resume else [])]
    training.commands.append(" ".join(command))

    loader = DataLoader(
        Samples(task, batch_size, seed, start=training.step, computed=computed),
        batch_size=None,
        collate_fn=_by_value,  # type: ignore[arg-type]  # batches come ready-made
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    validation = _validation_set(task, batch_size)
    started = time.monotonic() - training.seconds
    smooth: float | None = None
    figures: dict[str, float] = {}
    first, first_time = training.step, time.monotonic()
    share = _share(training.step, steps, training.seconds, minutes)
    for sample in loader:
        if share >= 1.0:
            break
        loss = training.learn(sample, _scheduled(rate, training.step, share))
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        step, training.seconds = training.step, time.monotonic() - started
        share = _share(step, steps, training.seconds, minutes)
        if step % _LOG_EVERY == 0 or share >= 1.0:
            figures = {}
            if step % CHECKPOINT_EVERY == 0 or share >= 1.0:
                figures = validate(task, training.average, validation, device)
                training.save(checkpoint)
            speed = (step - first) / (time.monotonic() - first_time)
            left = max(0.0, (1 - share) * training.seconds / max(share, 1e-6))
            progress = Progress(step, share, smooth, figures, batch_size * speed, left)
            with log.open("a") as lines:
                lines.write(json.dumps(asdict(progress)) + "\n")
            if on_progress is not None:
                on_progress(progress)

    weights = out_dir / f"{task}.safetensors"
    values = training.average.state_dict().items()
    write_whole(weights, as_safetensors({name: v.contiguous().cpu() for name, v in values}))
    precision = "bf16" if _is_short(device) else "float32"
    record = {
        "command": training.commands,
        "steps": training.step,
        "samples": training.step * batch_size,
        "seed": seed,
        "minutes": round(training.seconds / 60, 1),
        "schedule": f"Muon and AdamW, {_WARM_UP_STEPS} steps of warm-up to {rate:g}, "
        f"cosine to zero, averaged weights (EMA {_EMA_DECAY}), {precision}",
        "machine": f"{threads} + {workers} cores of {processor.name()}"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device),
        "validation": figures or validate(task, training.average, validation, device),
    }
    write_whole(out_dir / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    _plot(task, log, out_dir / "loss.png")
    return weights


def _refuse_nonsense(
    task: str,
    steps: int,
    batch_size: int,
    threads: int,
    workers: int,
    seed: int,
    minutes: float | None,
    peak_rate: float | None,
) -> None:
    if task not in NAMES:
        raise TrainingError(f"There is no network {task!r}. Choose one of {', '.join(NAMES)}.")
    if steps < 1 or batch_size < 2 or batch_size % 2:
        raise TrainingError("steps must be at least 1 and batch_size an even number.")
    if threads < 1 or workers < 0:
        raise TrainingError("threads must be at least 1, and workers 0 or more.")
    if not all(limit is None or 0 < limit < math.inf for limit in (minutes, peak_rate)):
        raise TrainingError("minutes and peak_rate must be positive numbers where they are given.")
    if not 0 <= seed < VALIDATION_SEED:
        raise TrainingError(
            f"The seed must lie in [0, {VALIDATION_SEED}): those above validate and evaluate."
        )


def _computed(multislice: Path | None) -> Multislice | None:
    """Load computed patterns, of nothing that is kept for evaluation."""
    if multislice is None:
        return None
    computed = Multislice.load(multislice)
    if unseen := set(computed.materials) - set(TRAINING):
        raise TrainingError(
            f"{multislice} holds patterns of {', '.join(unseen)}, which training must not see: "
            "they belong to the evaluation."
        )
    return computed


@dataclass
class _Training:
    """What learns, and how far it has come: all that a checkpoint holds."""

    task: Name
    network: nn.Module
    average: nn.Module
    """Follows the network; its weights are what is validated and shipped."""
    optimisers: tuple[torch.optim.Optimizer, ...]
    begun: dict[str, float]
    """What decides which samples come and how they are learned from, by the option's name."""
    device: torch.device
    commands: list[str] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(
        cls,
        task: Name,
        start_from: Path | None,
        rate: float,
        begun: dict[str, float],
        device: torch.device,
    ) -> Self:
        """Begin with weights that exist, or with random ones."""
        network = untrained(task).to(device)
        if start_from is not None:
            _begin_with(network, start_from, task)
        steppers = optimisers(network, rate, decay=1e-2)
        return cls(task, network, copy.deepcopy(network).eval(), steppers, begun, device)

    def learn(self, sample: Sample, rate: float) -> float:
        """Take one step; return its loss."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        self.network.train()
        reading = _HalfPrecision(self.network, self.device)
        loss, _ = LOSSES[self.task](reading, _to(sample, self.device))
        if not math.isfinite(value := float(loss.detach())):
            raise TrainingError(
                f"The loss is {value} at step {self.step}; lower the learning rate."
            )
        self.network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        self._follow()
        return value

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights and statistics toward the current ones."""
        decay = min(_EMA_DECAY, (1 + self.step) / (10 + self.step))
        theirs = self.network.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(theirs[name], 1.0 - decay)
            else:
                value.copy_(theirs[name])

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        buffer = io.BytesIO()
        torch.save(
            {
                "task": self.task,
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "step": self.step,
                "seconds": self.seconds,
                "begun": self.begun,
                "commands": self.commands,
            },
            buffer,
        )
        write_whole(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        """Take over what `save` wrote; what it was begun with must be the same."""
        if not path.exists():
            raise TrainingError(f"There is no checkpoint to resume in {path.parent}.")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state["task"] != self.task:
                raise TrainingError(f"The checkpoint in {path.parent} is of {state['task']!r}.")
            for name, value in self.begun.items():
                if (was := state["begun"][name]) != value:
                    raise TrainingError(
                        f"The training in {path.parent} was begun with --{name} {was}, not "
                        f"{value}: give what it was begun with to go on."
                    )
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            for optimiser, theirs in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(theirs)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.commands = list(state["commands"])
        except _UNREADABLE as error:
            raise TrainingError(
                f"{path} is damaged, or a checkpoint of another version of the network "
                f"({type(error).__name__}: {error}). Train anew, without resuming."
            ) from error


def _begin_with(network: nn.Module, path: Path, task: Name) -> None:
    """Load weights; where the network has more channels, nothing reads the new ones at first.

    So it computes what the narrower one did (Net2Net, Chen et al. 2016).
    """
    try:
        given = load_file(path)
        own = network.state_dict()
        network.load_state_dict(given | {name: _wide(name, given[name], own[name]) for name in own})
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise TrainingError(
            f"Training cannot start from {path}: it holds no weights of {task!r} ({error})."
        ) from error


def _wide(name: str, value: Tensor, own: Tensor) -> Tensor:
    if ".qkv." in name and value.shape != own.shape:  # heads would mix other channels
        raise ValueError("attention cannot be widened")
    if own.dim() > 1:
        own[:, value.shape[1] :] = 0
    own[tuple(slice(size) for size in value.shape)].copy_(value)
    return own


def _share(step: int, steps: int, seconds: float, minutes: float | None) -> float:
    """Say how much of a training is done."""
    return step / steps if minutes is None else max(step / steps, seconds / (60 * minutes))


def _scheduled(rate: float, step: int, share: float) -> float:
    """Warm up linearly, then fall to zero along a cosine."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    return rate * warm * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


class _HalfPrecision(nn.Module):
    """The network in bf16 where that is fast, inside a loss that stays in FP32."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network, self.device = network, device
        self.short = _is_short(device)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.short):
            y: Tensor = self.network(x)
        return y.float()


def _is_short(device: torch.device) -> bool:
    return device.type == "cuda" or processor.has_bfloat16_units()


def _by_value(sample: Sample) -> dict[str, NDArray[np.generic]]:
    """Have workers send arrays through their pipe: containers give little shared memory."""
    return {name: value.numpy() for name, value in sample.items()}


def _to(sample: Sample | dict[str, NDArray[np.generic]], device: torch.device) -> Sample:
    return {name: torch.as_tensor(value).to(device) for name, value in sample.items()}


def _validation_set(task: Name, batch_size: int) -> list[Sample]:
    rng = np.random.default_rng(VALIDATION_SEED)
    materials = relatives(rng, _VALIDATION_BATCHES * batch_size)
    return [BATCHES[task](rng, batch_size, materials) for _ in range(_VALIDATION_BATCHES)]


@torch.no_grad()
def validate(
    task: Name, network: nn.Module, batches: list[Sample], device: torch.device
) -> dict[str, float]:
    """Return loss and figures over a fixed set, averaged over its batches, in FP32."""
    network.eval()
    rows = []
    for sample in batches:
        loss, figures = LOSSES[task](network, _to(sample, device))
        rows.append({"loss": loss, **figures})
    return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}


def _cut(log: Path, step: int) -> None:
    """Leave out of a log what came after a step: it is done again; the last line may be torn."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    log.write_text("".join(kept))


def _plot(task: Name, log: Path, picture: Path) -> None:
    """Draw training and validation loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    axes.plot(steps, losses, "o-", markersize=2, label="training, mean over the last steps")
    checked = [r for r in rows if r["validation"]]
    axes.plot(
        [r["step"] for r in checked],
        [r["validation"]["loss"] for r in checked],
        "o-",
        markersize=3,
        label="validation, averaged weights",
    )
    axes.set(xlabel="step", ylabel="loss", title=task)
    later = rows[len(rows) // 10 :]  # the first losses may lie so far above that all else is flat
    shown = [v for r in later for v in (r["loss"], r["validation"].get("loss", r["loss"]))]
    if shown and (least := min(shown)) < (most := max(shown)):
        axes.set_ylim(least - 0.05 * (most - least), most + 0.15 * (most - least))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend()
    figure.savefig(picture, dpi=120)
