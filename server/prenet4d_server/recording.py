"""One acquisition's HDF5 file while it is being written; ``recording_layout`` says what is in it.

It is written in HDF5's SWMR mode: a reader that opens it with ``swmr=True`` follows it, and all up
to the last flush survives the writer's death. Until it is closed it opens in no other way; what a
killed writer leaves opens as usual after ``h5clear -s FILE`` (HDF5's own tool). Nothing can be
created in that mode, so everything is there from the start, and what changes is overwritten.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
from prenet4d_client.messages import Counters, Event, Telemetry

from prenet4d_server import recording_layout as layout
from prenet4d_server.recording_layout import Acquisition, Array, Compression, Fill

Indices: TypeAlias = npt.NDArray[np.int64]


class Recording:
    """The file of one acquisition. Any of its methods raises OSError when the disk fails it.

    Args:
        path: the file; it must not exist, unless ``overwrite`` is set.
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
        # What is found is gathered here, and written once for many batches.
        self._capacity = scan[0] * scan[1] if scan else 0
        self._length = self._capacity
        self._maps = {name: map_.array(self._capacity) for name, map_ in layout.MAPS.items()}
        self._changed = (0, 0)
        self._covered = np.zeros(acquisition.frame_shape, np.int64)
        self._rows: dict[str, list[tuple[Any, ...]]] = {"batches": [], "events": []}

        # The oldest form of file that has SWMR, so that most programs know it.
        self._file = h5py.File(path, "w" if overwrite else "x", libver=("v110", "v110"))
        layout.create(self._file, acquisition, content=content, compression=compression, fill=fill)
        self._ours = self._file["prenet4d"]
        self._data = {name: self._file[f"Experiments/{name}/data"] for name in content}
        self._file.swmr_mode = True

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
        data = self._data[name]
        if data.shape[0] < self._length and self._nx is None:
            data.resize(self._length, axis=0)
        for place, first, last in _runs(indices, self._nx):
            data[place] = patterns[first:last]
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
        texts = (header.level, header.code, header.message)
        sizes = (layout.EVENT[name].itemsize for name in ("level", "code", "message"))
        self._rows["events"].append(
            (header.time, *(_fixed(text, size) for text, size in zip(texts, sizes, strict=True)))
        )

    def flush(self) -> None:
        """Let readers see what has been written so far."""
        self._write_maps()
        for name, rows in self._rows.items():
            if rows:
                table = self._ours[name]
                have = len(table)
                table.resize(have + len(rows), axis=0)
                table[have:] = np.array(rows, table.dtype)
                rows.clear()
        self._file.flush()

    def close(self, *, complete: bool, reason: str = "", counters: Counters | None = None) -> None:
        """Write the last of it and close the file.

        Args:
            complete: whether the acquisition is in it to its regular end.
            reason: why not.
            counters: what became of the acquisition's frames, where the service said so.
        """
        try:
            self.flush()
            attrs = self._ours.attrs
            attrs.modify("complete", complete)
            attrs.modify("reason", np.bytes_(_fixed(reason, layout.REASON_BYTES)))
            if counters is not None:
                for name in layout.COUNTERS:
                    attrs.modify(f"frames_{name}", getattr(counters, name))
                reasons = json.dumps(counters.rejected_by_reason)
                attrs.modify(
                    "frames_rejected_by_reason", np.bytes_(_fixed(reasons, layout.REASON_BYTES))
                )
        finally:
            self._file.close()

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
            data = self._ours[name]
            if self._nx is None:
                data.resize(self._length, axis=0)
                data[start:stop] = values[start:stop]
            else:
                lines = slice(start // self._nx, (stop - 1) // self._nx + 1)
                data[lines] = values.reshape(data.shape)[lines]
        if self._nx is None:
            for name in self._content:
                self._file[f"Experiments/{name}/axis-0"].attrs.modify("size", self._length)
        self._ours["coverage"][:] = self._covered / max(1, self.patterns)


def _runs(indices: Indices, nx: int | None) -> Iterator[tuple[Any, int, int]]:
    """Cut a batch where its indices jump or a scan line ends: (place in the dataset, from, to)."""
    if not len(indices):
        return
    cut = np.diff(indices) != 1
    if nx is not None:
        cut |= indices[1:] % nx == 0
    for first, last in itertools.pairwise([0, *(np.flatnonzero(cut) + 1).tolist(), len(indices)]):
        start, n = int(indices[first]), last - first
        if nx is None:
            yield slice(start, start + n), first, last
        else:
            y, x = divmod(start, nx)
            yield (y, slice(x, x + n)), first, last


def _fixed(text: str, size: int) -> bytes:
    """Cut a text to ``size`` bytes without cutting a character."""
    return text.encode()[:size].decode(errors="ignore").encode()
