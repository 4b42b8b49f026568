"""NumPy's own files: ``.npy``, mapped into memory, and ``.npz``, streamed out of the archive."""

from __future__ import annotations

import math
import threading
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from prenet4d_server.errors import FileError, HalfWrittenFile
from prenet4d_server.files.base import CHOOSE, Pixels, ScanFile, copy_frames, or_partial

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)
"""What reading a damaged archive raises, beside OSError."""


class NpyScan(ScanFile):
    """A scan in an ``.npy`` file."""

    def __init__(
        self, path: Path, *, scan_shape: tuple[int, int] | None, partial: bool = False
    ) -> None:
        """Map the file; see ``open_scan`` for the arguments and errors."""
        with path.open("rb") as file:
            shape, fortran, stored = _read_header(file, str(path))
            offset = file.tell()
        there = path.stat().st_size - offset
        if there < math.prod(shape) * stored.itemsize:
            shape = _whole_frames(path, shape, stored, there, fortran=fortran, partial=partial)
        super().__init__(path, shape, stored, scan_shape=scan_shape)
        self._array = np.memmap(
            path, stored, mode="r", offset=offset, shape=shape, order="F" if fortran else "C"
        )

    def _fill(self, start: int, out: Pixels) -> None:
        copy_frames(self._array, start, out)


def _whole_frames(
    path: Path,
    shape: tuple[int, ...],
    stored: np.dtype[Any],
    there: int,
    *,
    fortran: bool,
    partial: bool,
) -> tuple[int, ...]:
    # In Fortran order the frames' pixels are interleaved: none of them is whole.
    whole = 0 if fortran or len(shape) < 3 else there // (math.prod(shape[-2:]) * stored.itemsize)
    if partial and whole:
        return (whole, *shape[-2:])
    raise HalfWrittenFile(
        f"{path} is truncated: its header announces {stored} {shape}, that is "
        f"{math.prod(shape) * stored.itemsize} bytes, and {there} are there. "
        f"Wait until it is written or copy it again{or_partial(whole)}."
    )


class NpzScan(ScanFile):
    """A scan in an ``.npz`` archive, stored or compressed.

    A member of an archive cannot be mapped: it is decompressed as it is read, forward only. Reading
    backward starts at its beginning again.
    """

    def __init__(
        self, path: Path, *, dataset: str | None, scan_shape: tuple[int, int] | None
    ) -> None:
        """Find the member; see ``open_scan`` for the arguments and errors."""
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise HalfWrittenFile(
                f"{path} is not a whole .npz archive ({error}). "
                "Wait until it is written, or copy it again."
            ) from error
        self._lock = threading.Lock()
        with ExitStack() as undo:
            undo.callback(self._archive.close)
            name = self._choose(path, dataset)
            self._member = self._archive.open(name)
            shape, fortran, self._stored = _read_header(self._member, f"{path}:{name}")
            self._offset = self._member.tell()
            if fortran and len(shape) > 1:
                raise FileError(
                    f"{path}:{name} is in Fortran order, whose frames cannot be streamed out of an "
                    "archive. Save it with numpy.save, or after numpy.ascontiguousarray."
                )
            super().__init__(path, shape, self._stored, scan_shape=scan_shape)
            undo.pop_all()

    def _choose(self, path: Path, dataset: str | None) -> str:
        names = {
            name.removesuffix(".npy"): name
            for name in self._archive.namelist()
            if name.endswith(".npy")
        }
        if dataset is not None:
            if dataset not in names:
                raise FileError(f"{path} has no array {dataset!r}; it has {', '.join(names)}.")
            return names[dataset]
        found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for label, name in names.items():
            with self._archive.open(name) as member:
                shape, _, stored = _read_header(member, f"{path}:{name}")
            if 3 <= len(shape) <= 4 or (len(shape) == 2 and len(names) == 1):
                found[label] = (shape, stored)
        if len(found) != 1:
            listed = ", ".join(
                f"{label} {dtype} {shape}" for label, (shape, dtype) in found.items()
            )
            raise FileError(
                f"{path} holds several arrays that could be the scan: {listed}. {CHOOSE}"
                if found
                else f"{path} holds no array of 3 or 4 axes; it has {', '.join(names) or 'none'}."
            )
        return names[next(iter(found))]

    def _fill(self, start: int, out: Pixels) -> None:
        frame_bytes = math.prod(self.frame_shape) * self._stored.itemsize
        try:
            with self._lock:
                self._member.seek(self._offset + start * frame_bytes)
                raw = self._member.read(len(out) * frame_bytes)
        except DAMAGE as error:
            raise FileError(f"{self.path} is damaged: {error}. Copy it again.") from error
        if len(raw) != len(out) * frame_bytes:
            raise HalfWrittenFile(f"{self.path} ends in the middle of a frame. Copy it again.")
        copy_frames(np.frombuffer(raw, self._stored).reshape(out.shape), 0, out)

    def close(self) -> None:
        """Close the archive."""
        self._member.close()
        self._archive.close()


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype; leaves the file at the first value."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(file)
    except ValueError as error:
        raise HalfWrittenFile(
            f"{name} has no whole .npy header ({error}). Copy it again."
        ) from error
    raise FileError(f"{name} is in .npy version {version}, which holds no plain numbers.")
