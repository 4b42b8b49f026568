"""What the machine is asked for: memory and processor time of processes, and the GPU's load."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any, get_args

import psutil

from prenet4d_server.monitoring.status import GpuStatus, ProcessName, ProcessStatus


def processes(pids: Mapping[ProcessName, int | None]) -> tuple[ProcessStatus, ...]:
    """Memory and processor time of those that run."""
    found = []
    for name in get_args(ProcessName):
        pid = pids.get(name)
        if pid is None:
            continue
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                used, times = process.memory_info().rss, process.cpu_times()
        except psutil.Error:
            continue  # it has just ended
        found.append(ProcessStatus(name=name, resident_bytes=used, cpu_s=times.user + times.system))
    return tuple(found)


def gpu() -> GpuStatus | None:
    """The GPU that torch uses in this process; ``None`` where it uses none."""
    # Only where the networks have loaded it: it takes seconds and hundreds of megabytes.
    torch: Any = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # it failed, and the corrector tells
        return None
    load = None
    # nvidia-ml-py is not installed, or raises errors of its own: it cannot tell of a part of a GPU.
    with contextlib.suppress(Exception):
        load = torch.cuda.utilization() / 100
    return GpuStatus(
        name=torch.cuda.get_device_name(),
        memory_used_bytes=total - free,
        memory_bytes=total,
        load=load,
    )
