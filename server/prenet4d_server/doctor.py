"""What is here, what is missing, and what to do about it: ``prenet4d doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "note", "missing", "broken"]

PORTS = {5560: "ingest", 5561: "stream", 5562: "lossless", 5563: "control", 5564: "http"}
REQUIRED = (
    *("numpy", "pyzmq", "msgpack", "pydantic", "torch", "safetensors", "scipy", "cbor2", "h5py"),
    *("hdf5plugin", "lz4", "matplotlib", "prometheus-client", "psutil", "pydantic-settings"),
)
OPTIONAL = {
    "bm3d": "only a rival in `prenet4d evaluate` (its license forbids commercial use)",
    "scikit-image": "only a rival in `prenet4d evaluate`: pip install scikit-image",
    "hyperspy": "one of the programs that open recordings",
    "py4DSTEM": "one of the programs that open recordings",
}
WANTED_SHM = 1 << 30


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
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        *(_python, _cores, _memory, _shared_memory, _required, _gpu, _tensorrt, _backend),
        *(_ports, _clock, _optional),
    )
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
    cores = usable_cores()
    flags = cpu_flags()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{cores:g} usable, {cpu_name()}; {', '.join(units) or 'no vector units known'}"
    if cores < 2:
        advice = "The detector's side and the networks want a core each: give it two or more."
        yield Finding("cores", "note", found, advice)
    else:
        yield Finding("cores", "ok", found)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} free of {_gib(memory.total)}"
    low = memory.available < 2 << 30
    yield Finding(
        "memory", "note" if low else "ok", found, "2 GiB free are advised." if low else ""
    )


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        advice = "The ring where frames wait needs it: run the service on Linux."
        yield Finding("shared memory", "broken", "no /dev/shm", advice)
        return
    usage = shutil.disk_usage(path)
    found = f"/dev/shm: {_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free < WANTED_SHM:
        advice = "The ring shrinks to fit. In a container: --shm-size=1g."
        yield Finding("shared memory", "note", found, advice)
    else:
        yield Finding("shared memory", "ok", found)


def _required() -> Iterator[Finding]:
    absent = [name for name in REQUIRED if _version(name) is None]
    if absent:
        advice = "pip install 'prenet4d[server]'"
        yield Finding("packages", "broken", f"missing: {', '.join(absent)}", advice)
    else:
        yield Finding("packages", "ok", ", ".join(f"{n} {_version(n)}" for n in ("torch", "pyzmq")))


def _gpu() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("gpu", "ok", f"{', '.join(names)} (CUDA {torch.version.cuda})")
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = listed.stdout.strip() or "nvidia-smi is here but answers nothing"
        advice = f"torch {torch.__version__} cannot use it: install a CUDA build of torch."
        yield Finding("gpu", "missing", found, advice)
    else:
        advice = "The networks run on the CPU, which suits a few hundred frames a second."
        yield Finding("gpu", "missing", "no NVIDIA GPU", advice)


def _tensorrt() -> Iterator[Finding]:
    for name in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(name) is not None:
            yield Finding("tensorrt", "ok", f"{name} {_version(name.replace('_', '-')) or ''}")
            return
    yield Finding("tensorrt", "missing", "not installed", "Of use beside an NVIDIA GPU alone.")


def _backend() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
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
    found = (
        time.strftime("%Y-%m-%d %H:%M:%S %Z") + f", {time.get_clock_info('time').resolution:g} s"
    )
    advice = "" if synchronised else "No time service seen: dates may differ from the detector's."
    yield Finding("clock", "ok" if synchronised else "note", found, advice)


def _optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Finding(name, "missing", "not installed", purpose[0].upper() + purpose[1:] + ".")
        else:
            yield Finding(name, "ok", version)


def usable_cores() -> float:
    """Cores this process may use: the affinity mask, or the container's quota where it is less."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 1.0
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def cpu_name() -> str:
    """The processor's name as the machine tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags; empty where they cannot be known."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


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
