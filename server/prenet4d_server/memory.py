"""How much memory there is for this process, and how the C library manages it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def available() -> tuple[int, int]:
    """How many bytes may still be taken, and of how many: the machine's, or a container's if less.

    What a container's files have in the cache counts as free: the kernel takes it back when asked.
    """
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit = int((_CGROUP / "memory.max").read_text())
        parts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        taken = int((_CGROUP / "memory.current").read_text()) - int(parts["inactive_file"])
        free, total = min(free, limit - taken), min(total, limit)
    return max(free, 0), total


def keep_freed_memory() -> None:
    """Have glibc hand out memory again that was freed, instead of giving it back to the kernel.

    Messages and feature maps are large, of the same sizes over and over. By default, each is
    fetched from the kernel anew, at a page fault for every 4 KiB. For a process whose main work
    they are; to be called before its threads start. Elsewhere than on glibc, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        if mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
            mallopt(_M_TRIM_THRESHOLD, _LARGEST)
