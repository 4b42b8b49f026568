"""Frames as a detector sent them, still encoded, and the events they gather into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from prenet4d_server.errors import FrameError, IndexOutsideScan, ServiceError, WrongFrame
from prenet4d_server.sources.base import Fault, Indices, Pixels, SourceEvent
from prenet4d_server.sources.compression import Buffer, Codec, decompress, decompress_together

_MAX_INDEX = 2**63 - 1
_TOGETHER = 256
"""Frames that are decoded in one go: enough to leave the GIL alone, few enough to do again."""


class EncodedFrame(NamedTuple):
    """One frame, as it came."""

    data: Buffer
    codec: Codec
    element_size: int
    """Bytes of one element in the bit transposition; of no meaning to the other codecs."""
    shape: tuple[int, int]
    """``(h, w)`` in pixels."""
    dtype: np.dtype[Any]
    """Of the decoded bytes; its byte order may be foreign."""
    column_major: bool = False

    def read_into(self, out: Pixels) -> None:
        """Decode into ``out``, (h, w).

        Raises:
            WrongFrame: ``out`` has another shape or dtype: the frame is not of its acquisition.
            CorruptFrame: the bytes do not decode to a frame.
        """
        if self.shape != out.shape or self.dtype.newbyteorder("=") != out.dtype:
            raise WrongFrame(
                f"The frame is {self.dtype.name} {self.shape}; "
                f"its acquisition is {out.dtype.name} {out.shape}."
            )
        if self.dtype == out.dtype and not self.column_major:
            decompress(self.data, self.codec, out, self.element_size)
            return
        stored = np.empty(self.shape[::-1] if self.column_major else self.shape, self.dtype)
        decompress(self.data, self.codec, stored, self.element_size)
        out[...] = stored.T if self.column_major else stored


class EncodedBlock:
    """A :class:`~prenet4d_server.sources.base.FrameBlock` of frames that came one by one."""

    def __init__(self, series: str, indices: Indices, frames: Sequence[EncodedFrame]) -> None:
        self.series = series
        self.indices = indices
        self._frames = frames
        self.packed = bool(frames) and frames[0].codec != "none"

    def read_into(self, start: int, out: Pixels) -> Sequence[tuple[int, FrameError]]:
        """Decode some of the frames; see ``FrameBlock.read_into``."""
        failed: list[tuple[int, FrameError]] = []
        for first in range(0, len(out), _TOGETHER):
            slots = out[first : first + _TOGETHER]
            number = start + first
            if not self._read_together(self._frames[number : number + len(slots)], slots):
                failed += self._read_one_by_one(number, slots)
        return failed

    def _read_together(self, frames: Sequence[EncodedFrame], out: Pixels) -> bool:
        """Decode frames that are all of one kind, the usual case, if none is corrupt."""
        kind = frames[0][1:]
        first = frames[0]
        if (
            first.column_major
            or first.shape != out.shape[1:]
            or first.dtype != out.dtype
            or any(frame[1:] != kind for frame in frames)
        ):
            return False
        return decompress_together(
            [frame.data for frame in frames], first.codec, out, first.element_size
        )

    def _read_one_by_one(self, start: int, out: Pixels) -> Iterator[tuple[int, FrameError]]:
        for number, slot in enumerate(out, start):
            try:
                self._frames[number].read_into(slot)
            except FrameError as error:
                yield number, error


class EventList:
    """Events in the order in which they came, with neighbouring frames gathered into blocks."""

    def __init__(self) -> None:
        self._events: list[SourceEvent] = []
        self._series = ""
        self._indices: list[int] = []
        self._frames: list[EncodedFrame] = []

    def add(self, event: SourceEvent) -> None:
        """Append an event."""
        self._close_block()
        self._events.append(event)

    def add_frame(self, series: str, index: int, frame: EncodedFrame) -> None:
        """Append a frame to the block of those before it, if they are of the same series.

        Raises:
            IndexOutsideScan: ``index`` cannot be one.
        """
        if not 0 <= index <= _MAX_INDEX:
            raise IndexOutsideScan("A frame's number is below 0, or has more than 63 bits.")
        if series != self._series:
            self._close_block()
            self._series = series
        self._indices.append(index)
        self._frames.append(frame)

    def add_error(self, error: ServiceError) -> None:
        """Append the fault that an error amounts to: a :class:`FrameError` costs one frame."""
        self.add(Fault(error, frames=int(isinstance(error, FrameError))))

    def take(self) -> list[SourceEvent]:
        """Return all events so far."""
        self._close_block()
        events, self._events = self._events, []
        return events

    def _close_block(self) -> None:
        if self._frames:
            indices = np.array(self._indices, np.int64)
            self._events.append(EncodedBlock(self._series, indices, self._frames))
            self._indices, self._frames = [], []
