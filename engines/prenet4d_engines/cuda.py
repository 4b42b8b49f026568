"""The one place that knows of CUDA streams, events, graphs and pinned memory.

Three streams for each GPU: copies in, computing, copies out. The computing waits for the copy in
that was asked for before it, a copy out for the computing before it; apart from that the three run
side by side. The host waits for events alone, never for a stream or the device.

What is recorded is first run twice on the computing stream, so that cuDNN, cuFFT and TensorRT have
set themselves up, then captured on that same stream. All graphs take their intermediate memory from
one pool: they never run at the same time, and what they return is copied to memory outside of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prenet4d_engines.errors import BackendError
from prenet4d_engines.lanes import Fetched, as_tensor

_WARM_UP = 2
_REGISTER_PORTABLE = 1
"""``cudaHostRegisterPortable``: page-locked for every GPU, not for the current one alone."""
_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording broke off: torch's allocators may still point to them."""
_log = logging.getLogger(__name__)


class CaptureBroken(RuntimeError):
    """Something that was done cannot be recorded, and CUDA gave the recording up."""


class CudaLanes:
    """The queues of one NVIDIA GPU; see `Lanes`. Used by one thread at a time.

    Args:
        device: the GPU.
    """

    keeps = True

    def __init__(self, device: torch.device):
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self._in, self._compute, self._out = (
            torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._pool = torch.cuda.graph_pool_handle()
        self._broken = False

    def bucket(self, n: int) -> int:
        """Return the next power of two."""
        return 1 << max(n - 1, 0).bit_length()

    def computing(self) -> AbstractContextManager[object]:
        """Make the computing stream torch's current one."""
        context: AbstractContextManager[object] = torch.cuda.stream(self._compute)
        return context

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture ``work`` in a CUDA graph; where that cannot be, it is run as it is."""
        if self._broken:
            return self._in_order(work)
        with self.computing(), _arithmetic():
            for _ in range(_WARM_UP):
                made = work()
            result = torch.empty_like(made)
            try:
                graph = capture(lambda: result.copy_(work()), self._compute, self._pool)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, BackendError) as error:
                self._broken = isinstance(error, CaptureBroken)
                why = str(error).partition("\n")[0]
                _log.warning(
                    "Without a CUDA graph, which is slower: %s", why, exc_info=self._broken
                )
                self._pool = torch.cuda.graph_pool_handle()
                return self._in_order(work)

        def replay() -> Tensor:
            with self.computing():
                graph.replay()
            return result

        return replay

    def _in_order(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with self.computing(), _arithmetic():
                return work()

        return run

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return new memory to `send` to."""
        with self.computing():
            made = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        # it may have been another tensor's a moment ago, which is still to be read
        self._in.wait_stream(self._compute)
        return made

    def send(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:
        """Copy to the device on the stream for copies in; page-locked (`pin`), as they lie."""
        _copy_in(values, into, self._in)
        self._compute.wait_stream(self._in)
        return into

    def put(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:
        """Copy to the device on the computing stream."""
        _copy_in(values, into, self._compute)
        return into

    def fetch(self, values: Tensor) -> Fetched:
        """Copy to page-locked memory on the computing stream."""
        return _copy_out(values, self._compute)

    def deliver(self, values: Tensor) -> Fetched:
        """Copy to page-locked memory on the stream for copies out."""
        self._out.wait_stream(self._compute)
        return _copy_out(values, self._out)

    def settle(self) -> None:
        """Wait for the device, and give memory that torch keeps back to it."""
        torch.cuda.synchronize(self.device)
        # a pool whose graphs are all gone must not be used again
        self._pool = torch.cuda.graph_pool_handle()
        self._broken = False
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


def capture(
    work: Callable[[], object], stream: torch.cuda.Stream, pool: Any
) -> torch.cuda.CUDAGraph:
    """Record work in a CUDA graph.

    Args:
        work: done before, so that nothing is left to be set up.
        stream: where it is recorded.
        pool: where its memory comes from (`torch.cuda.graph_pool_handle`).

    Raises:
        CaptureBroken: the work cannot be recorded, and ``pool`` must not be used again.
        torch.OutOfMemoryError, RuntimeError, BackendError: what ``work`` raised.
    """
    graph, why = torch.cuda.CUDAGraph(), None
    try:
        # Other threads may use CUDA meanwhile. Where the recording breaks off, torch leaves the
        # stream as the current one.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                work()
            except (RuntimeError, BackendError) as error:
                why = error  # CUDA says at the end whether it is more than that
    except RuntimeError as broken:
        # torch before 2.12 goes on recording to the pool, and never empties its caches again
        _abandoned.append(graph)
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        if isinstance(why, torch.OutOfMemoryError):
            raise why from None
        raise CaptureBroken(str(why or broken)) from (why or broken)
    if why is not None:
        raise why
    return graph


def _arithmetic() -> AbstractContextManager[None]:
    """Have cuDNN choose the fastest of its kernels, without losing digits of float32.

    Where digits may be lost, the backend computes in float16.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, allow_tf32=False
    )
    return flags


# torch keeps page-locked memory that was let go of, and hands it out again once copies are done.


def _copy_in(values: npt.NDArray[Any], into: Tensor, stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        into[: len(values)].copy_(as_tensor(values).pin_memory(), non_blocking=True)


def _copy_out(values: Tensor, stream: torch.cuda.Stream) -> Fetched:
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        here.copy_(values, non_blocking=True)
        come = torch.cuda.Event()  # type: ignore[no-untyped-call]
        come.record(stream)
    return _Coming(here, come)


class _Coming:
    def __init__(self, values: Tensor, come: torch.cuda.Event):
        self._values, self._come = values, come

    def wait(self) -> npt.NDArray[Any]:
        self._come.synchronize()
        return self._values.numpy()


def pin(memory: npt.NDArray[np.uint8]) -> Callable[[], None]:
    """Page-lock memory that somebody else made, so that GPUs fetch from it by themselves.

    Args:
        memory: (n,) bytes.

    Returns:
        What undoes it; to be called before the memory is given back.

    Raises:
        BackendError: the system allows no such amount of page-locked memory.
    """
    runtime, address = torch.cuda.cudart(), memory.ctypes.data  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(address, memory.nbytes, _REGISTER_PORTABLE)
    if int(status) != 0:
        # CUDA remembers this error, and torch would take it for that of its next kernel
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise BackendError(
            f"{memory.nbytes >> 20} MiB cannot be page-locked "
            f"({runtime.cudaGetErrorString(status)}): frames are copied once more on their way to "
            "the GPU."
        )
    return lambda: runtime.cudaHostUnregister(address)
