"""The networks as TensorRT engines: built beforehand for a detector, verified before each use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from prenet4d_engines.backends.tensorrt.cache import EngineCache, Sidecar
from prenet4d_engines.backends.tensorrt.engine import Engine
from prenet4d_engines.backends.tensorrt.flavors import (
    cuda_fault,
    gpu,
    installed,
    load,
    unsuited,
)
from prenet4d_engines.backends.torch_backend import TorchBackend
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import source_sha256
from prenet4d_engines.weights import Name

T = TypeVar("T")
_log = logging.getLogger(__name__)
_Place = tuple[Name, tuple[int, ...]]
"""A network and the shape (C, H, W) of what it reads."""


class TensorRTBackend:
    """Runs the engines that `prenet4d engines build` made on this machine.

    They are those of the first TensorRT that is installed and has engines here, loaded when frames
    of their shape first come. A shape for which there are none runs in torch on the same GPU, and
    that is said once.

    Args:
        cache: Folder of the engines; unset: the user's cache folder.

    Raises:
        BackendError: there is no GPU, no TensorRT, or no engine that may be loaded.
    """

    name = "tensorrt"

    def __init__(self, cache: Path | None = None):
        fault = cuda_fault()
        if fault is not None:
            raise BackendError(fault)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._cache = EngineCache(cache)
        here = gpu(self.device)
        toolkits = [load(each) for each in installed()] or [load()]
        for self._toolkit in toolkits:
            usable = self._cache.usable(
                self._toolkit.flavor, self._toolkit.version, here, source_sha256()
            )
            if usable:
                break
        else:
            reasons = [unsuited(each, here) for each in toolkits]
            if all(reasons):
                raise BackendError(reasons[0])
            raise BackendError(
                f"There are no engines for {' or '.join(map(str, toolkits))} on {here.name} in "
                f"{self._cache.folder}: prenet4d engines build --shape 256x256, with your "
                "detector's shape."
            )
        self._sidecars: dict[_Place, list[Sidecar]] = {}
        for sidecar in sorted(usable, key=lambda each: each.recipe.batch):
            place = (sidecar.recipe.network, sidecar.recipe.input_shape)
            self._sidecars.setdefault(place, []).append(sidecar)
        self._engines: dict[_Place, list[Engine]] = {}
        self._failed: list[Engine] = []
        """Kept: graphs that were recorded with them work on their memory."""
        self._torch = TorchBackend(device=str(self.device))
        inputs = "; ".join(
            f"{name} {h}×{w} for {', '.join(str(each.recipe.batch) for each in found)}"
            for (name, (_, h, w)), found in sorted(self._sidecars.items())
        )
        self.description = (
            f"{self._toolkit} on {here.name}: float16 engines ({inputs}), each compared with "
            "float32 when it was built; other shapes run in torch."
        )

    def spread(self, work: Callable[[slice], T], n: int) -> list[T]:
        """Do some work on ``n`` frames, all in one part; see ``Backend.spread``."""
        return self._torch.spread(work, n)

    def denoise(self, x: Tensor) -> Tensor:
        """Run the denoiser: (n, C, H, W) → (n, 1, H, W), float32."""
        return self._run("denoise", x)

    def center(self, x: Tensor) -> Tensor:
        """Run the center network: (n, C, H, W) → (n, 6, H/4, W/4), float32."""
        return self._run("center", x)

    def refine(self, x: Tensor) -> Tensor:
        """Run the refining network: (n, C, S, S) → (n, 9, S/4, S/4), float32."""
        return self._run("refine", x)

    def ellipse(self, x: Tensor) -> Tensor:
        """Run the ellipse network: (n, C, R, P) → (n, 5, R/8, P/8), float32."""
        return self._run("ellipse", x)

    def _run(self, name: Name, x: Tensor) -> Tensor:
        place = (name, tuple(x.shape[1:]))
        engines = self._engines.get(place)
        if engines is None:
            engines = self._engines[place] = self._loaded(place)
        if not engines:
            found: Tensor = getattr(self._torch, name)(x)
            return found
        parts, start = [], 0
        try:
            for items, index in split(len(x), [each.batch for each in engines]) or [(0, 0)]:
                parts.append(engines[index](x[start : start + items]))
                start += items
        except BackendError as error:
            _log.warning("%s From now on torch runs it on the same GPU.", error)
            self._failed += engines
            self._engines[place] = []
            return self._run(name, x)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _loaded(self, place: _Place) -> list[Engine]:
        """Load what there is for a network and shape; where nothing works, torch does it."""
        engines: list[Engine] = []
        for sidecar in self._sidecars.get(place, []):
            try:
                plan = self._cache.load(sidecar)
                engines.append(Engine(self._toolkit, sidecar.recipe, plan, self.device))
            except torch.OutOfMemoryError:
                _log.warning(
                    "The GPU's memory does not suffice for %s with %d frames at a time; "
                    "smaller batches are used.",
                    *(place[0], sidecar.recipe.batch),
                )
                break
            except BackendError as error:
                _log.warning("%s", error)
        if not engines:
            _log.warning(
                "There is no engine for %s on %s; torch runs it on the same GPU.",
                *(place[0], " × ".join(map(str, place[1]))),
            )
        return engines


def split(n: int, batches: Sequence[int]) -> list[tuple[int, int]]:
    """Divide n items among engines.

    Args:
        n: How many items there are.
        batches: What each engine takes at most, in rising order.

    Returns:
        In order, how many items come next and the position of the engine that takes them: the
        smallest that takes all that are left, else the largest.
    """
    parts = []
    while n > 0:
        index = next((i for i, batch in enumerate(batches) if batch >= n), len(batches) - 1)
        parts.append((min(n, batches[index]), index))
        n -= parts[-1][0]
    return parts
