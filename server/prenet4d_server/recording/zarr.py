"""A recording in Zarr v3: a folder that any Zarr library reads, also while it is being written.

::

    corrected, aligned    (ny, nx, h, w) float32, or (n, h, w) where no scan shape is known
    maps/center, dose, …  what was found at each probe position, (ny, nx[, 2]) or (n[, 2])
    maps/received         (ny, nx) or (n): whether a pattern came
    coverage              (h, w): the fraction of the patterns with a source at each pixel
    pixel_mask            (h, w): where raw pixels could be trusted, if the detector said so
    batches/ratio, …      one entry for each batch of telemetry
    attributes            complete, reason, what became of the frames; acquisition; provenance;
                          events

Small chunks, which serve readers of single patterns and readers of one place in all of them, lie
together in shards of many probe positions, so that the files are few and large. A shard is gathered
in memory and written as a whole; one that is not full yet is written at every flush. The package
zarr makes everything but the shards: it takes about a millisecond for each chunk, several times
what compressing and writing it takes, so shards are put together here.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import zarr
from google_crc32c import value as crc32c
from numcodecs import Blosc, GZip
from zarr.codecs import BloscCodec, GzipCodec

from prenet4d_client.messages import State
from prenet4d_server.errors import FileError
from prenet4d_server.files.base import RECORDING
from prenet4d_server.recording import layout
from prenet4d_server.recording.layout import (
    Acquisition,
    Array,
    Compression,
    Indices,
    StoreOptions,
    Table,
    removed,
)

SHARD_BYTES = 16 << 20
"""About so many bytes of patterns are in a full shard."""
POSITIONS = 8
"""Neighbouring probe positions in a chunk: Zarr takes long for each chunk, so more than in HDF5."""
_OPEN_SHARDS = 4
_CODECS: dict[Compression, Any] = {
    "none": None,
    "bslz4": BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=4),
    "gzip": GzipCodec(level=1),
}
_ENCODERS: dict[Compression, Callable[[Array], bytes | memoryview]] = {
    "none": lambda chunk: chunk.data.cast("B"),
    "bslz4": Blosc(cname="lz4", shuffle=Blosc.BITSHUFFLE, typesize=4).encode,
    "gzip": GZip(level=1).encode,
}
"""The same, applied to a chunk."""
_MISSING = (1 << 64) - 1
"""In a shard's index: this chunk has no values."""
_STATES = get_args(State)


class ZarrStore:
    """One acquisition's Zarr store.

    Args:
        path: the folder; it must not exist, unless it is to be replaced.
        acquisition: what is known of it.
        options: how it is to be written.

    Raises:
        FileError: what is to be replaced is no Zarr store.
    """

    def __init__(self, path: Path, acquisition: Acquisition, options: StoreOptions) -> None:
        if path.exists() and not (path / "zarr.json").is_file():
            raise FileError(f"{path} exists and is no Zarr store: it is not replaced.")
        scan = acquisition.scan_shape
        self._scan = scan
        self._written_once = path / "coverage" / "zarr.json"
        self._root = zarr.create_group(path, zarr_format=3, overwrite=options.overwrite)
        names = ("y", "x") if scan else ("frame",)
        shape = scan or (0,)
        empty = 0.0 if options.fill == "zero" else np.nan
        self._patterns = {
            name: _Sharded(
                self._root, name, shape, acquisition.frame_shape, (*names, "ky", "kx"),
                compression=options.compression, empty=empty,
                folder=path / name,
            )
            for name in options.content
        }  # fmt: skip
        self._maps = {
            name: self._root.create_array(
                f"maps/{name}",
                shape=(*shape, *map_.shape),
                dtype=map_.dtype,
                chunks=_map_chunk(scan, map_.shape),
                fill_value=np.dtype(map_.dtype).type(map_.empty),
                dimension_names=(*names, "yx")[: len(shape) + len(map_.shape)],
                attributes={"units": map_.unit, "description": map_.meaning},
            )
            for name, map_ in layout.MAPS.items()
        }
        self._coverage = self._root.create_array(
            "coverage", data=np.zeros(acquisition.frame_shape, np.float32),
            dimension_names=("ky", "kx"), attributes={"description": layout.COVERAGE},
        )  # fmt: skip
        if acquisition.pixel_mask is not None:
            self._root.create_array(
                "pixel_mask", data=acquisition.pixel_mask, dimension_names=("ky", "kx"),
                attributes={"description": layout.PIXEL_MASK},
            )  # fmt: skip
        self._batches = {
            name: self._root.create_array(
                f"batches/{name}",
                shape=(0,),
                dtype="uint8" if name == "state" else kind[0],
                chunks=(4096,),
                dimension_names=("batch",),
                attributes={"states": list(_STATES)} if name == "state" else {},
            )
            for name, kind in (layout.BATCH.fields or {}).items()
        }
        self._attributes: dict[str, Any] = {
            "format": RECORDING,
            "format_version": 2,
            "program": f"prenet4d {version('prenet4d')}",
            "python": platform.python_version(),
            "zarr": zarr.__version__,
            "recording_started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fill": options.fill,
            "units": "counts",
            "batches": layout.BATCHES,
            "complete": False,
            "reason": "the recorder has not closed this store",
            **_announced(acquisition),
            "events": [],
        }
        self._root.attrs.put(self._attributes)

    def grow(self, length: int) -> None:
        """Make room for so many positions."""
        for patterns in self._patterns.values():
            patterns.grow(length)

    def write_patterns(self, name: str, indices: Indices, patterns: Array) -> None:
        """Write (n, h, w) patterns of the kind ``name`` at their positions."""
        self._patterns[name].write(indices, patterns)

    def write_map(self, name: str, values: Array, start: int, stop: int) -> None:
        """Write positions ``start`` to ``stop`` of a map, or the scan lines that they lie in."""
        array = self._maps[name]
        if self._scan is None:
            if array.shape[0] < stop:
                array.resize((stop, *array.shape[1:]))
            array[start:stop] = values[start:stop]
        else:
            nx = self._scan[1]
            lines = slice(start // nx, (stop - 1) // nx + 1)
            array[lines] = values.reshape(array.shape)[lines]

    def write_coverage(self, coverage: Array) -> None:
        """Write the (h, w) fraction of the patterns with a source at each pixel."""
        self._coverage[:] = coverage

    def append(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows of ``BATCH`` or ``EVENT``."""
        if table == "events":
            names = layout.EVENT.names or ()
            self._attributes["events"] += [dict(zip(names, row, strict=True)) for row in rows]
            self._root.attrs.put(self._attributes)
            return
        for (name, array), column in zip(
            self._batches.items(), zip(*rows, strict=True), strict=True
        ):
            values = [_STATES.index(state) for state in column] if name == "state" else column
            have = array.shape[0]
            array.resize((have + len(values),))
            array[have:] = np.array(values, array.dtype)

    def flush(self) -> None:
        """Write the shards that are not full, too."""
        for patterns in self._patterns.values():
            patterns.flush()
        if not self._written_once.is_file():
            raise removed()

    def close(self, ending: Mapping[str, Any]) -> None:
        """Write how it ended."""
        self._attributes |= ending
        self._root.attrs.put(self._attributes)


class _Shard:
    """Patterns at neighbouring probe positions, on their way to one file."""

    def __init__(self, values: npt.NDArray[np.float32], came: npt.NDArray[np.bool_]) -> None:
        self.values = values
        self.came = came
        self.changed = False

    def put(self, places: Indices, patterns: Array) -> None:
        self.values[places] = patterns
        self.came[places] = True
        self.changed = True

    @property
    def full(self) -> bool:
        return bool(self.came.all())


class _Sharded:
    """The array of all patterns of one kind, written shard by shard."""

    def __init__(
        self,
        root: zarr.Group,
        name: str,
        positions: tuple[int, ...],
        frame_shape: tuple[int, int],
        names: tuple[str, ...],
        *,
        compression: Compression,
        empty: float,
        folder: Path,
    ) -> None:
        chunk = self._chunk = layout.chunk(POSITIONS, frame_shape)
        self._encode = _ENCODERS[compression]
        self._folder = folder
        self._empty = np.float32(empty)
        self._frame_shape = frame_shape
        self._nx = positions[1] if len(positions) == 2 else None
        bytes_each = 4 * frame_shape[0] * frame_shape[1]
        groups = max(1, SHARD_BYTES // bytes_each // chunk[0])
        if self._nx is not None:
            groups = min(groups, -(-self._nx // chunk[0]))
        self._per_shard = groups * chunk[0]
        whole = (-(-side // part) * part for side, part in zip(frame_shape, chunk[1:], strict=True))
        lines = (1,) * (len(positions) - 1)
        self._array = root.create_array(
            name,
            shape=(*positions, *frame_shape),
            dtype="float32",
            chunks=(*lines, *chunk),
            shards=(*lines, self._per_shard, *whole),
            compressors=_CODECS[compression],
            chunk_key_encoding={"name": "default", "separator": "/"},
            fill_value=float(empty),
            dimension_names=names,
            attributes={"units": "counts", "description": layout.PATTERNS[name]},
        )
        self._open: dict[tuple[int, int], _Shard] = {}
        self._came: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}
        """Of every shard that has a file: which of its positions came."""

    def grow(self, length: int) -> None:
        if self._array.shape[0] < length:
            self._array.resize((length, *self._frame_shape))

    def write(self, indices: Indices, patterns: Array) -> None:
        lines, at = np.divmod(indices, self._nx) if self._nx else (np.zeros_like(indices), indices)
        groups, within = np.divmod(at, self._per_shard)
        for key in sorted(set(zip(lines.tolist(), groups.tolist(), strict=True))):
            its = (lines == key[0]) & (groups == key[1])
            shard = self._shard(key)
            shard.put(within[its], patterns[its])
            if shard.full:
                self._close(key)

    def flush(self) -> None:
        for key, shard in self._open.items():
            self._save(key, shard)

    def _shard(self, key: tuple[int, int]) -> _Shard:
        if key not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._close(next(iter(self._open)))
            end = self._per_shard
            if self._nx is not None:
                end = min(end, self._nx - key[1] * self._per_shard)
            values = np.full((end, *self._frame_shape), self._empty, np.float32)
            came = self._came.get(key)
            if came is None:
                came = np.zeros(end, np.bool_)
            else:  # closed before all of it came
                there = np.asarray(self._array[self._place(key)])
                values[: len(there)] = there
            self._open[key] = _Shard(values, came)
        return self._open[key]

    def _close(self, key: tuple[int, int]) -> None:
        self._save(key, self._open.pop(key))

    def _save(self, key: tuple[int, int], shard: _Shard) -> None:
        if not shard.changed:
            return
        file = self._folder.joinpath("c", *map(str, key[self._nx is None :]), "0", "0")
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name("new")  # whoever reads meanwhile finds the one before
        with new.open("wb") as written:
            written.writelines(self._parts(shard))
        new.replace(file)
        shard.changed = False
        self._came[key] = shard.came

    def _parts(self, shard: _Shard) -> list[bytes | memoryview]:
        """The shard's file in parts, as the codec ``sharding_indexed`` of Zarr v3 has it.

        The chunks that have values, one after the other; then for each chunk of the shard, in C
        order, its offset and its size as little-endian 64-bit integers; then their CRC32C.
        """
        n, h, w = self._chunk
        parts: list[bytes | memoryview] = []
        index: list[tuple[int, int]] = []
        offset = 0
        for at, y, x in itertools.product(
            range(0, self._per_shard, n),
            range(0, self._frame_shape[0], h),
            range(0, self._frame_shape[1], w),
        ):
            if not shard.came[at : at + n].any():
                index.append((_MISSING, _MISSING))
                continue
            values = shard.values[at : at + n, y : y + h, x : x + w]
            if values.shape == self._chunk:
                chunk = np.ascontiguousarray(values)
            else:
                chunk = np.full(self._chunk, self._empty)
                chunk[tuple(map(slice, values.shape))] = values
            parts.append(self._encode(chunk))
            index.append((offset, len(parts[-1])))
            offset += len(parts[-1])
        table = np.array(index, "<u8").tobytes()
        return [*parts, table, crc32c(table).to_bytes(4, "little")]

    def _place(self, key: tuple[int, int]) -> tuple[Any, ...]:
        line, group = key
        along = slice(group * self._per_shard, (group + 1) * self._per_shard)
        return (along,) if self._nx is None else (line, along)


def _map_chunk(scan: tuple[int, int] | None, more: tuple[int, ...]) -> tuple[int, ...]:
    lines = (min(scan[0], max(1, 16384 // scan[1])), scan[1]) if scan else (4096,)
    return (*lines, *more)


def _announced(acquisition: Acquisition) -> dict[str, Any]:
    """What its start said, as attributes."""
    start = acquisition.start
    if start is None:
        return {"acquisition": {"acquisition_id": acquisition.id}, "provenance": {}}
    # By way of pydantic's JSON, in which NaN is null: JSON has none, and a bare one ends readers.
    told = json.loads(start.model_dump_json(exclude={"arrays", "protocol", "version", "type"}))
    return {"provenance": told.pop("provenance"), "acquisition": told}
