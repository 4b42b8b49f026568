"""How a recorded file is laid out, so that HyperSpy, py4DSTEM and LiberTEM all open it.

::

    /Experiments/corrected/data   (ny, nx, h, w) float32, or (n, h, w) where no scan shape is known
    /Experiments/aligned/data     the same, where asked for
    /prenet4d/center, dose, …     what was found at each probe position, (ny, nx[, 2]) or (n[, 2])
    /prenet4d/received            (ny, nx) or (n): whether a pattern came
    /prenet4d/coverage            (h, w): the fraction of the patterns with a source at each pixel
    /prenet4d/pixel_mask          (h, w): where raw pixels could be trusted, if the detector said so
    /prenet4d/batches, events     one row for each batch of telemetry and each event
    /prenet4d/acquisition         what was announced at its start, as attributes

A group under ``Experiments`` is a HyperSpy signal, a py4DSTEM (EMD 1.0) datacube and a NeXus plot
at once: these three put their marks in different attributes and side by side. Other programs take
the dataset by its path. The attributes of ``/prenet4d`` say which programs wrote the file, whether
it is ``complete``, the ``reason`` why not, and what became of the frames.

A pattern is a chunk of its own: it is written once, whole, and positions that never come take no
space.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt
from prenet4d_client.messages import AcquisitionStart

Compression = Literal["none", "bslz4", "gzip"]
Fill = Literal["zero", "nan"]
Array: TypeAlias = npt.NDArray[Any]

# Of 256 × 256 patterns, one core of a busy server wrote 2,600 a second uncompressed, 1,700 in
# bitshuffle + LZ4 (0.76 of the size; 0.18 for low-dose aligned ones) and 220 in gzip (0.74; 0.25).
_FILTERS: dict[Compression, Mapping[str, Any]] = {
    "none": {},
    "bslz4": dict(hdf5plugin.Bitshuffle(cname="lz4")),
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
}


@dataclass(frozen=True, slots=True)
class Acquisition:
    """What is known of an acquisition when its file is made."""

    id: str
    frame_shape: tuple[int, int]
    """``(h, w)`` in pixels."""
    scan_shape: tuple[int, int] | None
    """``(ny, nx)``; ``None`` makes a file that grows."""
    start: AcquisitionStart | None = None
    """Its announcement, where one came."""
    pixel_mask: npt.NDArray[np.bool_] | None = None
    """(h, w), ``True`` where a raw pixel can be trusted."""


@dataclass(frozen=True, slots=True)
class Map:
    """What one probe position has of something."""

    dtype: str
    shape: tuple[int, ...]
    empty: float
    """The value where nothing came."""
    unit: str

    def array(self, positions: int) -> Array:
        """(positions, …) empty values."""
        return np.full((positions, *self.shape), self.empty, self.dtype)


MAPS = {
    "center": Map("float32", (2,), np.nan, "px, [cy, cx]"),
    "center_sigma": Map("float32", (2,), np.nan, "px, one sigma"),
    "tracked": Map("float32", (2,), np.nan, "px, [cy, cx]"),
    "tracked_sigma": Map("float32", (2,), np.nan, "px, one sigma"),
    "shift": Map("float32", (2,), np.nan, "px, [y, x], as applied"),
    "dose": Map("float32", (), np.nan, "electrons"),
    "flags": Map("uint8", (), 0, "sums of FrameFlag"),
    "received": Map("bool", (), False, "whether a pattern came"),
}
COUNTERS = ("received", "corrected", "rejected", "shed", "in_flight")
BATCH = np.dtype(
    [
        ("time", "f8"),
        ("batch", "i8"),
        ("first_index", "i8"),
        ("frames", "i8"),
        ("reference_cy", "f8"),
        ("reference_cx", "f8"),
        ("ratio", "f8"),
        ("theta", "f8"),
        ("ratio_sigma", "f8"),
        ("theta_sigma", "f8"),
        ("state", "S16"),
        ("patterns_averaged", "i8"),
        ("frames_per_second", "f8"),
        ("backlog", "i8"),
        ("latency_p50_ms", "f8"),
        ("latency_p99_ms", "f8"),
        *((name, "i8") for name in COUNTERS),
    ]
)
EVENT = np.dtype([("time", "f8"), ("level", "S8"), ("code", "S64"), ("message", "S512")])
REASON_BYTES = 512
"""Texts that change later have a fixed size: the attributes ``reason`` and
``frames_rejected_by_reason``."""


def create(
    file: h5py.File,
    acquisition: Acquisition,
    *,
    content: tuple[str, ...],
    compression: Compression,
    fill: Fill,
) -> None:
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
            "default": "Experiments",
        }
    )
    experiments = file.create_group("Experiments")
    experiments.attrs.update(
        {
            "emd_group_type": "root",
            "python_class": "Root",
            "NX_class": "NXentry",
            "default": content[0],
        }
    )
    for name in content:
        signal = experiments.create_group(name)
        _create_signal(signal, acquisition, _FILTERS[compression], fill)
    ours = file.create_group("prenet4d")
    ours.attrs.update(
        {
            "format": "prenet4d recording",
            "format_version": 1,
            "program": program,
            "python": platform.python_version(),
            "h5py": h5py.version.version,
            "hdf5": h5py.version.hdf5_version,
            "numpy": np.__version__,
            "recording_started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fill": fill,
            "complete": False,
            **{f"frames_{name}": -1 for name in COUNTERS},
        }
    )
    text = f"S{REASON_BYTES}"
    ours.attrs.create("reason", b"the recorder has not closed this file", dtype=text)
    ours.attrs.create("frames_rejected_by_reason", b"{}", dtype=text)
    _create_maps(ours, acquisition)
    for name, dtype in (("batches", BATCH), ("events", EVENT)):
        ours.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(256,))
    if acquisition.pixel_mask is not None:
        ours.create_dataset("pixel_mask", data=acquisition.pixel_mask)
    _create_acquisition(ours.create_group("acquisition"), acquisition)


def _create_signal(
    group: h5py.Group, acquisition: Acquisition, filters: Mapping[str, Any], fill: Fill
) -> None:
    """A HyperSpy signal, an EMD 1.0 array and a NeXus plot, all of the same dataset."""
    scan = acquisition.scan_shape
    h, w = acquisition.frame_shape
    navigation = ("y", "x") if scan else ("frame",)
    data = group.create_dataset(
        "data",
        (*(scan or (0,)), h, w),
        np.float32,
        maxshape=(*(scan or (None,)), h, w),
        chunks=(*(1 for _ in navigation), h, w),
        fillvalue=0 if fill == "zero" else np.nan,
        **filters,
    )
    data.attrs["units"] = "counts"
    group.attrs.update(
        {
            "emd_group_type": "array",
            "python_class": "DataCube" if scan else "Array",
            "NX_class": "NXdata",
            "signal": "data",
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
        # EMD continues the first two values of an axis to its length.
        dim = group.create_dataset(f"dim{axis}", data=np.arange(2))
        dim.attrs.update({"name": name, "units": "pixels"})
    kind = group.name.rsplit("/", 1)[-1]
    title = f"{kind} patterns of acquisition {_plain(acquisition.id)}"
    group.create_group("metadata/General").attrs["title"] = title
    group.create_group("metadata/Signal").attrs["signal_type"] = ""
    group.create_group("original_metadata")
    group.create_group("learning_results")


def _create_maps(group: h5py.Group, acquisition: Acquisition) -> None:
    scan = acquisition.scan_shape
    for name, map_ in MAPS.items():
        lines = (min(scan[0], max(1, 16384 // scan[1])), scan[1]) if scan else (4096,)
        data = group.create_dataset(
            name,
            (*(scan or (0,)), *map_.shape),
            map_.dtype,
            maxshape=(*(scan or (None,)), *map_.shape),
            chunks=(*lines, *map_.shape),
            fillvalue=map_.empty,
        )
        data.attrs["units"] = map_.unit
    group.create_dataset("coverage", data=np.zeros(acquisition.frame_shape, np.float32))


def _create_acquisition(group: h5py.Group, acquisition: Acquisition) -> None:
    group.attrs["acquisition_id"] = _plain(acquisition.id)
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
                holder.attrs[_plain(name)] = _plain(value) if isinstance(value, str) else value


def _plain(text: str) -> str:
    """HDF5's texts end at a NUL; the wire's may have one in them."""
    return text.replace("\0", " ")
