"""What a recording holds, whatever the kind of file it is in.

For each probe position that a pattern came for: the pattern, and what was found in it. For each
batch and each event, a row. For the acquisition: what was announced, where it comes from, and how
it ended. ``hdf5`` and ``zarr`` beside this module say where each of them is.

Patterns lie in chunks of a few neighbouring probe positions times a part of the pattern. So whoever
reads one pattern reads little more than that, and whoever reads one place of all patterns, for a
virtual image of the scan, does not read all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_client.messages import AcquisitionStart, FrameFlag

Compression = Literal["none", "bslz4", "gzip"]
Fill = Literal["zero", "nan"]
Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]
Table = Literal["batches", "events"]

_CHUNK_SIDE = 96
"""Pixels; smaller parts make too many chunks, larger ones make virtual detectors read too much."""


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
    meaning: str
    """For whoever has the file alone: a sentence without its full stop."""

    def array(self, positions: int) -> Array:
        """(positions, …) empty values."""
        return np.full((positions, *self.shape), self.empty, self.dtype)


_PIXELS = "pixel centers at integers, [0, 0] the first pixel's"
MAPS = {
    "center": Map(
        "float32", (2,), np.nan, "px",
        f"[cy, cx] of the direct beam in the raw frame, of this frame alone; {_PIXELS}",
    ),
    "center_sigma": Map("float32", (2,), np.nan, "px", "one standard deviation of it, [y, x]"),
    "tracked": Map(
        "float32", (2,), np.nan, "px",
        f"[cy, cx] of the direct beam in the raw frame, filtered over the scan; {_PIXELS}",
    ),
    "tracked_sigma": Map("float32", (2,), np.nan, "px", "one standard deviation of it, [y, x]"),
    "shift": Map(
        "float32", (2,), np.nan, "px",
        "[y, x] that the pattern was moved by: reference center minus the center in use",
    ),
    "dose": Map("float32", (), np.nan, "electrons", "electrons in the raw frame"),
    "flags": Map(
        "uint8", (), 0, "",
        "a sum of " + ", ".join(f"{flag.value} {flag.name}" for flag in FrameFlag).lower(),
    ),
    "received": Map("bool", (), False, "", "whether a pattern came"),
}  # fmt: skip
_MOVED = "the direct beam lies at the reference center, the elliptical distortion is taken out"
PATTERNS = {
    "corrected": f"denoised counts; {_MOVED}",
    "aligned": f"raw counts; {_MOVED}",
}
COVERAGE = "the fraction of the patterns with a source at each pixel"
PIXEL_MASK = "where raw pixels could be trusted, as the detector said"
BATCHES = (
    "one row for each batch of frames; time: seconds since 1970, UTC; reference_cy, reference_cx: "
    "where patterns are centered, px; ratio: a/b of the elliptical distortion that is taken out; "
    "theta: direction of its major axis, radians from +x (columns) toward +y (rows); …_sigma: one "
    "standard deviation; received to in_flight: frames of the acquisition so far"
)
EVENTS = "what the service told meanwhile; time: seconds since 1970, UTC"
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


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How an acquisition is to be written."""

    content: tuple[str, ...]
    """Which patterns; the first is the kind that viewers show first."""
    compression: Compression
    """Of the patterns."""
    fill: Fill
    """What pixels without a source, and positions without a pattern, are."""
    overwrite: bool
    """Replace what exists."""


class Store(Protocol):
    """The file of one acquisition; any method raises OSError when the disk fails it."""

    def grow(self, length: int) -> None:
        """Make room for so many positions, where no scan shape is known."""
        ...

    def write_patterns(self, name: str, indices: Indices, patterns: Array) -> None:
        """Write (n, h, w) patterns of the kind ``name`` at their positions, all of them inside."""
        ...

    def write_map(self, name: str, values: Array, start: int, stop: int) -> None:
        """Write positions ``start`` to ``stop`` of a map; ``values`` has all positions."""
        ...

    def write_coverage(self, coverage: Array) -> None:
        """Write the (h, w) fraction of the patterns with a source at each pixel."""
        ...

    def append(self, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows of ``BATCH`` or ``EVENT``."""
        ...

    def flush(self) -> None:
        """Let readers see all of it.

        Raises:
            FileNotFoundError: there is nothing to see: somebody removed the file.
        """
        ...

    def close(self, ending: Mapping[str, Any]) -> None:
        """Write ``complete``, ``reason``, ``frames_…`` and ``end_time``, and close the file."""
        ...


def chunk(positions: int, frame_shape: tuple[int, int]) -> tuple[int, int, int]:
    """A chunk of so many probe positions: its positions, rows and columns of a pattern."""
    return (positions, _part(frame_shape[0]), _part(frame_shape[1]))


def _part(side: int) -> int:
    """Into an odd number of parts, so that the direct beam lies in the middle one."""
    parts = 1
    while side > parts * _CHUNK_SIDE:
        parts += 2
    return -(-side // parts)


def removed() -> FileNotFoundError:
    """What a store raises whose file is gone: the system lets one write on, to nowhere."""
    return FileNotFoundError(errno.ENOENT, "the recording was removed while it was being made")


def plain(text: str) -> str:
    """HDF5's texts end at a NUL; the wire's may have one in them."""
    return text.replace("\0", " ")
