"""What the ingest process tells the main process, beside the frames themselves.

Notices travel in order over one pipe, as msgpack. ``Started`` and ``Ended`` say at which position
of the ring they apply, so that they keep their place among the frames; the others apply at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt

from prenet4d_server.ingest.ring import Layout
from prenet4d_server.sources.base import AcquisitionStart

Level = Literal["info", "warning", "error"]
Details: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True)
class Ready:
    """The source is open."""

    address: str
    """Where it listens, or what it is connected to."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The source cannot be opened; the ingest process ends."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Started:
    """An acquisition begins: frames from position ``at`` on belong to it."""

    at: int
    acquisition_id: str
    series: str
    """The detector's own name for the acquisition."""
    frame_shape: tuple[int, int]
    dtype: str
    slots: int
    base: int
    scan_shape: tuple[int, int] | None
    expected_frames: int | None
    saturation_value: float | None
    gain: float
    detector: str
    metadata: Details
    packed_mask: bytes | None
    """The pixel mask, one bit a pixel."""

    @classmethod
    def of(cls, start: AcquisitionStart, acquisition_id: str, at: int, layout: Layout) -> Self:
        """What the source announced, as it takes its place in the ring."""
        mask = start.pixel_mask
        return cls(
            at=at,
            acquisition_id=acquisition_id,
            series=start.series,
            frame_shape=start.frame_shape,
            dtype=start.dtype.name,
            slots=layout.slots,
            base=layout.base,
            scan_shape=start.scan_shape,
            expected_frames=start.expected_frames,
            saturation_value=start.saturation_value,
            gain=start.gain,
            detector=start.detector,
            metadata=dict(start.metadata),
            packed_mask=None if mask is None else np.packbits(mask).tobytes(),
        )

    @property
    def start(self) -> AcquisitionStart:
        """What the source announced."""
        return AcquisitionStart(
            series=self.series,
            frame_shape=self.frame_shape,
            dtype=np.dtype(self.dtype),
            scan_shape=self.scan_shape,
            expected_frames=self.expected_frames,
            pixel_mask=self.pixel_mask,
            saturation_value=self.saturation_value,
            gain=self.gain,
            detector=self.detector,
            metadata=self.metadata,
        )

    @property
    def layout(self) -> Layout:
        """How the ring is laid out for this acquisition."""
        return Layout(self.frame_shape, np.dtype(self.dtype), self.slots, self.base)

    @property
    def pixel_mask(self) -> npt.NDArray[np.bool_] | None:
        """(h, w), ``True`` where a pixel can be trusted; ``None``: all can."""
        if self.packed_mask is None:
            return None
        h, w = self.frame_shape
        bits = np.unpackbits(np.frombuffer(self.packed_mask, np.uint8), count=h * w)
        return bits.reshape(h, w).astype(np.bool_)


@dataclass(frozen=True, slots=True)
class Ended:
    """The acquisition is over: no frame from position ``at`` on belongs to it."""

    at: int
    acquisition_id: str
    aborted: bool
    """It did not come to the end that the detector meant."""
    reason: str = ""
    sent: int | None = None
    """Frames, where the detector says how many it has sent."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something happened that a person should know or a counter must count."""

    level: Level
    code: str
    message: str
    acquisition_id: str = ""
    rejected: int = 0
    """Frames that were refused under ``code``."""
    shed: int = 0
    """Frames that were dropped because the ring was full."""
    details: Details = field(default_factory=dict)


Notice: TypeAlias = Ready | Failed | Started | Ended | Remark

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Ready, Failed, Started, Ended, Remark)
}


def pack(notice: Notice) -> bytes:
    """Turn a notice into bytes."""
    values = [getattr(notice, item.name) for item in fields(notice)]
    packed: bytes = msgpack.packb([type(notice).__name__, *values], unicode_errors="replace")
    return packed


def unpack(data: bytes) -> Notice:
    """Read what :func:`pack` wrote."""
    kind, *values = msgpack.unpackb(data, use_list=False)
    notice: Notice = _KINDS[kind](*values)
    return notice
