"""What DECTRIS' two stream protocols have in common: a start that may leave things unsaid.

Either protocol may keep the frame's shape or dtype to itself until the first image (Stream V1 with
header detail ``none`` says neither). The start is then held back until that image is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np

from prenet4d_server.errors import (
    BadMessage,
    BadStart,
    CorruptFrame,
    NoPixelMask,
    SequenceError,
)
from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    Busy,
    Fault,
    Pixels,
    SourceEvent,
    idle,
)
from prenet4d_server.sources.encoded import EncodedFrame, EventList
from prenet4d_server.sources.reach import Reach
from prenet4d_server.sources.zmq_source import MAX_BYTES, ZmqSource, connect

Scalar: TypeAlias = "str | int | float | bool | None"

FRAME_TYPES = {name: np.dtype(name) for name in ("uint8", "uint16", "uint32", "float32")}

_HIGH_WATER = 512
_MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a start message says."""

    series: str
    frame_shape: tuple[int, int] | None
    dtype: np.dtype[Any] | None
    expected_frames: int | None = None
    saturation_value: float | None = None
    detector: str = "DECTRIS"
    mask: EncodedFrame | None = None
    """Nonzero where a pixel cannot be trusted."""
    masks: bool = False
    """Whether the detector sends its largest value where it has no counts, as its mask says."""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


class DectrisSource(ZmqSource):
    """Connects to a DECTRIS detector's PUSH socket; the detector need not be there yet.

    Args:
        address: ``tcp://detector:port``.
        scan_shape: ``(ny, nx)``, which the detector does not know.
        gain: counts per electron.
        max_bytes: larger messages are refused.

    Raises:
        ConfigError: the address makes no sense.
    """

    copies = True

    def __init__(
        self,
        address: str,
        *,
        scan_shape: tuple[int, int] | None = None,
        gain: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__(address, max_bytes=max_bytes, high_water=_HIGH_WATER)
        self._scan_shape = scan_shape
        self._gain = gain
        self._held: Announcement | None = None

    def _attach(self) -> None:
        self._reach = Reach(self._socket, self.address)
        connect(self._socket, self.address)

    def poll(self, timeout_s: float, busy: Busy = idle) -> Sequence[SourceEvent]:
        """Return what came, in order; where nothing does, perhaps why. See ``Source.poll``."""
        events = super().poll(timeout_s, busy)
        if not events and (why := self._reach.trouble()) is not None:
            return [Fault(why)]
        return events

    def close(self) -> None:
        """Close the socket; may be called twice."""
        self._reach.close()
        super().close()

    def _begin(self, said: Announcement, events: EventList) -> None:
        """A start came."""
        if said.frame_shape is None or said.dtype is None:
            self._held = said
        else:
            self._held = None
            self._start(said, said.frame_shape, said.dtype, events)

    def _take_image(self, series: str, index: int, frame: EncodedFrame, events: EventList) -> None:
        """An image came."""
        held = self._held
        if held is not None and held.series == series:
            self._held = None
            shape, dtype = held.frame_shape or frame.shape, held.dtype or frame.dtype
            self._start(held, shape, dtype.newbyteorder("="), events)
        events.add_frame(series, index, frame)

    def _finish(self, series: str, events: EventList) -> None:
        """An end came."""
        if self._held is not None and self._held.series == series:
            self._held = None
            raise SequenceError(
                f"Series {series} ended before its first image, and its start did not say what "
                "its images are: there is nothing to keep of it."
            )
        events.add(AcquisitionEnd(series))

    def _start(
        self, said: Announcement, shape: tuple[int, int], dtype: np.dtype[Any], events: EventList
    ) -> None:
        if not all(8 <= size <= 8192 for size in shape):
            events.add_error(
                BadStart(
                    f"Series {said.series} announces frames of {text(shape[0])} × "
                    f"{text(shape[1])} pixels; "
                    "each side must have 8 to 8192."
                )
            )
            return
        mask: Pixels | None = None
        if said.mask is not None:
            try:
                mask = _valid_pixels(said.mask, shape)
            except (CorruptFrame, BadMessage) as error:
                events.add_error(
                    BadMessage(f"The pixel mask of series {said.series} is left out. {error}")
                )
        events.add(
            AcquisitionStart(
                series=said.series,
                frame_shape=shape,
                dtype=dtype,
                scan_shape=self._scan_shape,
                expected_frames=said.expected_frames,
                pixel_mask=mask,
                saturation_value=said.saturation_value,
                gain=self._gain,
                detector=said.detector,
                metadata=said.metadata,
            )
        )
        if said.masks and said.mask is None:
            events.add_error(
                NoPixelMask(
                    f"The detector masks pixels and does not say which: those of series "
                    f"{said.series} count as very bright. Set the detector's stream parameter "
                    "header_detail to all, and the mask comes with the start."
                )
            )


def scalars(fields: Mapping[Any, Any]) -> dict[str, Scalar]:
    """Keep the fields that are single values, which is what acquisition metadata can hold."""
    kept: dict[str, Scalar] = {}
    for key, value in fields.items():
        if isinstance(value, datetime):
            kept[text(key)] = value.isoformat()
        elif isinstance(value, str):
            kept[text(key)] = text(value)
        elif isinstance(value, float) or _fits_64_bits(value):
            kept[text(key)] = value
    return kept


def text(value: object) -> str:
    """The value as text of bounded length that any receiver can decode.

    CBOR has numbers that Python refuses to write out, and lists that hold each other so often that
    it would do so for ever: of anything but single values, the type is all that is said.
    """
    if not (value is None or isinstance(value, str | float) or _fits_64_bits(value)):
        value = type(value).__name__
    return str(value)[:_MAX_TEXT].encode("utf-8", "replace").decode()


def _fits_64_bits(value: object) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def positive(value: object) -> int | None:
    """The value, if it is a count; ``None`` for anything else."""
    return value if isinstance(value, int) and 0 < value < 2**63 else None


def number(value: object) -> float | None:
    """The value, if it is a positive number; ``None`` for anything else."""
    if isinstance(value, int | float) and 0 < value < 1e300:
        return float(value)
    return None


def sides(x: object, y: object) -> tuple[int, int] | None:
    """``(h, w)`` from a message's width and height; ``None`` where it does not say both.

    Raises:
        BadStart: it says something else than two integers.
    """
    if x is None or y is None:
        return None
    if not (isinstance(x, int) and isinstance(y, int)):
        raise BadStart(f"The start announces frames of {text(x)!r} × {text(y)!r} pixels.")
    return y, x


def _valid_pixels(encoded: EncodedFrame, shape: Sequence[int]) -> Pixels:
    if encoded.shape != shape:
        raise BadMessage(f"It is {encoded.shape} pixels; the frames are {shape}.")
    bits = np.empty(encoded.shape, encoded.dtype.newbyteorder("="))
    encoded.read_into(bits)
    valid: Pixels = bits == 0
    return valid
