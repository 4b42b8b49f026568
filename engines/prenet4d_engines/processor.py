"""The processor that this process runs on: its name, its usable cores, what they compute in."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

_BFLOAT16_UNITS: Final = {"avx512_bf16", "amx_bf16", "bf16"}


def name() -> str:
    """Name the processor as the machine tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def usable_cores() -> float:
    """Cores this process may use: the affinity mask, or the container's quota where it is less."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = float(len(allowed) if allowed else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def flags() -> frozenset[str]:
    """Return the processor's feature flags; empty where they cannot be known."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def has_bfloat16_units() -> bool:
    """Say whether bfloat16 is fast here; without units for it torch is ten times slower in it."""
    return not _BFLOAT16_UNITS.isdisjoint(flags())


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
