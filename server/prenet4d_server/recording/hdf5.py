"""A recording in HDF5, laid out so that HyperSpy, py4DSTEM, LiberTEM and NeXus programs open it.

::

    /Experiments/corrected/data   (ny, nx, h, w) float32, or (n, h, w) where no scan shape is known
    /Experiments/aligned/data     the same, where asked for
    /entry                        the same for NeXus: patterns, title, times, instrument, process
    /prenet4d/center, dose, …     what was found at each probe position, (ny, nx[, 2]) or (n[, 2])
    /prenet4d/received            (ny, nx) or (n): whether a pattern came
    /prenet4d/coverage            (h, w): the fraction of the patterns with a source at each pixel
    /prenet4d/pixel_mask          (h, w): where raw pixels could be trusted, if the detector said so
    /prenet4d/batches, events     one row for each batch of telemetry and each event
    /prenet4d/acquisition         what was announced at its start, as attributes
    /prenet4d/provenance          JSON: versions, networks' hashes, settings, calibration at start

A group of patterns under ``Experiments`` is a HyperSpy signal and a py4DSTEM (EMD 1.0) datacube at
once: these put their marks in different attributes and side by side. HyperSpy has names that NeXus
does not allow, so ``/entry`` has the datasets once more, as links, under names of its own. NeXus'
definition for microscopes, NXem, demands more of the specimen and the instrument than a detector's
stream knows; the entry keeps to the base classes, which every NeXus program reads. The attributes
of ``/prenet4d`` say which programs wrote the file, whether it is ``complete``, that is, holds the
acquisition to its regular end, the ``reason`` why not, and what became of the frames. A detector
may end early: ``frames_received`` beside ``expected_frames`` of the acquisition tells.

It is written in HDF5's SWMR mode: a reader that opens it with ``swmr=True`` follows it, and all up
to the last flush survives the writer's death. Until it is closed it opens in no other way; what a
killed writer leaves opens as usual after ``h5clear -s FILE`` (HDF5's own tool, in Debian's package
hdf5-tools). Nothing can be created in that mode, so everything is there from the start, and what
changes is overwritten.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from prenet4d_server.files.base import RECORDING
from prenet4d_server.recording import layout
from prenet4d_server.recording.layout import (
    Acquisition,
    Array,
    Compression,
    Fill,
    Indices,
    StoreOptions,
    Table,
    plain,
    removed,
)

POSITIONS = 4
"""Neighbouring probe positions in a chunk: more make single patterns slow to read."""
_FILTERS: dict[Compression, Mapping[str, Any]] = {
    "none": {},
    "bslz4": dict(hdf5plugin.Bitshuffle(cname="lz4")),
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
}
_TEXT_BYTES = 512
"""Texts that change later have a fixed size."""
_LONG_NAMES = {
    "y": "scan, slow (pixels)",
    "x": "scan, fast (pixels)",
    "frame": "frame number",
    "ky": "detector row (pixels)",
    "kx": "detector column (pixels)",
}


class Hdf5Store:
    """One acquisition's HDF5 file.

    Args:
        path: the file; it must not exist, unless it is to be replaced.
        acquisition: what is known of it.
        options: how it is to be written.
    """

    def __init__(self, path: Path, acquisition: Acquisition, options: StoreOptions) -> None:
        scan = acquisition.scan_shape
        self._nx = scan[1] if scan else None
        self._file = h5py.File(
            path,
            "w" if options.overwrite else "x",
            # The oldest form of file that has SWMR, so that most programs know it.
            libver=("v110", "v110"),
            # Some network disks have no locks, and a new file is nobody else's.
            locking=None if options.overwrite else False,
        )
        _create(self._file, acquisition, options)
        self._ours = self._file["prenet4d"]
        self._data = {name: self._file[f"Experiments/{name}/data"] for name in options.content}
        self._file.swmr_mode = True

    def grow(self, length: int) -> None:
        """Make room for so many positions."""
        for data in self._data.values():
            if data.shape[0] < length:
                data.resize(length, axis=0)

    def write_patterns(self, name: str, indices: Indices, patterns: Array) -> None:
        """Write (n, h, w) patterns of the kind ``name`` at their positions."""
        data = self._data[name]
        for place, first, last in _runs(indices, self._nx):
            data[place] = patterns[first:last]

    def write_map(self, name: str, values: Array, start: int, stop: int) -> None:
        """Write positions ``start`` to ``stop`` of a map, or the scan lines that they lie in."""
        data = self._ours[name]
        if self._nx is None:
            if data.shape[0] < stop:
                data.resize(stop, axis=0)
            data[start:stop] = values[start:stop]
        else:
            lines = slice(start // self._nx, (stop - 1) // self._nx + 1)
            data[lines] = values.reshape(data.shape)[lines]

    def write_coverage(self, coverage: Array) -> None:
        """Write the (h, w) fraction of the patterns with a source at each pixel."""
        self._ours["coverage"][:] = coverage

    def append(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows of ``BATCH`` or ``EVENT``."""
        data = self._ours[table]
        if table == "events":
            sizes = [layout.EVENT[name].itemsize for name in ("level", "code", "message")]
            rows = [
                (when, *(_fixed(text, size) for text, size in zip(texts, sizes, strict=True)))
                for when, *texts in rows
            ]
        have = len(data)
        data.resize(have + len(rows), axis=0)
        data[have:] = np.array(rows, data.dtype)

    def flush(self) -> None:
        """Let readers see all of it."""
        if self._nx is None:
            for name, data in self._data.items():
                signal, length = self._file[f"Experiments/{name}"], data.shape[0]
                signal["axis-0"].attrs.modify("size", length)
                have = len(signal["dim0"])
                if have < length:
                    signal["dim0"].resize(length, axis=0)
                    signal["dim0"][have:] = np.arange(have, length)
        self._file.flush()
        if not os.fstat(self._file.id.get_vfd_handle()).st_nlink:  # it may have another name by now
            raise removed()

    def close(self, ending: Mapping[str, Any]) -> None:
        """Write how it ended, and close the file."""
        try:
            for name, value in ending.items():
                if name == "end_time":
                    self._file["entry/end_time"][()] = _fixed(value, _TEXT_BYTES)
                else:
                    text = isinstance(value, str)
                    self._ours.attrs.modify(
                        name, np.bytes_(_fixed(value, _TEXT_BYTES)) if text else value
                    )
            self._file.flush()
        finally:
            self._file.close()


def _create(file: h5py.File, acquisition: Acquisition, options: StoreOptions) -> None:
    """Make everything that will be in the file; nothing can be made once it is in SWMR mode."""
    program = f"prenet4d {version('prenet4d')}"
    file.attrs.update(
        {
            "file_format": "HyperSpy",
            "file_format_version": "3.1",
            "emd_group_type": "file",
            "version_major": 1,
            "version_minor": 0,
            "UUID": str(uuid.uuid4()),
            "authoring_program": program,
            "authoring_user": "",
            "NX_class": "NXroot",
            "default": "entry",
        }
    )
    experiments = file.create_group("Experiments")
    experiments.attrs.update(
        {
            "emd_group_type": "root",
            "python_class": "Root",
        }
    )
    ours = file.create_group("prenet4d")
    entry = file.create_group("entry")
    entry.attrs.update({"NX_class": "NXentry", "default": options.content[0]})
    _describe_entry(entry, ours, acquisition)
    for name in options.content:
        signal = experiments.create_group(name)
        _create_signal(signal, acquisition, _FILTERS[options.compression], options.fill)
        _link_plot(entry.create_group(name), signal)
    ours.attrs.update(
        {
            "format": RECORDING,
            "format_version": 2,
            "program": program,
            "python": platform.python_version(),
            "h5py": h5py.version.version,
            "hdf5": h5py.version.hdf5_version,
            "numpy": np.__version__,
            "recording_started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fill": options.fill,
            "complete": False,
            **{f"frames_{name}": -1 for name in layout.COUNTERS},
        }
    )
    text = f"S{_TEXT_BYTES}"
    ours.attrs.create("reason", b"the recorder has not closed this file", dtype=text)
    ours.attrs.create("frames_rejected_by_reason", b"{}", dtype=text)
    _create_maps(ours, acquisition)
    for name, dtype, meaning in (
        ("batches", layout.BATCH, layout.BATCHES),
        ("events", layout.EVENT, layout.EVENTS),
    ):
        table = ours.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(256,))
        table.attrs["description"] = meaning
    if acquisition.pixel_mask is not None:
        mask = ours.create_dataset("pixel_mask", data=acquisition.pixel_mask)
        mask.attrs["description"] = layout.PIXEL_MASK
    _create_acquisition(ours.create_group("acquisition"), acquisition)


def _describe_entry(entry: h5py.Group, ours: h5py.Group, acquisition: Acquisition) -> None:
    """What NeXus programs show of the whole: title, times, detector, and what made it."""
    start = acquisition.start
    began = datetime.fromtimestamp(start.time, UTC) if start else datetime.now(UTC)
    entry["title"] = f"Acquisition {plain(acquisition.id)}, corrected by prenet4d"
    entry["entry_identifier"] = plain(acquisition.id)
    entry["start_time"] = began.isoformat()
    entry.create_dataset("end_time", data=np.bytes_(began.isoformat()), dtype=f"S{_TEXT_BYTES}")
    entry["program_name"] = "prenet4d"
    detector = entry.create_group("instrument/detector")
    entry["instrument"].attrs["NX_class"] = "NXinstrument"
    detector.attrs["NX_class"] = "NXdetector"
    if start is not None:
        detector["description"] = plain(start.detector)
        if start.saturation_value is not None:
            detector["saturation_value"] = start.saturation_value
    provenance = json.dumps(start.provenance if start else {}, indent=1, default=str)
    ours["provenance"] = plain(provenance)
    ours["provenance"].attrs["description"] = (
        "JSON: versions, networks' hashes, configuration, and the calibration at the acquisition's "
        "start; what was taken out of the patterns from then on stands in batches"
    )
    process = entry.create_group("process")
    process.attrs["NX_class"] = "NXprocess"
    process["program"] = "prenet4d"
    process["version"] = version("prenet4d")
    process["date"] = began.isoformat()
    note = process.create_group("provenance")
    note.attrs["NX_class"] = "NXnote"
    note["type"] = "application/json"
    note["data"] = ours["provenance"]


def _link_plot(plot: h5py.Group, signal: h5py.Group) -> None:
    """The patterns of a HyperSpy signal as a NeXus plot."""
    dims = [signal[f"dim{axis}"] for axis in range(signal["data"].ndim)]
    names = [dim.attrs["name"] for dim in dims]
    plot["data"] = signal["data"]
    for name, dim in zip(names, dims, strict=True):
        plot[name] = dim
    plot.attrs.update(
        {
            "NX_class": "NXdata",
            "signal": "data",
            "axes": names,
            **{f"{name}_indices": axis for axis, name in enumerate(names)},
        }
    )


def _create_signal(
    group: h5py.Group, acquisition: Acquisition, filters: Mapping[str, Any], fill: Fill
) -> None:
    """A HyperSpy signal and an EMD 1.0 array, both of the same dataset."""
    scan = acquisition.scan_shape
    h, w = acquisition.frame_shape
    navigation = ("y", "x") if scan else ("frame",)
    data = group.create_dataset(
        "data",
        (*(scan or (0,)), h, w),
        np.float32,
        maxshape=(*(scan or (None,)), h, w),
        chunks=_chunk(scan, (h, w)),
        fillvalue=0 if fill == "zero" else np.nan,
        **filters,
    )
    data.attrs.update(
        {"units": "counts", "description": layout.PATTERNS[group.name.rpartition("/")[2]]}
    )
    group.attrs.update(
        {
            "emd_group_type": "array",
            "python_class": "DataCube" if scan else "Array",
            "package": "hyperspy",
            "package_version": "2.0",
        }
    )
    for axis, name in enumerate((*navigation, "ky", "kx")):
        group.create_group(f"axis-{axis}").attrs.update(
            {
                "_type": "UniformDataAxis",
                "name": name,
                "navigate": axis < len(navigation),
                "is_binned": False,
                "offset": 0.0,
                "scale": 1.0,
                "size": data.shape[axis],
                "units": "px",
            }
        )
        grows = data.maxshape[axis] is None
        dim = group.create_dataset(
            f"dim{axis}",
            data=np.arange(data.shape[axis]),
            maxshape=(None,) if grows else None,
            chunks=(4096,) if grows else None,
        )
        dim.attrs.update({"name": name, "units": "pixels", "long_name": _LONG_NAMES[name]})
    kind = group.name.rsplit("/", 1)[-1]
    title = f"{kind} patterns of acquisition {plain(acquisition.id)}"
    group.create_group("metadata/General").attrs["title"] = title
    group.create_group("metadata/Signal").attrs["signal_type"] = ""
    group.create_group("original_metadata")
    group.create_group("learning_results")


def _chunk(scan: tuple[int, int] | None, frame_shape: tuple[int, int]) -> tuple[int, ...]:
    if scan is None:
        return layout.chunk(POSITIONS, frame_shape)
    return (1, *layout.chunk(min(POSITIONS, scan[1]), frame_shape))


def _create_maps(group: h5py.Group, acquisition: Acquisition) -> None:
    scan = acquisition.scan_shape
    for name, map_ in layout.MAPS.items():
        lines = (min(scan[0], max(1, 16384 // scan[1])), scan[1]) if scan else (4096,)
        data = group.create_dataset(
            name,
            (*(scan or (0,)), *map_.shape),
            map_.dtype,
            maxshape=(*(scan or (None,)), *map_.shape),
            chunks=(*lines, *map_.shape),
            fillvalue=map_.empty,
        )
        data.attrs.update({"units": map_.unit, "description": map_.meaning})
    coverage = group.create_dataset("coverage", data=np.zeros(acquisition.frame_shape, np.float32))
    coverage.attrs["description"] = layout.COVERAGE


def _create_acquisition(group: h5py.Group, acquisition: Acquisition) -> None:
    group.attrs["acquisition_id"] = plain(acquisition.id)
    metadata = group.create_group("metadata")
    start = acquisition.start
    if start is None:
        return
    known = start.model_dump(
        exclude={"arrays", "protocol", "version", "type", "metadata", "provenance"}
    )
    for holder, pairs in ((group, known), (metadata, start.metadata)):
        for name, value in pairs.items():
            if name and value is not None:
                holder.attrs[plain(name)] = plain(value) if isinstance(value, str) else value


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
