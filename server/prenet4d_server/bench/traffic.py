"""How many bytes the correction of a frame moves, counted and not measured, on any machine.

Small convolutions and elementwise operations are bound by memory. What a GPU's operations would
read and write is counted by letting them run on torch's device *meta*, which computes shapes alone:
each operation reads and writes each of its tensors once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.lanes import CpuLanes
from prenet4d_engines.models import center, denoiser, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import inversion
from prenet4d_engines.stages import Camera, Station

PARTS = (
    *("bins", "denoiser: before", "denoiser", "denoiser: after", "center: before"),
    *("center network", "center: after", "symmetry", "refining: before", "refining network"),
    *("refining: after", "look", "average", "straighten"),
)
"""``look`` holds all that comes before it here, and little more."""
_FRAMES = 256
"""Weights are read once for a batch."""
_WRITE_ONLY = ("aten.copy_", "aten.fill_", "aten.zero_")
_NOTHING_MOVES = ("aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.empty_like")
_READ_SOME = ("aten.index.Tensor", "aten.gather")
"""They read as much of their first tensor as they return."""
T = TypeVar("T")


class Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations read and write, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not name.startswith(_NOTHING_MOVES):
            read, written = _sizes((args, kwargs)), _sizes(made)
            if name.startswith((*_WRITE_ONLY, *_READ_SOME)):
                read[0] = sum(written) if name.startswith(_READ_SOME) else 0
            self.bytes += sum(read) + sum(written)
        return made


def _sizes(tree: object) -> list[int]:
    return [_size(each) for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes that are different: an expanded tensor's are not."""
    there = [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n == 0]
    return tensor.element_size() * int(np.prod(there, dtype=np.int64))


def count(frame_shape: tuple[int, int]) -> dict[str, float]:
    """Count the bytes that each part of the correction moves for a frame of ``(h, w)`` pixels.

    Networks are counted in half precision, as they run on a GPU, each operation for itself.

    Returns:
        By part, in the order of ``PARTS``.
    """
    found: dict[str, float] = {}

    def counted(part: str, work: Callable[[], T]) -> T:
        made, found[part] = _moved(work)
        return made

    networks = _Networks("bfloat16", threads=1, device="meta")
    frames = torch.empty((_FRAMES, *frame_shape), device="meta")
    mask = torch.ones(frame_shape, dtype=torch.bool, device="meta")
    bins = counted("bins", lambda: Bins.of(frames, mask))
    x, context = counted("denoiser: before", lambda: denoiser.stabilise(frames, mask))
    y = counted("denoiser", lambda: networks.denoise(x))
    counted("denoiser: after", lambda: denoiser.restore(y, context))
    x = counted("center: before", lambda: center.prepare(bins))
    y = counted("center network", lambda: networks.center(x))
    first = counted("center: after", lambda: center.decode(y, bins))
    guess = counted("symmetry", lambda: inversion(bins, first.center))
    x = counted("refining: before", lambda: refine.prepare(bins, guess, first.sigma))
    y = counted("refining network", lambda: networks.refine(x))
    counted("refining: after", lambda: refine.settle(guess, refine.decode(y, guess), first.sigma))

    lanes = _Counting()
    camera = Camera(frame_shape, None, 1.0, None)
    slot = Station(networks, lanes).take(camera, np.dtype(np.uint16), _FRAMES)
    slot.look(np.zeros((_FRAMES, 0), np.uint16))
    slot.average()
    slot.straighten(_FRAMES, np.zeros(0, np.float32))
    found |= zip(("look", "average", "straighten"), lanes.moved, strict=True)
    return {part: found[part] for part in PARTS}


def _moved(work: Callable[[], T]) -> tuple[T, float]:
    """Do some work on a batch; return what it made, and the bytes that it moved for a frame."""
    # in inference mode, operations that are made of others would count as one
    with torch.inference_mode(False), torch.no_grad(), Moved() as moved:
        made = work()
    return made, moved.bytes / _FRAMES


class _Networks(TorchBackend):
    def spread(self, work: Callable[[slice], T], n: int) -> list[T]:
        return [work(slice(0, n))]


class _Counting(CpuLanes):
    """A device without values, on which everything goes a GPU's way."""

    def __init__(self) -> None:
        self.device = torch.device("meta")
        self.moved: list[float] = []
        """Bytes a frame, of what was recorded."""

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def send(self, values: npt.NDArray[Any], into: Tensor) -> Tensor:  # noqa: ARG002
        return into

    put = send

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        made, moved = _moved(work)
        self.moved.append(moved)
        return lambda: made
