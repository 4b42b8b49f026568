"""Scans in files, read lazily: one file for each format, all turned into a ``ScanFile``.

:func:`open_scan` looks at a file's first bytes, not at its name, and knows NumPy's ``.npy`` and
``.npz``, HDF5 (as py4DSTEM, HyperSpy, DECTRIS and the recorder lay it out, or with one 3D or 4D
dataset anywhere), Zarr stores, and Merlin's ``.mib``. Nothing is ever read whole.
"""

from __future__ import annotations

from pathlib import Path

import h5py

from prenet4d_server.errors import FileError, HalfWrittenFile
from prenet4d_server.files.array_files import DAMAGE, NpyScan, NpzScan
from prenet4d_server.files.base import ScanFile, refuse_dataset
from prenet4d_server.files.hdf5 import Hdf5Scan
from prenet4d_server.files.merlin import MerlinScan
from prenet4d_server.files.zarr_store import MARKS, ZarrScan

__all__ = ["ScanFile", "open_scan"]


def open_scan(
    path: str | Path,
    *,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    partial: bool = False,
) -> ScanFile:
    """Open a scan for reading; use it as a context manager.

    Args:
        path: the file, or the folder of a Zarr store; for DECTRIS the master file, for Merlin the
            ``.mib`` (its ``.hdr`` beside it gives the scan's shape).
        dataset: which array of an ``.npz`` or HDF5 file or a Zarr store is the scan, where it holds
            several.
        scan_shape: ``(ny, nx)`` where the file does not know it. A file may hold fewer frames than
            that (a scan that was stopped), not more.
        partial: read the whole frames of a file that is truncated or lacks some of its parts,
            instead of refusing it.

    Raises:
        FileError: there is no such file, or it cannot be read as a scan; the message says why and
            what to do.
        HalfWrittenFile: it is truncated or still being written.
    """
    path = Path(path)
    if path.suffix.lower() == ".hdr":
        path = path.with_suffix(".mib")
    try:
        if any((path / mark).is_file() for mark in MARKS):
            return ZarrScan(path, dataset=dataset, scan_shape=scan_shape)
        magic = _first_bytes(path)
        if magic.startswith(b"\x93NUMPY"):
            refuse_dataset(path, dataset)
            return NpyScan(path, scan_shape=scan_shape, partial=partial)
        if magic.startswith(b"PK\x03\x04"):
            return NpzScan(path, dataset=dataset, scan_shape=scan_shape)
        if magic.startswith(b"MQ1,"):
            refuse_dataset(path, dataset)
            return MerlinScan(path, scan_shape=scan_shape, partial=partial)
        if magic.startswith(b"\x89HDF") or h5py.is_hdf5(path):
            return Hdf5Scan(path, dataset=dataset, scan_shape=scan_shape, partial=partial)
    except (OSError, RuntimeError, *DAMAGE) as error:  # the first two: h5py, mostly
        raise FileError(f"{path} cannot be read: {error}. Copy it again.") from error
    raise FileError(
        f"{path} is not a file that can be read here: its content is neither .npy, .npz, HDF5 nor "
        "Merlin .mib. Convert it to one of them, HDF5 with one 4D dataset for instance."
    )


def _first_bytes(path: Path) -> bytes:
    if path.is_fifo():  # to open it would wait until somebody writes
        raise FileError(f"{path} is a pipe, and a scan is read here and there: save it as a file.")
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except FileNotFoundError:
        raise FileError(f"There is no file {path}. Check the path.") from None
    except IsADirectoryError:
        raise FileError(f"{path} is a folder. Name the file in it.") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not magic:
        raise HalfWrittenFile(f"{path} is empty. Wait until it is written, or copy it again.")
    return magic
