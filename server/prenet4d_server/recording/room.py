"""The room that a recording needs: on its disk, and in its file.

HDF5 brings the process down when a write fails for want of either, so that must never happen.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

NEEDED_BYTES = 32 << 20
"""So much is left in any case, for what HDF5 still holds in memory and for closing the file. As
another program may take that of the disk too, as much again is held in reserve."""
_log = logging.getLogger(__name__)


class Want(NamedTuple):
    """What there is not enough of, in parts of a sentence."""

    reason: str
    kept: str
    """How much of it is not for the recording."""
    remedy: str


def want_of_room(folder: Path, file: Path | None, more: int, keep_free: int) -> Want | None:
    """What there will not be enough of, once so much more is written; ``None``: there will.

    Args:
        folder: where the recording goes.
        file: what is being written, if anything is.
        more: bytes.
        keep_free: bytes to leave free on the disk.
    """
    free = shutil.disk_usage(folder).free
    if free - more < keep_free:
        return Want(
            f"the disk of {folder} has only {_mb(free)} left",
            f"{_mb(keep_free)} are kept free"
            + (f" beside the {_mb(more)} to come" if more >= 1e6 else ""),
            "Make room, or record to another disk.",
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    size = file.stat().st_size if file is not None and file.is_file() else 0
    if limit != resource.RLIM_INFINITY and size + more + NEEDED_BYTES > limit:
        return Want(
            f"a file may have {_mb(limit)} here, of which {_mb(size)} are used",
            f"{_mb(NEEDED_BYTES)} are kept for closing it",
            "Raise the limit (ulimit -f, LimitFSIZE), or record shorter scans.",
        )
    return None


def reserve(folder: Path) -> IO[bytes] | None:
    """Hold room on a disk, in a file without a name: it goes with the process in any case."""
    held = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when the room is needed
    try:
        os.posix_fallocate(held.fileno(), 0, NEEDED_BYTES)
    except OSError as error:
        held.close()
        _log.warning("No room can be held in reserve on the disk of %s: %s.", folder, error)
        return None
    return held


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
