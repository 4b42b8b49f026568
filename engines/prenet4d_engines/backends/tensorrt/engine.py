"""A plan that runs: loaded on a GPU, at its one batch size, in a CUDA graph of its own."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from prenet4d_engines.backends.tensorrt.api import (
    CudaEngine,
    ExecutionContext,
    RtxCudaEngine,
    RtxModule,
)
from prenet4d_engines.backends.tensorrt.flavors import Toolkit, cuda_fault, make_logger
from prenet4d_engines.cuda import capture
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import INPUT, OUTPUT

if TYPE_CHECKING:
    from prenet4d_engines.backends.tensorrt.cache import Recipe

_log = logging.getLogger(__name__)


class Engine:
    """Runs one network at one input shape and one batch size.

    Work is put on a stream of its own that waits for the caller's current stream, which then waits
    for it: nothing blocks, and the order is as if it ran on the caller's. Callers take turns. While
    the caller records a CUDA graph, it becomes part of that graph.

    Args:
        toolkit: The TensorRT that built the plan.
        recipe: What the plan was made from.
        plan: The plan, checked (`EngineCache.load`): it is executable code.
        device: The GPU.

    Raises:
        BackendError: there is no GPU, the plan does not load, or is not what the recipe says.
        torch.OutOfMemoryError: the GPU's memory does not suffice for this batch size.
    """

    def __init__(self, toolkit: Toolkit, recipe: Recipe, plan: bytes, device: torch.device):
        fault = cuda_fault()
        if fault is not None:  # without CUDA, runtimes do not fail but crash
            raise BackendError(f"TensorRT engines need an NVIDIA GPU. {fault}")
        self.recipe, self.device = recipe, device
        self._lock = threading.Lock()
        logger, self._errors = make_logger(toolkit.module)
        # made outside inference mode, buffers can be written to in and out of it
        with torch.cuda.device(device), torch.inference_mode(False):
            # all of these are kept: TensorRT does not keep what it was made with alive
            self._runtime = toolkit.module.Runtime(logger), logger
            engine = self._runtime[0].deserialize_cuda_engine(plan)
            if engine is None:
                raise self._failed(f"{toolkit} does not load it")
            self._engine = engine
            self._input, self._output = (
                self._buffer(toolkit, engine, name) for name in (INPUT, OUTPUT)
            )
            self._context = self._bound_context(toolkit, engine)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._graph = self._warmed_up(captured=toolkit.flavor == "tensorrt")

    @property
    def batch(self) -> int:
        """Items that it takes at most."""
        return self.recipe.batch

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Run the network: (n, C, H, W) float32 on the device, n ≤ batch → (n, …) float32.

        Raises:
            BackendError: the engine did not run.
        """
        n = len(x)
        with self._lock, torch.cuda.device(self.device):
            # what a smaller batch leaves in the other rows is computed too, and not looked at
            self._input[:n].copy_(x)
            if torch.cuda.is_current_stream_capturing():
                self._check_capturable()
                self._enqueue()
            else:
                self._run()
            return self._output[:n].to(torch.float32, copy=True)

    def _run(self) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._enqueue()
        current.wait_stream(self._stream)

    def _check_capturable(self) -> None:
        if self._graph is None:  # TensorRT for RTX, or it could not be captured before
            raise RuntimeError(f"The engine of {self.recipe.network} cannot be part of a graph.")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._failed("it could not be started")

    def _warmed_up(self, *, captured: bool) -> torch.cuda.CUDAGraph | None:
        """Run once, so that nothing is left to be set up, then record a CUDA graph.

        TensorRT for RTX records graphs itself (`_bound_context`).
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._enqueue()
        self._stream.synchronize()
        if not captured:
            return None
        try:
            return capture(self._enqueue, self._stream, torch.cuda.graph_pool_handle())
        except (RuntimeError, BackendError) as error:
            _log.warning(
                "The engine of %s for %d frames runs without a CUDA graph, which is slower: %s",
                *(self.recipe.network, self.batch, error),
            )
            return None

    def _bound_context(self, toolkit: Toolkit, engine: CudaEngine) -> ExecutionContext:
        if toolkit.flavor == "tensorrt_rtx":
            rtx = cast(RtxModule, toolkit.module)
            settings = cast(RtxCudaEngine, engine).create_runtime_config()
            settings.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
            settings.dynamic_shapes_kernel_specialization_strategy = strategy
            context = cast(RtxCudaEngine, engine).create_execution_context(settings)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise torch.OutOfMemoryError(self._last_error())
        bound = (
            context.set_input_shape(INPUT, tuple(self._input.shape))
            and context.set_tensor_address(INPUT, self._input.data_ptr())
            and context.set_tensor_address(OUTPUT, self._output.data_ptr())
        )
        if not bound:
            raise self._failed("it does not take its input")
        return context

    def _buffer(self, toolkit: Toolkit, engine: CudaEngine, name: str) -> Tensor:
        """Return the memory of an input or output that the engine must have."""
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != {INPUT, OUTPUT} or engine.num_optimization_profiles != 1:
            raise self._failed("its inputs and outputs are not those of a network of ours")
        types = toolkit.module.DataType
        dtypes = {types.HALF: torch.float16, types.FLOAT: torch.float32}
        dtype = dtypes.get(engine.get_tensor_dtype(name))
        item = tuple(engine.get_tensor_shape(name))[1:]
        if dtype is None or (name == INPUT and item != self.recipe.input_shape):
            raise self._failed(f"its {name} is {dtype} {item}, not what its document says")
        return torch.zeros((self.batch, *item), dtype=dtype, device=self.device)

    def _failed(self, why: str) -> BackendError:
        recipe = self.recipe
        return BackendError(
            f"The engine of {recipe.network} for {recipe.batch} frames failed: {why}"
            f"{self._last_error()}. Build it again (prenet4d engines build --force), or choose the "
            "backend torch."
        )

    def _last_error(self) -> str:
        return f" ({self._errors[-1].rstrip('.')})" if self._errors else ""
