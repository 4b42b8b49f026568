"""What is here, what is missing, and what to do about it: ``prenet4d doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prenet4d_engines import processor

Verdict = Literal["ok", "note", "missing", "broken"]

PORTS = {5560: "ingest", 5561: "stream", 5562: "lossless", 5563: "control", 5564: "http"}
OPTIONAL = {
    "numba": "decodes sparse DECTRIS frames faster: pip install numba",
    "bm3d": "only a rival in `prenet4d evaluate` (its license forbids commercial use)",
    "scikit-image": "only a rival in `prenet4d evaluate`: pip install scikit-image",
    "hyperspy": "one of the programs that open recordings",
    "py4DSTEM": "one of the programs that open recordings",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    """``ok``; ``note``: worth knowing; ``missing``: optional and absent; ``broken``: required."""
    found: str
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""


def examine() -> Iterator[Finding]:
    """Look at everything in turn; each finding comes as soon as it is known."""
    checks = (_python, _cores, _memory, _required, _networks, _ports, _clock, _optional)
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    if platform.system() != "Linux":
        advice = "The client works here; run the service itself on Linux."
        yield Finding("python", "note", found, advice)
    else:
        yield Finding("python", "ok", found)


def _cores() -> Iterator[Finding]:
    cores = processor.usable_cores()
    flags = processor.flags()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{cores:g} usable, {processor.name()}; {', '.join(units) or 'no vector units known'}"
    if cores < 2:
        advice = "The detector's side and the networks want a core each: give it two or more."
        yield Finding("cores", "note", found, advice)
    else:
        yield Finding("cores", "ok", found)


def _memory() -> Iterator[Finding]:
    from prenet4d_server import memory

    free, total = memory.available()
    found = f"{_gib(free)} free of {_gib(total)}"
    low = free < 2 << 30
    yield Finding(
        "memory", "note" if low else "ok", found, "2 GiB free are advised." if low else ""
    )


def _required() -> Iterator[Finding]:
    absent = [name for name in _installed_with() if _version(name) is None]
    if absent:
        advice = "pip install 'prenet4d[server]'"
        yield Finding("packages", "broken", f"missing: {', '.join(absent)}", advice)
    else:
        yield Finding("packages", "ok", ", ".join(f"{n} {_version(n)}" for n in ("torch", "pyzmq")))


def _installed_with() -> Iterator[str]:
    """Name what the service is to be installed with, as its own package lists it."""
    for each in importlib.metadata.requires("prenet4d") or ():
        name = re.split(r"[^\w.-]", each)[0]
        extra = re.search(r"extra == .(\w+)", each)
        if (extra is None or extra[1] == "server") and name not in OPTIONAL:
            yield name


def _networks() -> Iterator[Finding]:
    """What runs them; nothing of it can be looked at without a torch that works."""
    if importlib.util.find_spec("torch") is None:
        return  # it is among the missing packages
    try:
        import torch  # noqa: F401 - whether it can be
    except (ImportError, OSError) as error:
        advice = "Install torch anew, with the libraries it needs: deploy/GPU.md."
        yield Finding("torch", "broken", f"cannot be imported: {error}", advice)
        return
    for check in (_gpu, _tensorrt, _backend):
        yield from check()


def _gpu() -> Iterator[Finding]:
    import torch

    from prenet4d_engines.backends.tensorrt.flavors import cuda_fault

    fault = cuda_fault()
    listed = nvidia_smi()
    if fault is None:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = listed or ", ".join(names)
        yield Finding(
            "gpu", "ok", f"{found} (torch {torch.__version__}, CUDA {torch.version.cuda})"
        )
    elif listed:
        advice = (
            f"{fault} Install a newer driver, or a torch with CUDA."
            if torch.version.cuda
            else "Install a torch with CUDA: deploy/GPU.md."
        )
        yield Finding("gpu", "missing", listed, advice)
    else:
        advice = (
            "The networks run on the CPU: about 25 frames of 256 × 256 a second and core. "
            "prenet4d demo measures it."
        )
        yield Finding("gpu", "missing", fault.rstrip("."), advice)


def nvidia_smi() -> str:
    """Names of the NVIDIA GPUs and their driver, as the driver's own program tells them."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi is here but does not answer"
    if done.returncode != 0:
        return "nvidia-smi is here but finds no driver"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(line.replace(", ", ", driver ") for line in lines)


def _tensorrt() -> Iterator[Finding]:
    from prenet4d_engines.backends.tensorrt.flavors import (
        HOW_TO_INSTALL,
        cuda_fault,
        gpu,
        installed,
        load,
        unsuited,
    )
    from prenet4d_engines.errors import BackendError

    has_gpu = cuda_fault() is None
    if not installed():
        advice = (
            f"Networks compiled for this GPU: {HOW_TO_INSTALL['tensorrt']}"
            if has_gpu
            else "Of use beside an NVIDIA GPU alone."
        )
        yield Finding("tensorrt", "missing", "not installed", advice)
    for flavor in installed():
        try:
            toolkit = load(flavor)
        except BackendError as error:
            yield Finding("tensorrt", "note", f"{flavor}", str(error))
            continue
        if has_gpu:
            advice = unsuited(toolkit, gpu()) or ""
        else:
            advice = "It can only build engines here, not run them: there is no GPU."
        yield Finding("tensorrt", "note" if advice else "ok", str(toolkit), advice)
    if has_gpu and installed():
        yield from _engines()


def _engines() -> Iterator[Finding]:
    """What `prenet4d engines` made in the user's cache folder, as far as it can be used."""
    from prenet4d_engines.backends.tensorrt.cache import EngineCache
    from prenet4d_engines.backends.tensorrt.flavors import gpu, installed, load
    from prenet4d_engines.errors import BackendError
    from prenet4d_engines.export import source_sha256

    build = "prenet4d engines build --shape 256x256, with your detector's shape."
    try:
        cache = EngineCache()
        toolkits = [load(flavor) for flavor in installed()]
    except BackendError as error:
        yield Finding("engines", "note", "cannot be used", str(error))
        return
    usable = [
        sidecar
        for toolkit in toolkits
        for sidecar in cache.usable(toolkit.flavor, toolkit.version, gpu(), source_sha256())
    ]
    if usable:
        shapes = {
            f"{each.recipe.input_shape[1]}×{each.recipe.input_shape[2]}"
            for each in usable
            if each.recipe.network == "denoise"
        }
        yield Finding(
            "engines", "ok", f"{len(usable)} ready, for {', '.join(sorted(shapes))} pixels"
        )
    else:
        others = len(cache.entries())
        found = f"none that fits, {others} that do not" if others else "none yet"
        yield Finding("engines", "note", f"{found} in {cache.folder}", build)


def _backend() -> Iterator[Finding]:
    from prenet4d_engines.backends import select
    from prenet4d_engines.errors import EngineError

    try:
        backend = select("auto")
    except (EngineError, OSError) as error:
        advice = "Without a backend nothing is corrected: reinstall prenet4d."
        yield Finding("backend", "broken", str(error), advice)
    else:
        yield Finding("backend", "ok", f"{backend.name}: {backend.description}")


def _ports() -> Iterator[Finding]:
    taken = [f"{port} ({name})" for port, name in PORTS.items() if not _is_free(port)]
    if taken:
        advice = "A service may be running already (prenet4d status), or choose other ports."
        yield Finding("ports", "note", f"in use: {', '.join(taken)}", advice)
    else:
        yield Finding("ports", "ok", f"{min(PORTS)} to {max(PORTS)} are free")


def _clock() -> Iterator[Finding]:
    if time.time() < 1.7e9:
        found = time.strftime("it is %Y-%m-%d %H:%M here")
        yield Finding("clock", "note", found, "Set it: recordings carry its dates.")
        return
    synchronised = Path("/run/systemd/timesync/synchronized").exists() or any(
        shutil.which(name) for name in ("chronyd", "ntpd")
    )
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    advice = "" if synchronised else "No time service seen: dates may differ from the detector's."
    yield Finding("clock", "ok" if synchronised else "note", found, advice)


def _optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Finding(name, "missing", "not installed", purpose[0].upper() + purpose[1:] + ".")
        else:
            yield Finding(name, "ok", version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
