"""Where a batch's work runs: at once on the CPU, or queued on a GPU that works behind our back.

A corrector is written once against `Lanes`. What is *recorded* reads and writes tensors that stay
where they are; on a GPU it becomes a CUDA graph. What is *sent* and *fetched* crosses the bus, and
nobody waits for it but who asks a `Fetched` for its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Fetched(Protocol):
    """Values that are on their way to the host."""

    def wait(self) -> npt.NDArray[Any]:
        """Return them, in memory of their own, once they have come."""
        ...


class Lanes(Protocol):
    """The queues of one device. What is asked for is done in the order of asking."""

    device: torch.device
    keeps: bool
    """Buffers and what was recorded on them are made once and used again and again, so batches are
    rounded up to a few sizes (`bucket`). Otherwise each batch has its own."""

    def bucket(self, n: int) -> int:
        """Return how many frames a buffer for ``n`` frames should hold."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """Have torch's operations inside done in the order of everything else."""
        ...

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return ``work`` as something to be done again and again.

        ``work`` is called in inference mode, any number of times. What it returns always lies in
        the same place: fetch it before it is done again.
        """
        ...

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return new memory on the device to `send` to; what it holds may be anything."""
        ...

    def send(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:
        """Send many values to the first rows of a `buffer`, beside the computing before.

        Nothing that was asked for before may still read the buffer, and ``values`` must not change
        before something that was asked for later has been fetched.

        Returns:
            The buffer to be read from now on.
        """
        ...

    def put(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:
        """Send few values to a buffer, in the order of the computing; see `send`."""
        ...

    def fetch(self, values: Tensor) -> Fetched:
        """Fetch few values, in the order of the computing."""
        ...

    def deliver(self, values: Tensor) -> Fetched:
        """Fetch many values, which must lie side by side, beside the computing that follows."""
        ...

    def settle(self) -> None:
        """Wait until nothing is under way any more, and let go of unused memory.

        Whatever was recorded and is not used any more is forgotten by now.
        """
        ...


class CpuLanes:
    """Everything is done at once, on new buffers each time: the cores share no queue."""

    keeps = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def bucket(self, n: int) -> int:
        """Return ``n``."""
        return n

    def computing(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return ``work`` itself."""
        return work

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return new memory."""
        return torch.empty(tuple(shape), dtype=dtype)

    def send(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:  # noqa: ARG002
        """Return the values themselves; they are not copied."""
        return as_tensor(values)

    def put(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:  # noqa: ARG002
        """Return the values themselves; they are not copied."""
        return as_tensor(values)

    def fetch(self, values: Tensor) -> Fetched:
        """Return the values themselves; they are not copied."""
        return _Here(values)

    def deliver(self, values: Tensor) -> Fetched:
        """Return the values themselves; they are not copied."""
        return _Here(values)

    def settle(self) -> None:
        """Do nothing: nothing is ever under way."""


class _Here:
    def __init__(self, values: Tensor):
        self._values = values

    def wait(self) -> npt.NDArray[Any]:
        return self._values.numpy()


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor that shares its memory.

    torch takes none that is read-only, of foreign byte order or with negative strides: such a one
    is copied.
    """
    native = values.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(values, native, ("C", "W")))


def lanes_for(device: torch.device) -> Lanes:
    """Return new lanes of a device."""
    if device.type == "cpu":
        return CpuLanes()
    from prenet4d_engines.cuda import CudaLanes

    return CudaLanes(device)
