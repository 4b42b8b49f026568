"""What a benchmark ran on, to be kept beside its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

from prenet4d_engines import processor

_VERSIONS = ("prenet4d", "numpy", "pyzmq", "torch")


def describe() -> dict[str, str | float]:
    """Processor, cores, memory, versions and load of this machine."""
    import psutil
    import zmq

    about: dict[str, str | float] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": processor.name(),
        "cores": processor.usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
    }
    for name in _VERSIONS:
        about[name] = importlib.metadata.version(name)
    return about
