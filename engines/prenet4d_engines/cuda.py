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
from collections.abc import Callable
from contextlib import AbstractContextManager
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
_log = logging.getLogger(__name__)


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

    def bucket(self, n: int) -> int:
        """Return the next power of two."""
        return 1 << max(n - 1, 0).bit_length()

    def computing(self) -> AbstractContextManager[object]:
        """Make the computing stream torch's current one."""
        context: AbstractContextManager[object] = torch.cuda.stream(self._compute)
        return context

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture ``work`` in a CUDA graph; where that cannot be, it is run as it is."""
        # float32 is float32 here: where digits may be lost, the backend computes in float16
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with self.computing(), flags:
            for _ in range(_WARM_UP):
                made = work()
            result = torch.empty_like(made)
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads may use CUDA meanwhile
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._compute,
                    capture_error_mode="thread_local",
                ):
                    result.copy_(work())
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, BackendError) as error:
                _log.warning("Without a CUDA graph, which is slower: %s", error)
                self._pool = torch.cuda.graph_pool_handle()
                return self._in_order(work)

        def replay() -> Tensor:
            with self.computing():
                graph.replay()
            return result

        return replay

    def _in_order(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with self.computing():
                return work()

        return run

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
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


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
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, _REGISTER_PORTABLE)
    if int(status) != 0:
        raise BackendError(
            f"{memory.nbytes >> 20} MiB cannot be page-locked ({status}): frames are copied once "
            "more on their way to the GPU."
        )
    address = memory.ctypes.data
    return lambda: runtime.cudaHostUnregister(address)
