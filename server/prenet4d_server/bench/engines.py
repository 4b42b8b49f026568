"""How fast each stage of the correction is on this machine's devices, beside what they allow.

Every stage is measured as the corrector uses it, on the slots that it uses. The *floor* of a stage
is the time that its arithmetic or its bytes take at the least, whichever is more, at the speeds of
large matrix products and large copies, which are measured on the same device in the same run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from prenet4d_engines import processor, weights
from prenet4d_engines.backends import Backend, TorchBackend, select
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.corrector import Corrector
from prenet4d_engines.errors import BackendError
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.lanes import Fetched
from prenet4d_engines.models import center, denoiser, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import inversion
from prenet4d_engines.stages import Camera, Station
from prenet4d_engines.tracking import CenterTracker
from prenet4d_engines.virtual import DetectorRadii, VirtualDetectors
from prenet4d_server.bench import machine
from prenet4d_server.bench.stream import example_frames
from prenet4d_server.doctor import nvidia_smi

SHAPES = ((128, 128), (192, 192), (256, 256), (512, 512))
GPU_BATCHES = (1, 4, 16, 64, 128, 256, 512)
CPU_BATCHES = (1, 8, 32)
STAGES = (
    *("copy in", "denoiser", "center network", "refining network", "look", "track", "average"),
    *("straighten", "copy out", "whole"),
)
"""``look`` holds the copy in, these networks and the work around them; ``straighten`` the copy out;
``track`` runs on the host. ``whole`` is the corrector, host to host, with batches overlapping."""
_NETWORKS = ("denoiser", "center network", "refining network")
_OVER_THE_BUS = ("copy in", "copy out")
_LEAST_RUNS = 2
_PARTS = 16
_UNDER_WAY = 3
"""Runs whose results wait in page-locked memory."""
_DISTINCT = 32
Say = Callable[[float, str], None]
Asked: TypeAlias = Sequence[Fetched]
"""What one run of a stage has under way to the host."""


@dataclass(frozen=True)
class Peaks:
    """What a device reaches at the most, measured.

    Attributes:
        flops: Operations per second in large matrix products, in the networks' arithmetic.
        copied: Bytes per second read and written by large copies on the device, both counted.
        bus: Bytes per second from page-locked host memory; on the CPU the same as ``copied``.
    """

    flops: float
    copied: float
    bus: float


@dataclass(frozen=True)
class Cell:
    """One stage at one size and batch.

    Attributes:
        backend: Which backend, and on what: ``torch-cpu``.
        frame_shape: ``(h, w)`` px.
        batch: Frames in a batch.
        stage: One of ``STAGES``.
        us_per_frame: Microseconds.
        floor_us: Of a frame; ``None`` where none is known.
    """

    backend: str
    frame_shape: tuple[int, int]
    batch: int
    stage: str
    us_per_frame: float
    floor_us: float | None


@dataclass
class Report:
    """Everything that was measured."""

    machine: dict[str, str | float]
    devices: dict[str, dict[str, str]]
    """By backend: its description, the device's name, driver and libraries."""
    peaks: dict[str, Peaks] = field(default_factory=dict)
    """By backend."""
    cells: list[Cell] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def of(self, backend: str, frame_shape: tuple[int, int]) -> dict[str, dict[int, Cell]]:
        """The cells of a backend and shape: stage → batch → cell."""
        found: dict[str, dict[int, Cell]] = {}
        for cell in self.cells:
            if (cell.backend, cell.frame_shape) == (backend, frame_shape):
                found.setdefault(cell.stage, {})[cell.batch] = cell
        return found

    def to_json(self) -> str:
        """Everything as JSON text."""
        cells = [
            asdict(cell) | {"frames_per_second": 1e6 / cell.us_per_frame} for cell in self.cells
        ]
        return json.dumps(asdict(self) | {"cells": cells}, indent=1)

    def plot(self, path: Path) -> None:
        """Draw the whole corrector's frames per second over the batch size."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        styles = dict(zip(self.devices, itertools.cycle(("-", "--", ":")), strict=False))
        for backend, shape in dict.fromkeys((c.backend, c.frame_shape) for c in self.cells):
            whole = self.of(backend, shape).get("whole", {})
            rates = [1e6 / cell.us_per_frame for cell in whole.values()]
            label = f"{shape[0]} × {shape[1]}, {backend}"
            axes.loglog(list(whole), rates, styles[backend], marker="o", label=label)
        axes.set_xlabel("frames in a batch")
        axes.set_ylabel("frames per second, host to host")
        axes.set_title("\n".join(about["device"] for about in self.devices.values()), fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def backends() -> Iterator[tuple[str, Backend]]:
    """Every backend that runs here, the fastest kind first, and its name."""
    if torch.cuda.is_available():
        with contextlib.suppress(BackendError, OSError):
            yield "tensorrt", select("tensorrt")
        yield "torch-gpu", TorchBackend(device="cuda")
    yield "torch-cpu", TorchBackend(device="cpu")


def run(
    chosen: Sequence[tuple[str, Backend]],
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    batches: Sequence[int] | None = None,
    seconds: float = 60.0,
    say: Say,
) -> Report:
    """Measure every stage of every backend.

    Args:
        chosen: names and backends.
        shapes: ``(h, w)`` px of frames.
        batches: frames in a batch; ``None``: what suits the device.
        seconds: about how long to measure in all.
        say: told the share that is done and what is being measured.
    """
    report = Report(machine.describe(), {name: about(each) for name, each in chosen})
    plan = [
        (name, backend, shape, batch)
        for name, backend in chosen
        for shape in shapes
        for batch in batches or (GPU_BATCHES if backend.device.type == "cuda" else CPU_BATCHES)
    ]
    each = seconds / max(1, len(plan) * len(STAGES))
    for number, (name, backend, shape, batch) in enumerate(plan):
        say(number / len(plan), f"{name}, {shape[0]} × {shape[1]}, {batch} frames")
        if name not in report.peaks:
            report.peaks[name] = measure_peaks(backend, each)
        bench = _Bench(name, backend, shape, batch, each, report.peaks[name])
        try:
            report.cells += bench.cells()
        except torch.OutOfMemoryError:
            report.left_out.append(f"{name}, {shape}, {batch} frames: the memory does not suffice.")
        bench.clear()
    return report


def about(backend: Backend) -> dict[str, str]:
    """Say what a backend runs on, for the record."""
    found = {"description": backend.description, "device": processor.name()}
    if backend.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(backend.device)
        found["driver"] = nvidia_smi() or "unknown"
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def measure_peaks(backend: Backend, seconds: float) -> Peaks:
    """Measure what a backend's device reaches in large products and copies, on all of its cores."""
    device = backend.device
    on_gpu = device.type == "cuda"

    def rate(work: Callable[[int], object], each: float) -> float:
        """So much of something per second, where every call of ``work`` does ``each``."""

        def many() -> Asked:
            backend.spread(lambda part: [work(i) for i in range(part.start, part.stop)], _PARTS)
            return ()

        return _PARTS * each / _seconds_each(many, device, seconds)

    side = 8192 if on_gpu else 512
    products = []
    for dtype in (torch.float16,) if on_gpu else (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype, device=device)
        products.append(rate(lambda _, a=a: a @ a, 2 * side**3))  # type: ignore[misc]
    source = torch.ones(_PARTS, (1 << 22) if on_gpu else (1 << 20), device=device)
    target = torch.empty_like(source)
    copied = rate(lambda i: target[i].copy_(source[i]), 2 * source[0].nbytes)
    if not on_gpu:
        return Peaks(max(products), copied, copied)
    here = torch.ones(1 << 26, pin_memory=True)
    there = torch.empty_like(here, device=device)
    bus = rate(lambda _: there.copy_(here, non_blocking=True), here.nbytes)
    return Peaks(max(products), copied, bus)


def _network_inputs(counts: Tensor, mask: Tensor) -> dict[weights.Name, Tensor]:
    """What the networks that see every frame read of frames (n, h, w), in the stages' order."""
    bins = Bins.of(counts, mask)
    n, h, w = counts.shape
    middle = counts.new_tensor(reference_center((h, w))).expand(n, 2)
    guess = inversion(bins, middle)
    return {
        "denoise": denoiser.stabilise(counts, mask)[0],
        "center": center.prepare(bins),
        "refine": refine.prepare(bins, guess, torch.full_like(middle, 0.1 * bins.factor)),
    }


def network_cost(name: weights.Name, x: Tensor) -> tuple[int, int]:
    """Count a network's operations and the bytes that its convolutions read and write in float16.

    Args:
        name: which.
        x: (1, C, H, W), what it reads.

    Returns:
        Of one frame. Only convolutions count, so that it is a floor.
    """
    network = weights.load(name).to("meta")
    counted = [0, 0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        counted[0] += 2 * output.numel() * module.weight[0].numel()
        counted[1] += 2 * (inputs[0].numel() + output.numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(x.to("meta"))
    return counted[0], counted[1]


class _Bench:
    """One backend at one size and batch."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        shape: tuple[int, int],
        batch: int,
        seconds: float,
        peaks: Peaks,
    ) -> None:
        self._name, self._backend, self._shape, self._batch = name, backend, shape, batch
        self._seconds, self._peaks = seconds, peaks
        self._station = Station(backend)
        frames = torch.from_numpy(np.resize(example_frames(shape, _DISTINCT), (batch, *shape)))
        # page-locked, as the service's ring is
        self._held = frames.pin_memory() if backend.device.type == "cuda" else frames
        self._frames = self._held.numpy()

    @torch.inference_mode()
    def cells(self) -> list[Cell]:
        """Measure every stage."""
        cells, floors = [], self._floors()
        on_gpu = self._backend.device.type == "cuda"
        for stage, work in self._stages():
            if stage in _OVER_THE_BUS and not on_gpu:
                continue
            with self._station.lanes.computing():
                took = _seconds_each(work, self._backend.device, self._seconds)
            cells.append(self._cell(stage, took, floors.get(stage)))
        most = max(floors["copy in"], floors["copy out"], floors["look"] + floors["straighten"])
        cells.append(self._cell("whole", self._whole(), most))
        return cells

    def clear(self) -> None:
        """Let go of the device's memory."""
        self._station.clear()

    def _cell(self, stage: str, seconds: float, floor: float | None) -> Cell:
        us = 1e6 * seconds / self._batch
        floor_us = None if floor is None else 1e6 * floor
        return Cell(self._name, self._shape, self._batch, stage, us, floor_us)

    def _stages(self) -> Iterator[tuple[str, Callable[[], Asked]]]:
        lanes, backend, n = self._station.lanes, self._backend, self._batch
        camera = Camera(self._shape, None, 1.0, None)
        slot = self._station.take(camera, self._frames.dtype, n)
        with lanes.computing():
            counts = torch.from_numpy(self._frames.astype(np.float32)).to(backend.device)
            x = _network_inputs(counts, camera.trusted(backend.device))
        buffer = lanes.buffer(self._frames.shape, torch.uint16)
        middle = reference_center(self._shape)
        centers, indices = np.tile(np.array(middle), (n, 1)) + 0.3, np.arange(n)
        tracker, sigmas = CenterTracker((1 << 20, 256)), np.full((n, 2), 0.1)
        others = np.zeros((n, center.OTHERS, 4))
        numbers = itertools.count()
        detectors = VirtualDetectors(self._shape, middle)
        detectors.set(DetectorRadii(5.0, 7.0, 20.0))
        slot.place(centers, np.ones(n, bool), middle, Ellipticity(1.03, 0.5))

        def recorded(work: Callable[[slice], Tensor]) -> Callable[[], Asked]:
            again = lanes.record(lambda: torch.cat(backend.spread(work, n)))
            return lambda: _nothing(again())

        yield "copy in", lambda: _nothing(lanes.send(self._frames, buffer))
        yield "denoiser", recorded(lambda part: backend.denoise(x["denoise"][part]))
        yield "center network", recorded(lambda part: backend.center(x["center"][part]))
        yield "refining network", recorded(lambda part: backend.refine(x["refine"][part]))
        yield "look", lambda: (slot.look(self._frames),)
        yield (
            "track",
            lambda: _nothing(
                tracker.update(n * next(numbers) + indices, centers, sigmas, others=others)
            ),
        )
        yield "average", lambda: _nothing(slot.average())
        yield "straighten", lambda: slot.straighten(n, detectors.weights)
        patterns = torch.zeros((2, n, *self._shape), device=backend.device)
        yield "copy out", lambda: [lanes.deliver(each) for each in patterns]
        self._station.give_back(slot)

    def _floors(self) -> dict[str, float]:
        """Seconds a frame at the least."""
        peaks, pixels = self._peaks, self._shape[0] * self._shape[1]
        counts = torch.zeros((1, *self._shape))
        mask = torch.ones(self._shape, dtype=torch.bool)
        floors: dict[str, float] = {}
        for stage, (name, x) in zip(_NETWORKS, _network_inputs(counts, mask).items(), strict=True):
            flop, moved = network_cost(name, x)
            floors[stage] = max(flop / peaks.flops, moved / peaks.copied)
        floors["copy in"] = 2 * pixels / peaks.bus
        floors["copy out"] = 8 * pixels / peaks.bus
        # the frame as it came is read, denoised and raw counts are written
        networks = sum(floors[stage] for stage in _NETWORKS)
        floors["look"] = networks + 10 * pixels / peaks.copied
        floors["average"] = 4 * pixels / peaks.copied
        floors["straighten"] = 16 * pixels / peaks.copied
        return floors

    def _whole(self) -> float:
        """Seconds a batch takes from host to host, with batches overlapping."""
        corrector = Corrector(self._shape, config=CorrectorConfig(), stations=[self._station])
        indices = np.arange(self._batch)

        def submit(number: int) -> None:
            corrector.submit(self._frames, self._batch * number + indices)

        for number in range(4):  # every slot is used, everything is recorded
            submit(number)
        corrector.finish()
        started, number = time.perf_counter(), 4
        while number < 4 + 2 * _LEAST_RUNS or time.perf_counter() - started < self._seconds:
            submit(number)
            number += 1
        corrector.finish()
        return (time.perf_counter() - started) / (number - 4)


def _nothing(_done: object) -> Asked:
    return ()


def _seconds_each(work: Callable[[], Asked], device: torch.device, seconds: float) -> float:
    """How long one run takes, after one to warm up; on a GPU the next ones are under way."""
    _run(work, device, 1)
    once = _run(work, device, 1)
    return _run(work, device, max(_LEAST_RUNS, round(seconds / once)))


def _run(work: Callable[[], Asked], device: torch.device, times: int) -> float:
    asked: deque[Asked] = deque()
    started = time.perf_counter()
    for _ in range(times):
        asked.append(work())
        if len(asked) > _UNDER_WAY:
            for each in asked.popleft():
                each.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times
