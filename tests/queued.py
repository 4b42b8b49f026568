"""A stand-in for a GPU: a queue that does nothing before somebody waits, and slots that are kept.

What a GPU does behind the host's back is done here as late as it may be: whoever reads a buffer too
early, or changes one that is still to be read, gets wrong numbers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prenet4d_engines.lanes import as_tensor


class QueuedLanes:
    keeps = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.recorded = 0
        """How often something was recorded: on a GPU, that many graphs."""
        self.broken = False
        """Everything fails from now on, as after a CUDA error that leaves no way back."""
        self.fault: Exception | None = None
        """Raised by the next thing that is done, once."""
        self._queue: deque[Callable[[], None]] = deque()
        self._eager = 0

    def bucket(self, n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """torch's own operations are done at once, so everything asked before is done first."""
        self._run()
        self._eager += 1
        try:
            yield
        finally:
            self._eager -= 1

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._check()
        self._run()
        self.recorded += 1
        result = torch.empty_like(work())

        def replay() -> Tensor:
            self._put(lambda: result.copy_(work()))
            return result

        return replay

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def send(self, values: np.ndarray, into: Tensor) -> Tensor:
        self._check()
        self._put(lambda: into[: len(values)].copy_(as_tensor(values)))
        return into

    put = send

    def fetch(self, values: Tensor) -> "Coming":
        here = torch.full_like(values, float("nan"))
        self._put(lambda: here.copy_(values))
        return Coming(self, here)

    deliver = fetch

    def settle(self) -> None:
        self._check()
        self._queue.clear()  # what was under way on a device that failed is gone

    def _put(self, work: Callable[[], Any]) -> None:
        self._queue.append(work)
        if self._eager:
            self._run()

    def _run(self) -> None:
        self._check()
        with torch.inference_mode():
            while self._queue:
                self._queue.popleft()()

    def _check(self) -> None:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        if self.broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Coming:
    def __init__(self, lanes: QueuedLanes, values: Tensor):
        self._lanes, self._values = lanes, values

    def wait(self) -> np.ndarray:
        self._lanes._run()
        return self._values.numpy()
