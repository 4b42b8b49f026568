"""From an ONNX graph to a plan: one way for TensorRT 10, TensorRT 11 and TensorRT for RTX."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from prenet4d_engines.backends.tensorrt.api import (
    BuilderConfig,
    Module,
    NetworkDefinition,
    ProgressMonitor,
    TimingCache,
)
from prenet4d_engines.backends.tensorrt.flavors import Toolkit, make_logger
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import INPUT, LARGEST_BATCH, OUTPUT, Graph


@dataclass(frozen=True)
class TensorInfo:
    """A tensor at the network's border; a dimension of -1 is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Plan:
    """A compiled engine as bytes, which hold executable code.

    Attributes:
        data: What the flavor's runtime loads, on the GPU that it was built on.
        timing: The timing cache after the build; empty for TensorRT for RTX.
        seconds: How long the build took.
    """

    data: bytes
    timing: bytes
    seconds: float


def build(
    toolkit: Toolkit,
    graph: Graph,
    batch: int,
    *,
    timing: bytes = b"",
    on_progress: Callable[[float], None] | None = None,
) -> Plan:
    """Compile a graph for the current device and for one batch size.

    The engine's only profile takes that size and nothing else: kernels are chosen for it, and
    nothing depends on a shape that is known only when it runs. The weights are small; engines for
    several sizes beside each other cost less than profiles that share one engine are worth.

    Args:
        toolkit: TensorRT, of any flavor.
        graph: What to compile.
        batch: Frames that the engine takes at a time, 1 to 4096.
        timing: Timing cache of an earlier build on the same device; it saves time only.
        on_progress: Told the share that is done, 0 to 1.

    Raises:
        BackendError: the graph is not understood, or no engine can be made of it here.
        KeyboardInterrupt: ``on_progress`` raised it, or the user did; the build was stopped.
    """
    started = time.monotonic()
    module = toolkit.module
    if not 1 <= batch <= LARGEST_BATCH:
        raise BackendError(f"An engine takes 1 to {LARGEST_BATCH} frames at a time, not {batch}.")
    logger, errors = make_logger(module)
    try:
        builder = module.Builder(logger)
    except (TypeError, RuntimeError) as error:
        raise BackendError(f"{toolkit} does not start: {_last(errors, error)}.") from error
    # TensorRT 10 has to be told; TensorRT 11 knows nothing else
    flag = int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(1 << flag)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(graph.model):
        told = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BackendError(
            f"{toolkit} does not understand the graph of {graph.name}: "
            f"{'; '.join(told).rstrip('.')}."
        )
    _check_ends(toolkit, network, graph)

    config = builder.create_builder_config()
    # The few parts in FP32 are there for the digits that TF32 would drop.
    config.clear_flag(module.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    shape = (batch, *graph.input_shape)
    profile.set_shape(INPUT, shape, shape, shape)
    config.add_optimization_profile(profile)
    # TensorRT for RTX times nothing when it builds, and has no such cache
    timings = _timing_cache(config, timing) if toolkit.flavor == "tensorrt" else None
    monitor = make_monitor(module, on_progress or (lambda _: None))
    config.progress_monitor = monitor

    plan = builder.build_serialized_network(network, config)
    stopped = cast(Any, monitor).stopped
    if stopped is not None:
        raise stopped
    if plan is None:
        raise BackendError(
            f"{toolkit} could not build the engine of {graph.name}: "
            f"{_last(errors, 'it does not say why')}."
        )
    return Plan(
        data=bytes(plan),
        timing=bytes(timings.serialize()) if timings is not None else b"",
        seconds=time.monotonic() - started,
    )


def make_monitor(module: Module, tell: Callable[[float], None]) -> ProgressMonitor:
    """Return a monitor that turns TensorRT's nested phases into a share that never falls.

    Its ``stopped`` is what ``tell``, or the user's Ctrl-C, raised: exceptions must not pass through
    TensorRT, so the build is asked to stop and the exception kept.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._phases: dict[str, list[Any]] = {}  # name: [parent, steps, steps done]
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(1, num_steps), 0]

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._phases:
                    self._phases[phase_name][2] = step + 1
                share = max((self._done(name) for name in list(self._phases)), default=0.0)
                if share > self._share:
                    self._share = share
                    tell(share)
            except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - raised after the build
                self.stopped = error
            return self.stopped is None

        def _done(self, name: str) -> float:
            """Return the share of the whole build that stands when this phase has come so far."""
            share = 0.0
            while name in self._phases:
                parent, steps, done = self._phases[name]
                share = min(1.0, (done + share) / steps)
                if parent not in self._phases:
                    break
                name = parent
            return share

    return cast(ProgressMonitor, Monitor())


def _check_ends(toolkit: Toolkit, network: NetworkDefinition, graph: Graph) -> None:
    """Refuse a network whose input and output are not one each and as the graph says."""
    types = toolkit.module.DataType
    names = {types.HALF: "float16", types.FLOAT: "float32"}
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    found = [
        TensorInfo(each.name, tuple(each.shape), names.get(each.dtype, str(each.dtype)))
        for each in (*inputs, *outputs)
    ]
    wanted = TensorInfo(INPUT, (-1, *graph.input_shape), "float16")
    if len(inputs) != 1 or len(outputs) != 1 or found[0] != wanted or found[1].name != OUTPUT:
        raise BackendError(
            f"The graph of {graph.name} should read {wanted} and answer {OUTPUT!r}; "
            f"{toolkit} understood {found}."
        )


def _timing_cache(config: BuilderConfig, known: bytes) -> TimingCache | None:
    """Put a timing cache to use, with what is known if it fits; it must outlive the build."""
    for blob in (known, b""):
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _last(errors: list[str], otherwise: object) -> str:
    return (errors[-1] if errors else " ".join(str(otherwise).split())).rstrip(".")
