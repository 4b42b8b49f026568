"""prenet4d's own protocol: what ``prenet4d_client.FrameSender`` sends.

Several senders may be connected; an acquisition's id tells them apart, and one waits for the other
unless that is silent for much longer than its frames ever were apart (``turns``).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate

import msgpack
import numpy as np
import numpy.typing as npt

from prenet4d_client import messages, wire
from prenet4d_client.errors import OversizeMessage, ProtocolError
from prenet4d_server.errors import BadMessage, BadStart, CorruptFrame, FrameError, WrongFrame
from prenet4d_server.sockets import KeyPair, bind, protect
from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    Busy,
    Fault,
    Indices,
    Pixels,
    SourceEvent,
    idle,
)
from prenet4d_server.sources.compression import Buffer
from prenet4d_server.sources.encoded import EventList
from prenet4d_server.sources.turns import Turns
from prenet4d_server.sources.zmq_source import MAX_BYTES, ZmqSource

_HIGH_WATER = 64
_MAX_FRAMES = 1 << 20
"""No message that was meant holds more."""


class NativeSource(ZmqSource):
    """A :class:`~prenet4d_server.sources.base.Source` that listens for ``FrameSender``.

    Args:
        address: where to listen, ``tcp://127.0.0.1:5560``.
        max_bytes: larger messages are refused.
        curve: the service's CURVE keys, where senders must know the public one.

    Raises:
        BindError: the address cannot be bound; the message says why.
    """

    copies = False
    bite = 2 << 20  # copied into the ring while it is still in the processor's cache

    def __init__(
        self, address: str, *, max_bytes: int = MAX_BYTES, curve: KeyPair | None = None
    ) -> None:
        self._curve = curve
        self._turns = Turns(most_bytes=max_bytes)
        super().__init__(address, max_bytes=max_bytes, high_water=_HIGH_WATER)

    def _attach(self) -> None:
        protect(self._socket, self._curve)
        self.address = bind(self._socket, self.address, "source.address")

    def poll(self, timeout_s: float, busy: Busy = idle) -> Sequence[SourceEvent]:
        """Return what came, in order, with neighbouring small messages joined into one block."""
        began = time.monotonic()
        events = list(super().poll(timeout_s, busy))
        return _join_blocks(events + self._turns.pass_time(time.monotonic() - began))

    def _read(self, parts: Sequence[Buffer], events: EventList) -> None:
        try:
            self._refuse_oversize(parts, OversizeMessage)
            message = wire.decode(parts, max_bytes=self._max_bytes)
            if (length := len(message.header.acquisition_id)) > wire.MAX_TEXT:
                raise OversizeMessage(
                    f"An acquisition's id has {length} characters; at most {wire.MAX_TEXT} can be "
                    "passed on."
                )
        except ProtocolError as error:
            events.add(_refusal(parts, str(error)))
            return
        event = _event(message)
        if isinstance(event, AcquisitionStart) and (why := _mask_that_does_not_fit(event)):
            events.add_error(why)
            event = replace(event, pixel_mask=None)
        size = sum(map(len, parts))
        for due in self._turns.take(message.header.publisher, event, size):
            events.add(due)


class NativeBlock:
    """A :class:`~prenet4d_server.sources.base.FrameBlock` of one or several messages' frames."""

    packed = False

    def __init__(self, series: str, indices: Indices, stacks: Sequence[Pixels]) -> None:
        self.series = series
        self.indices = indices
        self.stacks = stacks

    def read_into(self, start: int, out: Pixels) -> Sequence[tuple[int, FrameError]]:
        """Copy some of the frames; see ``FrameBlock.read_into``."""
        failed: list[tuple[int, FrameError]] = []
        stop = start + len(out)
        starts = [0, *accumulate(map(len, self.stacks))]
        number = bisect_right(starts, start) - 1
        while start < stop:
            first, stack = starts[number], self.stacks[number]
            end = min(stop, first + len(stack))
            frames = stack[start - first : end - first]
            slots, out = out[: len(frames)], out[len(frames) :]
            if frames.shape == slots.shape and frames.dtype == slots.dtype:
                np.copyto(slots, frames)
            else:
                wrong = WrongFrame(
                    f"The frames are {frames.dtype} {frames.shape[1:]}; "
                    f"their acquisition is {slots.dtype} {slots.shape[1:]}."
                )
                failed.extend((index, wrong) for index in range(start, end))
            start, number = end, number + 1
        return failed


def _event(message: wire.Message) -> SourceEvent:
    header = message.header
    if isinstance(header, messages.Frames):
        return NativeBlock(
            header.acquisition_id, message.arrays["indices"], [message.arrays["frames"]]
        )
    if isinstance(header, messages.AcquisitionStart):
        return _start(header, message.arrays.get("pixel_mask"))
    if isinstance(header, messages.AcquisitionEnd):
        reason = header.reason[: wire.MAX_TEXT]
        return AcquisitionEnd(header.acquisition_id, header.aborted, reason, header.frames)
    raise BadMessage(f"A {header.type} message is not for the service to receive.")


def _join_blocks(events: Sequence[SourceEvent]) -> list[SourceEvent]:
    joined: list[SourceEvent] = []
    run: list[NativeBlock] = []

    def close_run() -> None:
        if run:
            stacks = [stack for block in run for stack in block.stacks]
            indices = np.concatenate([block.indices for block in run])
            joined.append(NativeBlock(run[0].series, indices, stacks))
            run.clear()

    for event in events:
        if not isinstance(event, NativeBlock):
            close_run()
            joined.append(event)
        elif len(event.indices):
            if run and run[0].series != event.series:
                close_run()
            run.append(event)
    close_run()
    return joined


def _start(
    header: messages.AcquisitionStart, pixel_mask: npt.NDArray[np.bool_] | None
) -> AcquisitionStart:
    return AcquisitionStart(
        series=header.acquisition_id,
        acquisition_id=header.acquisition_id,
        frame_shape=header.frame_shape,
        dtype=np.dtype(header.dtype),
        scan_shape=header.scan_shape,
        expected_frames=header.expected_frames,
        pixel_mask=pixel_mask,
        saturation_value=header.saturation_value,
        gain=header.gain,
        detector=header.detector[: wire.MAX_TEXT],
        metadata=header.metadata,
    )


def _mask_that_does_not_fit(start: AcquisitionStart) -> BadMessage | None:
    mask = start.pixel_mask
    if mask is None or mask.shape == start.frame_shape:
        return None
    return BadMessage(
        f"The pixel mask of series {start.series} is left out. "
        f"It is {mask.shape} pixels; the frames are {start.frame_shape}."
    )


def _refusal(parts: Sequence[Buffer], why: str) -> Fault:
    """What a message that cannot be used amounts to, by what can be read of it all the same."""
    kind = bytes(parts[0][:32])
    fields: object = None
    if len(parts) > 1 and len(parts[1]) <= wire.MAX_HEADER_BYTES:
        with suppress(ValueError, TypeError, msgpack.UnpackException, RecursionError):
            fields = msgpack.unpackb(parts[1], raw=False)
    if kind == b"frames":
        match fields:
            case {"arrays": [{"shape": [int(count), *_]}, *_]} if 0 < count <= _MAX_FRAMES:
                return Fault(CorruptFrame(why), count)
        return Fault(CorruptFrame(why), 1)
    if kind == b"acquisition_start":
        match fields:
            case {"acquisition_id": str(name)} if 0 < len(name) <= wire.MAX_TEXT:
                return Fault(BadStart(why), series=name)
        return Fault(BadMessage(why), refuses_start=True)
    return Fault(BadMessage(why))
