"""What can run the networks, and the choice among it."""

from __future__ import annotations

from typing import Literal

from prenet4d_engines.backends.base import Backend
from prenet4d_engines.backends.torch_backend import Precision, TorchBackend
from prenet4d_engines.errors import BackendError

__all__ = ["Backend", "Precision", "TorchBackend", "select"]


def select(
    name: Literal["auto", "torch"] = "auto",
    *,
    precision: Precision = "auto",
    threads: int | None = None,
) -> Backend:
    """Make the backend that was asked for; ``auto`` takes the first that works here.

    Its ``description`` says which it is and why.

    Args:
        name: ``torch``, or ``auto``.
        precision: arithmetic of the networks; ``auto``: the fastest that agrees with float32.
        threads: CPU threads, set for the whole process; ``None``: all cores but one.

    Raises:
        BackendError: there is no such backend, or it does not run here.
    """
    if name not in ("auto", "torch"):
        raise BackendError(f"There is no backend {name!r}; choose auto or torch.")
    return TorchBackend(precision, threads=threads)
