"""A program that finds no locks on its disk, as on some network disks: the kernel says so."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

_FLOCK = {"x86_64": 73, "aarch64": 32}
_REFUSE = """
import ctypes, errno, struct

rules = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in (
    (0x20, 0, 0, 0),                    # load the system call's number
    (0x15, 0, 1, {flock}),              # is it flock?
    (0x06, 0, 0, 0x50000 | errno.ENOLCK),
    (0x06, 0, 0, 0x7FFF0000),           # all others are allowed
)))
program = struct.pack("HxxxxxxP", 4, ctypes.addressof(rules))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
"""


def without_locks(code: str, folder: Path) -> str:
    """Run Python code in a folder whose disk has no locks, and return what it prints."""
    flock = _FLOCK.get(platform.machine())
    if sys.platform != "linux" or flock is None:
        pytest.skip("the number of flock is not known here")
    done = subprocess.run(
        [sys.executable, "-c", _REFUSE.format(flock=flock) + code],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout
