"""Scans in Zarr stores, versions 2 and 3, such as the recorder's; the extra ``zarr`` reads them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from prenet4d_server.errors import FileError
from prenet4d_server.files.base import (
    CHOOSE,
    RECORDING,
    Metadata,
    Pixels,
    ScanFile,
    make_counts,
    refuse_dataset,
)

MARKS = ("zarr.json", ".zgroup", ".zarray")
"""A folder with one of these is a Zarr store."""
_PREFERRED = ("corrected", "aligned")
"""Of a recording that has both, as in its HDF5 form."""
_BLOCKS = 4
"""Decompressed blocks that are kept: decoding threads share them."""
_BLOCK_BYTES = 32 << 20
_DAMAGE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What zarr and its codecs raise for what they cannot read."""


class ZarrScan(ScanFile):
    """A scan in a Zarr store, read a block of neighbouring frames at a time."""

    def __init__(
        self, path: Path, *, dataset: str | None, scan_shape: tuple[int, int] | None
    ) -> None:
        """Find the scan; see ``open_scan`` for the arguments and errors."""
        try:
            import zarr
        except ModuleNotFoundError as missing:
            raise FileError(
                f"{path} is a Zarr store, and the package {missing.name!r} is missing: "
                "pip install 'prenet4d[zarr]'."
            ) from None
        try:
            root: Any = zarr.open(path, mode="r")
            self._array = _find(root, path, dataset)
        except _DAMAGE as error:
            raise FileError(f"{path} cannot be read as Zarr: {error}. Copy it again.") from error
        super().__init__(
            path,
            self._array.shape,
            self._array.dtype,
            scan_shape=scan_shape,
            metadata=_metadata(root, self._array),
        )
        self.corrected = _is_recording(root)
        self._nx = self._array.shape[1] if self._array.ndim == 4 else self.n_frames
        frame_bytes = int(np.prod(self.frame_shape)) * self._array.dtype.itemsize
        stored = (self._array.shards or self._array.chunks)[-3] if self._array.ndim > 2 else 1
        self._block = max(1, min(stored, _BLOCK_BYTES // frame_bytes))
        self._blocks: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._reading = threading.Lock()

    def _fill(self, start: int, out: Pixels) -> None:
        done = 0
        while done < len(out):
            line, at = divmod(start + done, self._nx)
            number, within = divmod(at, self._block)
            block = self._read_block(line, number)[within:]
            n = min(len(block), len(out) - done)
            # A float64 beyond float32's range becomes inf, which the intake refuses.
            with np.errstate(over="ignore"):
                np.copyto(out[done : done + n], block[:n], casting="unsafe")
            done += n
        if self.corrected:
            make_counts(out)

    def _read_block(self, line: int, number: int) -> Pixels:
        """The frames of one block of a scan line, or of the whole where there are no lines."""
        with self._reading:
            if (line, number) not in self._blocks:
                first = number * self._block
                along = slice(first, min(first + self._block, self._nx))
                place: Any = {2: slice(None), 3: along, 4: (line, along)}[self._array.ndim]
                try:
                    block = np.asarray(self._array[place])
                except _DAMAGE as error:
                    raise FileError(f"{self.path} is damaged: {error}. Copy it again.") from error
                while len(self._blocks) >= _BLOCKS:
                    self._blocks.popitem(last=False)
                self._blocks[line, number] = block.reshape(-1, *self.frame_shape)
            return self._blocks[line, number]


def _find(root: Any, path: Path, dataset: str | None) -> Any:
    """The array that is the scan: the one that is named, or the only one that fits."""
    if not hasattr(root, "arrays"):
        refuse_dataset(path, dataset)
        return root
    members = sorted(root.members(max_depth=None), key=lambda member: str(member[0]))
    arrays = {name: item for name, item in members if hasattr(item, "dtype")}
    if dataset is not None:
        if dataset not in arrays:
            raise FileError(f"{path} has no array {dataset!r}; it has {', '.join(arrays)}.")
        return arrays[dataset]
    fitting = {
        name: item
        for name, item in arrays.items()
        if item.ndim in (3, 4) and min(item.shape[-2:]) >= 8
    }
    ours = [name for name in _PREFERRED if name in fitting]
    if _is_recording(root) and ours:
        return fitting[ours[0]]
    for axes in (4, 3):
        candidates = {name: item for name, item in fitting.items() if item.ndim == axes}
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        if candidates:
            listed = ", ".join(
                f"{name} {item.dtype} {item.shape}" for name, item in candidates.items()
            )
            raise FileError(
                f"{path} holds several arrays that could be the scan: {listed}. {CHOOSE}"
            )
    raise FileError(
        f"{path} holds no array of 3 or 4 axes that could be a scan; it has "
        f"{', '.join(arrays) or 'none at all'}."
    )


def _is_recording(root: Any) -> bool:
    """Whether prenet4d's recorder made it."""
    return bool(root.attrs.get("format") == RECORDING)


def _metadata(root: Any, array: Any) -> Metadata:
    """What one wants to know later: the scan's attributes and what its acquisition was told."""
    found: dict[str, Any] = {"dataset": array.name, **root.attrs}
    announced = found.pop("acquisition", None)
    if isinstance(announced, dict):
        found |= announced
        metadata = found.pop("metadata", None)
        found |= metadata if isinstance(metadata, dict) else {}
    return {
        name: value for name, value in found.items() if isinstance(value, str | int | float | bool)
    }
