"""Making the engines for a detector: export, build, compare with float32, keep."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prenet4d_engines import weights
from prenet4d_engines.backends import parity
from prenet4d_engines.backends.parity import Deviation, Network
from prenet4d_engines.backends.tensorrt import build
from prenet4d_engines.backends.tensorrt.cache import EngineCache, Recipe, Sidecar, now
from prenet4d_engines.backends.tensorrt.engine import Engine
from prenet4d_engines.backends.tensorrt.flavors import Toolkit, cuda_fault, gpu, unsuited
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import Graph, export, source_sha256
from prenet4d_engines.graph_cost import cost

BATCHES: Final = (1, 16, 64, 256)
"""The batch sizes that engines are made for, unless others are asked for."""
ELLIPSE_BATCHES: Final = (1,)
"""Mean patterns come one at a time."""


@dataclass(frozen=True)
class Made:
    """An engine that is in the cache now.

    Attributes:
        sidecar: What is known about it.
        kept: It was there already, whole and made from the same things.
    """

    sidecar: Sidecar
    kept: bool


@dataclass(frozen=True)
class Progress:
    """How far the making has come: the share of it all, and what is done now."""

    share: float
    doing: str


def make(
    frame_shape: tuple[int, int],
    toolkit: Toolkit,
    cache: EngineCache,
    *,
    batches: Sequence[int] = BATCHES,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Made]:
    """Make all engines for frames of ``(h, w)`` pixels, one after the other.

    Without a GPU, TensorRT for RTX builds engines too; they are kept for inspection, say that they
    were made for no GPU and compared with nothing, and are never loaded.

    Args:
        frame_shape: Of the detector.
        toolkit: TensorRT, of any flavor.
        cache: Where they are kept.
        batches: Batch sizes of all networks but that of the ellipse; the largest should be that
            of the service.
        force: Make them anew although they are there.
        on_progress: Told where it stands.

    Raises:
        BackendError: an engine cannot be built here, or disagrees with float32.
        FrameError: there are no frames of such a shape.
    """
    tell = on_progress or (lambda _: None)
    if toolkit.flavor == "tensorrt" and not gpu():
        raise BackendError(f"TensorRT builds engines on the GPU they are for. {cuda_fault()}")
    why_not = unsuited(toolkit, gpu())
    if why_not is not None:
        raise BackendError(why_not)
    wanted = sorted(set(batches))
    jobs = [
        (name, batch)
        for name in weights.NAMES
        for batch in (wanted if name != "ellipse" else ELLIPSE_BATCHES)
    ]
    for number, (name, batch) in enumerate(jobs):

        def step(share: float, doing: str, number: int = number) -> None:
            tell(Progress((number + share) / len(jobs), doing))

        step(0.0, f"exporting {name}")
        graph = export(name, frame_shape)
        yield make_one(graph, batch, frame_shape, toolkit, cache, force=force, on_progress=step)


def make_one(
    graph: Graph,
    batch: int,
    frame_shape: tuple[int, int],
    toolkit: Toolkit,
    cache: EngineCache,
    *,
    force: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> Made:
    """Make one engine, or find it made; see `make`."""
    tell = on_progress or (lambda *_: None)
    device = gpu()
    recipe = Recipe(
        network=graph.name,
        input_shape=graph.input_shape,
        graph_sha256=graph.sha256,
        flavor=toolkit.flavor,
        version=toolkit.version,
        gpu=device.name,
        capability=device.capability,
        batch=batch,
    )
    doing = f"building {graph.name} for {batch}"
    with cache.building(lambda: tell(0.0, "waiting for another process that builds")):
        found = None if force else cache.find(recipe)
        if found is not None:
            if found.source_sha256 != source_sha256():  # other sources, yet the same graph
                found = found.model_copy(update={"source_sha256": source_sha256()})
                found = cache.store(found, cache.load(found))
            return Made(found, kept=True)

        timing = cache.timing(toolkit.flavor, toolkit.version, device) if device else b""
        plan = build.build(
            toolkit, graph, batch, timing=timing, on_progress=lambda share: tell(share, doing)
        )
        if device:
            cache.store_timing(toolkit.flavor, toolkit.version, device, plan.timing)
        deviation = None
        if device:
            tell(1.0, f"comparing {graph.name} for {batch} with float32")
            engine = Engine(toolkit, recipe, plan.data, torch.device("cuda"))
            deviation = check(graph.name, engine, batch, frame_shape, engine.device)
            del engine
        counted = cost(graph.model)
        digest = hashlib.sha256(plan.data).hexdigest()
        sidecar = Sidecar(
            recipe=recipe,
            source_sha256=source_sha256(),
            plan=f"{recipe.key}-{digest[:8]}.plan",
            plan_sha256=digest,
            plan_bytes=len(plan.data),
            frame_shape=frame_shape,
            flop=counted.flop,
            activation_bytes=counted.activation_bytes,
            parity=deviation,
            built=now(),
            seconds=plan.seconds,
        )
        return Made(cache.store(sidecar, plan.data), kept=False)


def check_again(sidecar: Sidecar, toolkit: Toolkit, cache: EngineCache) -> Deviation:
    """Load an engine from the cache and compare it with float32 once more.

    Raises:
        BackendError: it does not load or run here, or disagrees with float32.
    """
    recipe = sidecar.recipe
    engine = Engine(toolkit, recipe, cache.load(sidecar), torch.device("cuda"))
    return check(recipe.network, engine, recipe.batch, sidecar.frame_shape, engine.device)


def check(
    name: weights.Name,
    network: Network,
    batch: int,
    frame_shape: tuple[int, int],
    device: torch.device,
) -> Deviation:
    """Compare a compiled network with float32 torch on the CPU, in every row of its batch.

    Args:
        name: Which network it is.
        network: It: (n, C, H, W) float32 on the device, n ≤ batch.
        batch: How many it takes at most.
        frame_shape: Of the patterns to compare on.
        device: Where it runs.

    Raises:
        BackendError: it disagrees by more than `parity.ENGINE` allows; the figures are in the
            message.
    """

    def in_full_batches(x: Tensor) -> Tensor:
        rounds = -(-batch // len(x))
        parts = torch.split(x.repeat(rounds, 1, 1, 1), batch)
        return torch.cat([network(part) for part in parts])

    deviation = parity.measure(name, in_full_batches, weights.load(name), frame_shape, device)
    if not deviation.within(parity.ENGINE):
        raise BackendError(
            f"The engine of {name} for {batch} frames disagrees with float32 and is not used: "
            f"{deviation.told(parity.ENGINE)}. Use the backend torch, and report this with the "
            "versions that `prenet4d doctor` shows."
        )
    return deviation
