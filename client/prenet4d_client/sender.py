"""``FrameSender``: hand raw frames to the service."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from types import TracebackType
from typing import Any, Self, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import zmq
from pydantic import ValidationError

from prenet4d_client._sockets import (
    LEAST_ANSWER_S,
    check_usable,
    checked_count,
    checked_timeout,
    connect,
    hand_over,
    milliseconds,
    opened_here,
)
from prenet4d_client.errors import (
    InvalidUse,
    MalformedMessage,
    NoAnswer,
    OversizeMessage,
    Prenet4dError,
)
from prenet4d_client.messages import AcquisitionEnd, AcquisitionStart, FrameDType, Frames, Header
from prenet4d_client.wire import MAX_TEXT, check_metadata, encode, explain, lz4_block

_log = logging.getLogger(__name__)

Metadata: TypeAlias = Mapping[str, str | int | float | bool | None]

_DTYPES = " or ".join(get_args(FrameDType))
_LOOK_EVERY_S = 0.1
"""How often it is looked whether the connection broke; at the end always."""
_MESSAGE_BYTES = 16 << 20
"""Of frames in one message, unless a single one is larger; up to 32 MB the C library learns."""


class FrameSender:
    """Sends acquisitions of raw frames to the service's ingest socket.

    ::

        with FrameSender("tcp://127.0.0.1:5560") as sender:
            sender.start(frame_shape=(256, 256), dtype="uint16", scan_shape=(64, 64))
            for frame in camera:
                sender.send(frame)

    Leaving the block ends the acquisition; leaving it by an exception tells the service that it was
    aborted. Several acquisitions may follow each other over one sender: :meth:`end` one, then
    :meth:`start` the next. When the service cannot keep up, :meth:`send` waits: nothing is lost and
    at most ``queue`` messages wait here.

    Where the connection breaks in the middle of an acquisition, what was on its way is lost, and a
    service that was started again knows nothing of the acquisition and refuses the rest. That is
    logged, and counted in ``breaks``; to go on, :meth:`end` it and :meth:`start` another. Where it
    breaks after the acquisition's end, the last frames may still have been on their way.

    Of several senders, the service reads one to the end of its acquisition before the next one's
    begins. To be used from one thread at a time.

    Args:
        address: the service's ingest address.
        timeout: seconds to wait for a service that is absent or does not take more, before
            :class:`NoAnswer` is raised.
        queue: how many messages may wait in this process.
        lz4: compress the frames (needs the extra ``lz4``).
        server_key: the service's public CURVE key (Z85), where it has one.

    Raises:
        MissingCodec: ``lz4`` was asked for and is not installed.
        InvalidUse: the address, the timeout, the key or the queue cannot be one.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5560",
        *,
        timeout: float = 10.0,
        queue: int = 32,
        lz4: bool = False,
        server_key: str | bytes | None = None,
    ) -> None:
        if lz4:
            lz4_block()
        # glibc gives every sent copy back to the kernel, to get it again page by page for the next
        # one, until it has seen a larger block come and go: a third of a sender's time.
        bytearray(_MESSAGE_BYTES)
        self.address = address
        self.breaks = 0
        """How often the connection broke in, or since, the running or the last acquisition."""
        self._timeout = checked_timeout(timeout)
        self._lz4 = lz4
        self._publisher = uuid.uuid4().hex
        self._sequences: dict[str, int] = {}
        self._start: AcquisitionStart | None = None
        self._next_index = 0
        self._sent = 0
        self._look_at = 0.0
        self._socket = connect(
            zmq.PUSH,
            address,
            usual_port=5560,
            server_key=server_key,
            options={
                zmq.SNDHWM: checked_count("queue", queue),
                zmq.SNDTIMEO: milliseconds(timeout),
                # Without it, messages for a service that is not there would pile up and be lost.
                zmq.IMMEDIATE: 1,
            },
        )
        self._disconnections = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
        )
        # What was sent by a sender that nobody closes is handed over all the same: when it is
        # forgotten, and, unless another thread may be using it then, when the program ends.
        self._forgotten = weakref.finalize(
            self, hand_over, self._socket, self._disconnections, max(timeout, LEAST_ANSWER_S)
        )
        self._forgotten.atexit = threading.current_thread() is threading.main_thread()

    def start(
        self,
        *,
        frame_shape: tuple[int, int],
        dtype: npt.DTypeLike,
        scan_shape: tuple[int, int] | None = None,
        expected_frames: int | None = None,
        pixel_mask: npt.ArrayLike | None = None,
        saturation_value: float | None = None,
        gain: float = 1.0,
        detector: str = "native",
        metadata: Metadata | None = None,
        acquisition_id: str | None = None,
    ) -> str:
        """Announce an acquisition.

        Args:
            frame_shape: ``(h, w)`` in pixels.
            dtype: uint8, uint16, uint32 or float32.
            scan_shape: ``(ny, nx)``; frame ``i`` belongs to probe position ``(i // nx, i % nx)``.
            expected_frames: how many will come, where no ``scan_shape`` says it.
            pixel_mask: (h, w), true where a pixel can be trusted; ``None``: all can.
            saturation_value: counts at and above which a pixel is saturated.
            gain: counts per electron.
            detector: where the frames come from, for people to read.
            metadata: whatever else is to be kept with the acquisition, up to 256 KiB.
            acquisition_id: a name for it that no other has; ``None`` makes one.

        Returns:
            The acquisition's id, which everything the service says about it carries.

        Raises:
            InvalidUse: one of these cannot be, or the last acquisition has not ended.
            NoAnswer: no service took the message within ``timeout``.
        """
        if self._start is not None:
            raise InvalidUse("The last acquisition has not ended: call end() before start().")
        if not isinstance(metadata, Mapping | None):
            raise InvalidUse(
                f"metadata is a {type(metadata).__name__}: give a map of names to values."
            )
        for name, value in (metadata or {}).items():
            if not isinstance(value, str | int | float | bool | np.generic | None):
                raise InvalidUse(
                    f"metadata[{name!r}] is a {type(value).__name__}: "
                    "its values must be text, numbers, true, false or None."
                )
        try:
            header = AcquisitionStart(
                **self._identity("acquisition_start", acquisition_id or _new_id()),
                frame_shape=frame_shape,
                dtype=cast("FrameDType", _dtype_name(dtype)),
                scan_shape=scan_shape,
                expected_frames=expected_frames,
                saturation_value=saturation_value,
                gain=gain,
                detector=detector,
                metadata=dict(metadata or {}),
            )
            check_metadata(header.metadata)
        except ValidationError as error:
            raise InvalidUse(f"This acquisition cannot be: {explain(error)}.") from None
        except (MalformedMessage, OversizeMessage) as error:
            raise InvalidUse(str(error)) from None
        if len(header.acquisition_id) > MAX_TEXT:
            raise InvalidUse(
                f"acquisition_id has {len(header.acquisition_id)} characters; at most {MAX_TEXT} "
                "can be passed on."
            )
        arrays: dict[str, npt.NDArray[Any]] = {}
        if pixel_mask is not None:
            arrays["pixel_mask"] = _array("The pixel mask", pixel_mask, np.bool_)
            if arrays["pixel_mask"].shape != header.frame_shape:
                raise InvalidUse(
                    f"The pixel mask has shape {arrays['pixel_mask'].shape}; "
                    f"the frames have {header.frame_shape}."
                )
        self._send(header, arrays)
        self._watch()  # what broke before it is none of this acquisition's
        self.breaks = 0
        self._start, self._next_index, self._sent = header, 0, 0
        return header.acquisition_id

    def send(self, frames: npt.NDArray[Any], indices: npt.ArrayLike | None = None) -> None:
        """Send one frame or many.

        Many at once are faster; where they are more than 16 MiB, they go in several messages. The
        frames are copied before this returns.

        Args:
            frames: (h, w) or (n, h, w), of the announced shape and dtype, in counts.
            indices: the number of the frame, or of each of the n, within the acquisition, from 0;
                ``None`` goes on counting from the last one sent.

        Raises:
            InvalidUse: no acquisition was started, or the frames are not what it announced.
            NoAnswer: the service took nothing for ``timeout`` seconds. The first ``frames_sent`` of
                these frames were sent (none, where they fit into one message); the call may be
                repeated with the others.
        """
        start = self._running("send")
        if np.ma.is_masked(frames):
            raise InvalidUse(
                "The frames are masked, and no mask travels with them: give start() the pixel_mask "
                "(True where a pixel can be trusted), and send frames.data."
            )
        block = _array("The frames", frames)
        if block.ndim == 2:
            block = block[np.newaxis]
        if block.ndim != 3 or block.shape[1:] != start.frame_shape:
            h, w = start.frame_shape
            raise InvalidUse(
                f"The frames have shape {np.shape(frames)}, and start() announced frames of "
                f"{h} × {w}: send ({h}, {w}) or (n, {h}, {w})."
            )
        if block.dtype != start.dtype and block.dtype.newbyteorder("=") != start.dtype:
            raise InvalidUse(
                f"The frames have dtype {block.dtype}, and start() announced {start.dtype}: send "
                f"np.asarray(frames, {start.dtype!r}), or announce another of {_DTYPES}."
            )
        if indices is None:
            numbers = np.arange(self._next_index, self._next_index + len(block), dtype=np.int64)
        else:
            numbers = self._numbers(indices, len(block))
        most = max(1, _MESSAGE_BYTES // (block.itemsize * prod(start.frame_shape)))
        for first in range(0, len(block), most):
            some = numbers[first : first + most]
            header = Frames(**self._identity("frames", start.acquisition_id))
            try:
                self._send(header, {"indices": some, "frames": block[first : first + most]})
            except NoAnswer as error:
                if not first:
                    raise
                told = NoAnswer(
                    f"{error} Of these {len(block)} frames, the first {first} were sent: go on "
                    f"with frames[{first}:]."
                )
                told.frames_sent = first
                raise told from None
            if time.monotonic() >= self._look_at:  # a look takes a tenth of a small frame's time
                self._watch()
            self._next_index = int(some[-1]) + 1
            self._sent += len(some)

    def end(self, *, aborted: str = "") -> None:
        """End the acquisition.

        Args:
            aborted: why it ended early, where it did; its first 1000 characters are kept.

        Raises:
            InvalidUse: no acquisition is running, or ``aborted`` is no text.
            NoAnswer: the service took nothing for ``timeout`` seconds; the call may be repeated.
        """
        start = self._running("end")
        if not isinstance(aborted, str):
            raise InvalidUse(
                f"aborted is {aborted!r}: say why the acquisition ended early, in a text."
            )
        self._send(
            AcquisitionEnd(
                **self._identity("acquisition_end", start.acquisition_id),
                aborted=bool(aborted),
                reason=aborted[:MAX_TEXT],
                frames=self._sent,
            ),
            {},
        )
        self._watch()
        self._start = None

    def close(self) -> None:
        """End what is running and hand over what still waits; may be called twice.

        Raises:
            NoAnswer: the service did not take all of it within ``timeout`` seconds, 1 at least, or
                the connection broke before.
        """
        if self._socket.closed:
            return
        try:
            if self._start is not None:
                self.end()
            elif opened_here(self._socket):
                self._watch()
        finally:
            self._hand_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        # The exception on its way out is the one to be seen, whatever else fails now.
        try:
            if self._start is not None and not self._socket.closed:
                self._socket.sndtimeo = min(self._socket.sndtimeo, 1000)
                why = f"{type(error).__name__}: {error}".removesuffix(": ")  # Ctrl-C says nothing
                self.end(aborted=why.encode(errors="replace").decode())
            self.close()
        except Prenet4dError as second:
            error.add_note(str(second))
            self._hand_over(within=0.0)

    def _hand_over(self, within: float | None = None) -> None:
        if self._forgotten.detach() is None:
            return
        patience = max(self._timeout, LEAST_ANSWER_S) if within is None else within
        began = time.monotonic()
        broke = hand_over(self._socket, self._disconnections, patience)
        if within is None and (broke or time.monotonic() - began >= patience):
            why = "before the connection broke" if broke else f"within {patience:g} s"
            raise NoAnswer(
                f"The service at {self.address} did not take the last frames {why}, and they are "
                "lost."
            )

    def _running(self, call: str) -> AcquisitionStart:
        check_usable(self._socket, self)
        if self._start is None:
            raise InvalidUse(f"No acquisition is running: call start() before {call}().")
        return self._start

    def _watch(self) -> None:
        """Tell where the connection broke, which ZeroMQ mends without a word."""
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        if not (breaks := self._count_breaks()):
            return
        self.breaks += breaks
        if self._start is not None:
            _log.warning(
                "The connection to the service at %s broke in the middle of acquisition %s: frames "
                "on their way are lost, and a service that was started again refuses the rest. "
                "To go on, end() this acquisition and start() another.",
                self.address,
                self._start.acquisition_id,
            )
        elif self._sent:
            _log.warning(
                "The connection to the service at %s broke after the last acquisition was sent: "
                "what was still on its way is lost.",
                self.address,
            )

    def _count_breaks(self) -> int:
        """Take the disconnections that ZeroMQ has noticed since they were taken last."""
        breaks = 0
        while int(self._disconnections.get(zmq.EVENTS)) & zmq.POLLIN:
            self._disconnections.recv_multipart()
            breaks += 1
        return breaks

    def _identity(self, kind: str, acquisition_id: str) -> dict[str, Any]:
        return {
            "publisher": self._publisher,
            "acquisition_id": acquisition_id,
            "sequence": self._sequences.get(kind, 0),
        }

    def _send(self, header: Header, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        check_usable(self._socket, self)
        try:
            parts = encode(header, arrays, lz4=self._lz4)
        except (MalformedMessage, OversizeMessage) as error:
            raise InvalidUse(str(error)) from None
        try:
            # Copied, because a camera's buffer is often filled again as soon as this returns.
            self._socket.send_multipart(parts, copy=True)
        except zmq.Again:
            raise NoAnswer(
                f"No service took the message at {self.address} within {self._timeout:g} s: is "
                "it running, is this its ingest address, does it ask for another key, does it keep "
                "up, and is no other sender's acquisition open?"
            ) from None
        except BaseException:
            # Ctrl-C may come between two parts, and the next message would become the rest of them.
            with suppress(zmq.ZMQError):
                self._socket.send(b"", zmq.NOBLOCK)
            raise
        self._sequences[header.type] = header.sequence + 1

    @staticmethod
    def _numbers(indices: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
        numbers = np.atleast_1d(_array("indices", indices))
        whole = numbers.dtype.kind in "iu"
        # One bit fewer than travel, so that counting on from the largest has numbers left.
        if numbers.shape != (n,) or not whole or (numbers >> 62).any():
            raise InvalidUse(
                f"indices must be {n} integers from 0, below 2**62, one for each frame; they have "
                f"shape {numbers.shape} and dtype {numbers.dtype}, starting with {numbers[:3]}."
            )
        return numbers.astype(np.int64)


def _array(what: str, value: object, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's tensors raise the last, too
        raise InvalidUse(f"{what} cannot be read as an array: {str(error).rstrip('.')}.") from None


def _new_id() -> str:
    """Sortable and readable, and still no other acquisition's."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"


def _dtype_name(dtype: npt.DTypeLike) -> str:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in get_args(FrameDType):
        raise InvalidUse(f"Frames of dtype {name} cannot be sent: convert them to {_DTYPES}.")
    return name
