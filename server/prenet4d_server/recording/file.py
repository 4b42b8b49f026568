"""One acquisition being recorded: what goes where, and what is told of it in the end.

What is found at each probe position is gathered in memory, and written once for many batches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prenet4d_client.messages import Counters, Event, Telemetry
from prenet4d_server.errors import FileError
from prenet4d_server.recording import layout
from prenet4d_server.recording.hdf5 import Hdf5Store
from prenet4d_server.recording.layout import (
    Acquisition,
    Array,
    Compression,
    Fill,
    Indices,
    Store,
    StoreOptions,
    Table,
)

if TYPE_CHECKING:
    from prenet4d_server.recording.zarr import ZarrStore

ZARR = ".zarr"
"""The suffix of a recording that is a Zarr store."""
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs", ".hspy", ".emd")
"""Suffixes of those that are HDF5 files."""


class Recording:
    """The file of one acquisition. Any of its methods raises OSError when the disk fails it.

    Args:
        path: the file, or the folder of a Zarr store (``.zarr``); it must not exist, unless
            ``overwrite`` is set.
        acquisition: what is known of it.
        content: which patterns: ``corrected``, ``aligned`` or both; the first is the one that
            viewers show first.
        compression: of the patterns.
        fill: what pixels without a source become.
        overwrite: replace an existing file.
    """

    def __init__(
        self,
        path: Path,
        acquisition: Acquisition,
        *,
        content: tuple[str, ...],
        compression: Compression = "none",
        fill: Fill = "zero",
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.acquisition = acquisition
        self.patterns = 0
        """How many probe positions have a pattern."""
        self.refused = 0
        """Patterns and telemetry that have no place in this file."""
        self._content = content
        self._fill = fill
        scan = acquisition.scan_shape
        self._nx = scan[1] if scan else None
        self._capacity = scan[0] * scan[1] if scan else 0
        self._length = self._capacity
        self._maps = {name: map_.array(self._capacity) for name, map_ in layout.MAPS.items()}
        self._changed = (0, 0)
        self._covered = np.zeros(acquisition.frame_shape, np.int64)
        self._rows: dict[Table, list[tuple[Any, ...]]] = {"batches": [], "events": []}
        options = StoreOptions(content, compression, fill, overwrite)
        self._store = _make_store(path, acquisition, options)

    @property
    def absent(self) -> int:
        """How many patterns its start announced that are not here."""
        start = self.acquisition.start
        return max(0, ((start and start.expected_frames) or 0) - self.patterns)

    def write_patterns(self, name: str, indices: Indices, patterns: Array) -> int:
        """Write (n, h, w) patterns of the kind ``name`` at their probe positions.

        Returns:
            How many of the positions had no pattern before.
        """
        if patterns.shape[1:] != self.acquisition.frame_shape:
            self.refused += len(indices)
            return 0
        inside = self._make_room(indices)
        indices, patterns = indices[inside], patterns[inside]
        missing = np.isnan(patterns)
        if self._fill == "zero":
            patterns = np.where(missing, np.float32(0), patterns)
        self._store.write_patterns(name, indices, patterns)
        if name != self._content[0]:
            return 0
        new = int(np.count_nonzero(~self._maps["received"][indices]))
        self.patterns += new
        self._covered += np.count_nonzero(~missing, axis=0)
        self._maps["received"][indices] = True
        self._mark(indices)
        return new

    def write_telemetry(self, header: Telemetry, arrays: Mapping[str, Array]) -> None:
        """Write what was found in one batch."""
        indices = arrays["indices"]
        inside = self._make_room(indices)
        for name in layout.MAPS.keys() & arrays.keys():
            self._maps[name][indices[inside]] = arrays[name][inside]
        self._mark(indices[inside])
        ellipse, latency = header.ellipticity, header.latency.total
        self._rows["batches"].append(
            (
                header.time,
                header.batch,
                indices[0] if len(indices) else -1,
                len(indices),
                *header.reference_center,
                ellipse.ratio,
                ellipse.theta,
                np.nan if ellipse.ratio_sigma is None else ellipse.ratio_sigma,
                np.nan if ellipse.theta_sigma is None else ellipse.theta_sigma,
                header.state,
                header.patterns_averaged,
                header.frames_per_second,
                header.backlog,
                latency.p50,
                latency.p99,
                *(getattr(header.counters, name) for name in layout.COUNTERS),
            )
        )

    def write_event(self, header: Event) -> None:
        """Write one event."""
        self._rows["events"].append((header.time, header.level, header.code, header.message))

    def flush(self) -> None:
        """Let readers see what has been written so far."""
        self._write_maps()
        for table, rows in self._rows.items():
            if rows:
                self._store.append(table, rows)
                rows.clear()
        self._store.flush()

    def close(self, *, complete: bool, reason: str = "", counters: Counters | None = None) -> None:
        """Write the last of it and close the file.

        Args:
            complete: whether the acquisition is in it to its regular end, early or not.
            reason: why not.
            counters: what became of the acquisition's frames, where the service said so.
        """
        ending: dict[str, Any] = {
            "complete": complete,
            "reason": reason,
            "end_time": datetime.now(UTC).isoformat(),
        }
        if counters is not None:
            ending |= {f"frames_{name}": getattr(counters, name) for name in layout.COUNTERS}
            ending["frames_rejected_by_reason"] = json.dumps(counters.rejected_by_reason)
        try:
            self.flush()
        finally:
            self._store.close(ending)

    def _make_room(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Which of these positions the file has, after growing to hold them if it can."""
        inside = indices >= 0
        if self._nx is not None:
            inside &= indices < self._capacity
        self.refused += int(np.count_nonzero(~inside))
        needed = int(indices.max(initial=-1)) + 1
        if self._nx is None and needed > self._length:
            self._length = needed
            if needed > self._capacity:
                more = max(needed, 2 * self._capacity) - self._capacity
                for name, map_ in layout.MAPS.items():
                    self._maps[name] = np.concatenate((self._maps[name], map_.array(more)))
                self._capacity += more
            self._store.grow(needed)
        return inside

    def _mark(self, indices: Indices) -> None:
        if len(indices):
            start, stop = self._changed
            first, last = int(indices.min()), int(indices.max()) + 1
            self._changed = (min(start, first), max(stop, last)) if stop else (first, last)

    def _write_maps(self) -> None:
        start, stop = self._changed
        self._changed = (0, 0)
        if not stop:
            return
        for name, values in self._maps.items():
            self._store.write_map(name, values, start, stop)
        self._store.write_coverage(self._covered / max(1, self.patterns))


def check_kind(path: Path) -> None:
    """See whether files of this kind can be written here.

    Raises:
        FileError: the package for it is missing.
    """
    if path.suffix == ZARR:
        _zarr_store(path)


def _make_store(path: Path, acquisition: Acquisition, options: StoreOptions) -> Store:
    kind = _zarr_store(path) if path.suffix == ZARR else Hdf5Store
    return kind(path, acquisition, options)


def _zarr_store(path: Path) -> type[ZarrStore]:
    try:
        from prenet4d_server.recording.zarr import ZarrStore
    except ModuleNotFoundError as missing:
        raise FileError(
            f"{path.name} would be a Zarr store, and the package {missing.name!r} is missing: "
            "pip install 'prenet4d[zarr]'."
        ) from None
    return ZarrStore
