"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def folder_fault(file: Path) -> str:
    """Why a file cannot be made in its folder, and what to do, or nothing."""
    if not file.parent.is_dir():
        return f"There is no folder {file.parent}. Make it first."
    if not os.access(file.parent, os.W_OK):
        return f"You may not write into {file.parent}."
    return ""


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file, or replace it, at once: also after a crash nobody finds half of it.

    Args:
        path: the file.
        data: all that is to be in it.
        private: nobody but the user may read it; else the process's umask says who may.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with open(handle, "wb") as out:  # noqa: PTH123 - a handle
            out.write(data)
            out.flush()
            os.fsync(handle)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        # what the caller asked for, not the passing name
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
