"""How the C library manages this process's memory."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 1 << 30


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
