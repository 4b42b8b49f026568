"""Scans in HDF5, whoever laid them out.

One rule finds the scan in py4DSTEM's (EMD 1.0 and older), HyperSpy's and most people's own files:
it is the only 4D dataset, or else the only 3D one, whose last two axes can be a detector. A file
that names its default dataset as NeXus does (attributes ``default`` and ``signal``) is believed,
and the numbered datasets of a DECTRIS master file (``data_000001``, …, in files of their own) are
read as one.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers the detectors' compressions with HDF5)
import numpy as np

from prenet4d_server.errors import FileError, HalfWrittenFile
from prenet4d_server.files.base import (
    CHOOSE,
    RECORDING,
    Mask,
    Metadata,
    Pixels,
    ScanFile,
    as_text,
    copy_frames,
    make_counts,
    or_partial,
)

_NUMBERED = re.compile(r"data_\d{6}")
_CACHE_BYTES = 128 << 20
"""Chunks may span many probe positions: those that are decompressed are kept up to this."""
_DETECTOR = "entry/instrument/detector"


class Hdf5Scan(ScanFile):
    """A scan in an HDF5 file; a file that is being written can be read if its writer uses SWMR."""

    def __init__(
        self,
        path: Path,
        *,
        dataset: str | None,
        scan_shape: tuple[int, int] | None,
        partial: bool,
    ) -> None:
        """Find the scan; see ``open_scan`` for the arguments and errors."""
        self._file = _open(path)
        with ExitStack() as undo:
            undo.callback(self._file.close)
            parts = _find(self._file, path, dataset, partial=partial)
            shape = parts[0].shape
            if any(part.shape[1:] != shape[1:] or part.dtype != parts[0].dtype for part in parts):
                raise FileError(f"{path} joins datasets of different frame shapes or dtypes.")
            if len(parts) > 1:
                shape = (sum(len(part) for part in parts), *shape[1:])
            super().__init__(
                path,
                shape,
                parts[0].dtype,
                scan_shape=scan_shape,
                pixel_mask=_pixel_mask(self._file, shape[-2:]),
                metadata=_metadata(self._file, parts[0]),
            )
            undo.pop_all()
        self._parts = parts
        self.corrected = _is_recording(self._file)
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def _fill(self, start: int, out: Pixels) -> None:
        if len(self._parts) == 1:
            copy_frames(self._parts[0], start, out)
            if self.corrected:
                make_counts(out)
            return
        done = 0
        while done < len(out):
            part = bisect.bisect_right(self._ends, start + done)
            n = min(self._ends[part] - start, len(out)) - done
            first = start + done - (self._ends[part] - len(self._parts[part]))
            copy_frames(self._parts[part], first, out[done : done + n])
            done += n

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_recording(file: h5py.File) -> bool:
    """Whether prenet4d's recorder made it."""
    ours = _follow(file, "prenet4d")
    return isinstance(ours, h5py.Group) and ours.attrs.get("format") == RECORDING


def _open(path: Path) -> h5py.File:
    how, reason = {"swmr": False}, ""
    for sign, remedy in (
        ("", {}),
        (os.strerror(errno.ENOLCK), {"locking": False}),  # as some network disks have it
        ("already open for", {"swmr": True}),
    ):
        if sign in reason:
            how |= remedy
            try:
                return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES, rdcc_nslots=10007, **how)
            except OSError as error:
                reason = str(error)
    if "unable to lock" in reason:
        raise HalfWrittenFile(
            f"{path} is being written by another program. Wait until it is closed."
        )
    if "already open for" in reason:
        raise HalfWrittenFile(
            f"{path} is being written by another program, or was when that program died. Wait "
            "until it is closed; if nothing writes it any more, run the HDF5 tool `h5clear -s` "
            "(Debian: hdf5-tools) on it."
        )
    if "truncated" in reason or "end of file" in reason or "addr overflow" in reason:
        raise HalfWrittenFile(f"{path} is truncated ({reason}). Copy it again.")
    raise FileError(f"{path} cannot be read as HDF5: {reason}. Copy it again.")


def _find(file: h5py.File, path: Path, dataset: str | None, *, partial: bool) -> list[h5py.Dataset]:
    """The datasets that, joined along their first axis, are the scan."""
    if dataset is not None:
        chosen = file.get(dataset)
        if isinstance(chosen, h5py.Group):
            if joined := _numbered(chosen, path, partial=partial):
                return joined
            chosen = chosen.get("data")
        if not isinstance(chosen, h5py.Dataset) or chosen.shape is None:
            raise FileError(f"{path} has no dataset {dataset!r}; it has {_listed(_walk(file))}.")
        return [chosen]
    default = _nexus_default(file)
    if default is not None:
        return [default]
    found: list[list[h5py.Dataset]] = [[item] for item in _walk(file) if _can_be_scan(item)]
    for group in _groups(file):
        joined = _numbered(group, path, partial=partial)
        if joined:
            ours = {_identity(item) for item in joined}
            found = [item for item in found if _identity(item[0]) not in ours] + [joined]
    for axes in (4, 3):
        candidates = [item for item in found if item[0].ndim == axes]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise FileError(
                f"{path} holds several datasets that could be the scan: "
                f"{_listed(item[0] for item in candidates)}. {CHOOSE}"
            )
    broken = next(_broken_links(file), None)
    raise FileError(
        f"{path} points to {broken}, which is not there. Copy it beside this file."
        if broken
        else f"{path} holds no dataset of 3 or 4 axes that could be a scan; "
        f"it has {_listed(_walk(file)) or 'none at all'}."
    )


def _can_be_scan(item: h5py.Dataset) -> bool:
    return item.ndim in (3, 4) and item.dtype.kind in "biuf" and min(item.shape[-2:]) >= 8


def _listed(items: Iterator[h5py.Dataset]) -> str:
    texts = [f"{item.name} {item.dtype} {item.shape}" for item in itertools.islice(items, 13)]
    return ", ".join(texts[:12]) + (", …" if len(texts) > 12 else "")


def _walk(file: h5py.File) -> Iterator[h5py.Dataset]:
    """Every dataset once, through links of every kind."""
    seen: set[tuple[int, int]] = set()
    for group in _groups(file):
        for name in group:
            item = _follow(group, name)
            if isinstance(item, h5py.Dataset) and _identity(item) not in seen:
                seen.add(_identity(item))
                yield item


def _groups(file: h5py.File) -> Iterator[h5py.Group]:
    """Every group once; links may go round in circles."""
    seen: set[tuple[int, int]] = set()
    waiting: list[h5py.Group] = [file["/"]]
    while waiting:
        group = waiting.pop()
        if _identity(group) in seen:
            continue
        seen.add(_identity(group))
        yield group
        found = (_follow(group, name) for name in group)
        waiting.extend(item for item in found if isinstance(item, h5py.Group))


def _identity(item: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    info = h5py.h5o.get_info(item.id)
    return info.fileno, info.addr


def _follow(
    holder: h5py.Group | h5py.AttributeManager | h5py.Dataset, name: str | tuple[()]
) -> Any:
    """What a link leads to, or what an attribute or a dataset holds.

    ``None`` where that is nothing, or of a type that NumPy has not.
    """
    try:
        return holder[name]
    except (KeyError, OSError, TypeError):
        return None


def _broken_links(file: h5py.File) -> Iterator[str]:
    for group in _groups(file):
        for name in group:
            if _follow(group, name) is None:
                link = group.get(name, getlink=True)
                yield str(getattr(link, "filename", None) or getattr(link, "path", name))


def _numbered(group: h5py.Group, path: Path, *, partial: bool) -> list[h5py.Dataset]:
    """DECTRIS' ``data_000001``, ``data_000002``, … in order; empty where there are none."""
    found: list[h5py.Dataset] = []
    names = sorted(name for name in group if _NUMBERED.fullmatch(as_text(name)))
    for name in names:
        item = _follow(group, name)
        if isinstance(item, h5py.Dataset) and item.ndim == 3:
            found.append(item)
            continue
        # A series that was stopped leaves links to files that were never written.
        if partial and found:
            break
        where = getattr(group.get(name, getlink=True), "filename", name)
        frames = sum(len(item) for item in found)
        raise HalfWrittenFile(
            f"{path} points to {where}, which is missing or unreadable. Copy it beside the master "
            f"file{or_partial(frames)}."
        )
    return found


def _nexus_default(file: h5py.File) -> h5py.Dataset | None:
    item: Any = file["/"]
    for _ in range(8):
        if not isinstance(item, h5py.Group):
            break
        name = item.attrs.get("signal", item.attrs.get("default"))
        if not isinstance(name, str) or _NUMBERED.fullmatch(name):
            return None
        item = _follow(item, name)
    return item if isinstance(item, h5py.Dataset) and _can_be_scan(item) else None


def _pixel_mask(file: h5py.File, frame_shape: tuple[int, ...]) -> Mask | None:
    """DECTRIS' mask, in which anything but 0 is a pixel not to be trusted."""
    for name in (f"{_DETECTOR}/detectorSpecific/pixel_mask", f"{_DETECTOR}/pixel_mask"):
        item = _follow(file, name)
        if isinstance(item, h5py.Dataset) and item.shape == frame_shape:
            return np.asarray(item[:] == 0)
    return None


def _metadata(file: h5py.File, scan: h5py.Dataset) -> Metadata:
    """What one wants to know later: the detector's settings and the dataset's attributes."""
    found: dict[str, Any] = {"dataset": scan.name}
    detector = _follow(file, _DETECTOR)
    if isinstance(detector, h5py.Group):
        for name in detector:
            item = _follow(detector, name)
            if isinstance(item, h5py.Dataset) and item.size == 1:
                found[name] = _follow(item, ())
        if "description" in found:  # NXdetector's name for the model
            found["detector"] = found["description"]
    microscope = _follow(scan.parent, "metadata/Acquisition_instrument/TEM")
    for holder in (scan.parent, scan, microscope):
        if holder is not None:
            found |= {name: _follow(holder.attrs, name) for name in holder.attrs}
    scalars = ((as_text(name), _scalar(value)) for name, value in found.items())
    return {name: value for name, value in scalars if value is not None}


def _scalar(value: Any) -> str | int | float | bool | None:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = as_text(value)
    return value if isinstance(value, str | int | float | bool) else None
