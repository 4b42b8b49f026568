"""What can run the networks, and the choice among it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from prenet4d_engines.backends.base import Backend
from prenet4d_engines.backends.tensorrt.flavors import cuda_fault
from prenet4d_engines.backends.torch_backend import Precision, TorchBackend
from prenet4d_engines.errors import BackendError

__all__ = ["Backend", "Precision", "TorchBackend", "select", "select_all"]


def select(
    name: Literal["auto", "tensorrt", "torch"] = "auto",
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    engines: Path | None = None,
) -> Backend:
    """Make the backend that was asked for; ``auto`` takes the first that works here.

    That is TensorRT with engines that were built here, torch on the GPU, torch on the CPU. The
    backend's ``description`` says which it is and why.

    Args:
        name: ``tensorrt``, ``torch``, or ``auto``.
        precision: arithmetic of the networks in torch; ``auto``: the fastest that agrees with
            float32. Where another than float16 is asked for, ``auto`` does not take TensorRT.
        threads: CPU threads; ``None``: one for each core.
        engines: folder of the built engines; ``None``: the user's cache folder.

    Raises:
        BackendError: there is no such backend, or it does not run here.
    """
    if name == "torch":
        backend = TorchBackend(precision, threads=threads)
        if torch.version.cuda is not None and backend.device.type == "cpu":
            backend.description += f" {cuda_fault()}"
        return backend
    if name not in ("auto", "tensorrt"):
        raise BackendError(f"There is no backend {name!r}; choose auto, tensorrt or torch.")
    from prenet4d_engines.backends.tensorrt.backend import TensorRTBackend

    if name == "auto" and precision not in ("auto", "float16"):
        return TorchBackend(precision, threads=threads)
    try:
        return TensorRTBackend(cache=engines)
    except (BackendError, OSError) as reason:
        if name == "tensorrt":
            raise
        backend = TorchBackend(precision, threads=threads)
        backend.description += f" TensorRT is not used: {reason}"
        return backend


def select_all(
    name: Literal["auto", "tensorrt", "torch"] = "auto",
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    engines: Path | None = None,
) -> list[Backend]:
    """Make the backend that was asked for on every GPU here; see `select`.

    The first one decides which it is; with ``auto``, torch runs on a GPU that TensorRT has no
    engines for. Without a GPU, it is the only one.

    Raises:
        BackendError: there is no such backend, or it does not run here.
    """
    first = select(name, precision=precision, threads=threads, engines=engines)
    found = [first]
    if first.device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            if index != torch.cuda.current_device():
                with torch.cuda.device(index):
                    kind = name if first.name == "tensorrt" else "torch"
                    found.append(select(kind, precision=precision, engines=engines))
    return found
