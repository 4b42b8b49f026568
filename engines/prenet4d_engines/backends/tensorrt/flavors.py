"""Which TensorRT is here, and what it runs on; each thing that is missing told in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch

from prenet4d_engines.backends.tensorrt.api import Logger, Module, RtxModule
from prenet4d_engines.errors import BackendError

Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: Final[tuple[Flavor, ...]] = ("tensorrt", "tensorrt_rtx")
TITLES: Final[dict[Flavor, str]] = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
}
HOW_TO_INSTALL: Final[dict[Flavor, str]] = {
    "tensorrt": "pip install 'prenet4d[gpu]' --extra-index-url https://pypi.nvidia.com",
    "tensorrt_rtx": "pip install 'prenet4d[rtx]'",
}
OLDEST: Final = 10
"""TensorRT's first version with all of `api`; TensorRT for RTX counts its own from 1."""
# The bindings come alone, or with a package around them that bears the name.
_MODULES: Final[dict[Flavor, tuple[str, ...]]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True)
class Toolkit:
    """A flavor of TensorRT that was loaded."""

    flavor: Flavor
    module: Module

    @property
    def version(self) -> str:
        """As the module tells it."""
        return self.module.__version__

    def __str__(self) -> str:
        return f"{TITLES[self.flavor]} {self.version}"


@dataclass(frozen=True)
class Gpu:
    """The device that engines are built for and run on.

    Attributes:
        name: As its driver tells it; ``none`` where there is no GPU.
        capability: CUDA compute capability, for example ``9.0``; ``none`` without a GPU.
    """

    name: str
    capability: str

    def __bool__(self) -> bool:
        return self != NO_GPU


NO_GPU: Final = Gpu("none", "none")


def installed() -> list[Flavor]:
    """Return the flavors that can be imported, the preferred one first."""
    return [flavor for flavor in FLAVORS if _module_name(flavor) is not None]


def load(flavor: Flavor | None = None) -> Toolkit:
    """Import a flavor of TensorRT; ``None``: the preferred one of those installed.

    Raises:
        BackendError: it is not installed, too old, or does not load.
    """
    if flavor is None:
        found = installed()
        if not found:
            raise BackendError(
                f"TensorRT is not installed: {HOW_TO_INSTALL['tensorrt']}. For a GeForce or RTX "
                f"workstation card there is TensorRT for RTX: {HOW_TO_INSTALL['tensorrt_rtx']}."
            )
        flavor = found[0]
    name = _module_name(flavor)
    if name is None:
        raise BackendError(f"{TITLES[flavor]} is not installed: {HOW_TO_INSTALL[flavor]}.")
    try:
        module = cast(Module, importlib.import_module(name))
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{TITLES[flavor]} is installed but does not load ({error}); install it again: "
            f"{HOW_TO_INSTALL[flavor]}."
        ) from error
    if flavor == "tensorrt" and int(module.__version__.partition(".")[0]) < OLDEST:
        raise BackendError(
            f"TensorRT {module.__version__} is too old, {OLDEST}.0 is the oldest that works: "
            f"{HOW_TO_INSTALL[flavor]}."
        )
    return Toolkit(flavor, module)


def gpu(device: torch.device | None = None) -> Gpu:
    """Return what a device is; `NO_GPU` where there is none that works."""
    if cuda_fault() is not None:
        return NO_GPU
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), f"{major}.{minor}")


def unsuited(toolkit: Toolkit, device: Gpu) -> str | None:
    """Say in a sentence why a TensorRT cannot serve a GPU; ``None`` if it can, or there is none."""
    if toolkit.flavor != "tensorrt_rtx" or not device:
        return None
    known = cast(RtxModule, toolkit.module).ComputeCapability
    if hasattr(known, f"SM{device.capability.replace('.', '')}"):
        return None
    return (
        f"{toolkit} does not know the {device.name} (compute capability {device.capability}), "
        f"TensorRT does: {HOW_TO_INSTALL['tensorrt']}."
    )


def cuda_fault() -> str | None:
    """Say in a sentence why no NVIDIA GPU can be used; ``None`` where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA, so no NVIDIA GPU can be used."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would warn of what is said below
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            said = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
            return f"No NVIDIA GPU can be used: {said}."
    return "No NVIDIA GPU can be used: the driver shows none."


def make_logger(module: Module) -> tuple[Logger, list[str]]:
    """Return a logger for TensorRT, and the list that gathers the errors it is told."""
    errors: list[str] = []

    class Listener(module.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: object, msg: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                errors.append(" ".join(msg.split()))

    return cast(Logger, Listener()), errors


def _module_name(flavor: Flavor) -> str | None:
    for name in _MODULES[flavor]:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:  # not just a folder of that name
            return name
    return None
