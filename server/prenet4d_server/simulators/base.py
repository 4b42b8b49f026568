"""What simulated detectors have in common: what they show, when they send, and what goes wrong.

A simulator speaks a real detector's bytes over a real socket. Its own file says only how a start,
a frame and an end look in the detector's protocol (:class:`Detector`); :func:`run` does the rest.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, get_args

import numpy as np
import numpy.typing as npt
import zmq

from prenet4d_client.errors import NoAnswer
from prenet4d_server.errors import ConfigError

Frames: TypeAlias = npt.NDArray[Any]
Parts: TypeAlias = Sequence[Any]
"""One ZeroMQ message."""

FaultName = Literal["drop", "duplicate", "corrupt", "garbage", "restart", "no_end"]
"""What can be made to go wrong.

drop: a message is never sent. duplicate: it is sent twice. corrupt: half of its data are missing.
garbage: a message of another protocol comes before it. restart: in the middle of the first series
the detector starts anew, without an end. no_end: series are not ended.
"""
FAULTS: tuple[FaultName, ...] = get_args(FaultName)

_PER_MESSAGE: tuple[FaultName, ...] = ("drop", "duplicate", "corrupt", "garbage")
_GARBAGE = b"\xffnot of this protocol"
_HIGH_WATER = 256
_TICK_MS = 50
_LONGEST_MS = 2**31 - 1
"""That ZeroMQ can wait."""
_TELL_EVERY_S = 0.1
_SHORTEST_SLEEP_S = 0.001


class FrameFeed(Protocol):
    """What a simulated detector sees."""

    @property
    def frame_shape(self) -> tuple[int, int]:
        """``(h, w)`` in pixels."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8, uint16, uint32 or float32."""

    @property
    def scan_shape(self) -> tuple[int, int] | None:
        """``(ny, nx)``, where there is one."""

    @property
    def n_frames(self) -> int:
        """How many frames there are."""

    @property
    def pixel_mask(self) -> npt.NDArray[np.bool_] | None:
        """(h, w), ``True`` where a pixel can be trusted."""

    def blocks(self) -> Iterator[Frames]:
        """Yield the frames in order, in pieces of (n, h, w); can be called again."""
        ...


@dataclass(frozen=True)
class ArrayFeed:
    """A :class:`FrameFeed` of frames that are in memory already.

    Args:
        frames: (n, h, w) detector counts.
        scan_shape: ``(ny, nx)``, where there is one.
        pixel_mask: (h, w), ``True`` where a pixel can be trusted.
    """

    frames: Frames
    scan_shape: tuple[int, int] | None = None
    pixel_mask: npt.NDArray[np.bool_] | None = None

    @property
    def frame_shape(self) -> tuple[int, int]:
        """``(h, w)`` in pixels."""
        height, width = self.frames.shape[1:]
        return height, width

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the counts."""
        return self.frames.dtype

    @property
    def n_frames(self) -> int:
        """How many frames there are."""
        return len(self.frames)

    def blocks(self) -> Iterator[Frames]:
        """Yield all frames at once."""
        yield self.frames


class Options(TypedDict, total=False):
    """How a simulated detector runs: keyword arguments that every simulator takes."""

    rate: float
    """Frames per second; 0, the default: as fast as they are taken."""
    repeat: int
    """How many series to send, 1 by default; 0: until stopped."""
    cycle: int
    """Encode only this many of the feed's first frames, before sending starts, and send them in
    turn: the way to rates beyond what one core can compress. 0, the default: encode all."""
    faults: Collection[FaultName]
    """What goes wrong; see :data:`FaultName`."""
    fault_every: int
    """One message in so many suffers from a fault, the named ones in turn; 50 by default."""
    patience_s: float
    """How long to wait for a receiver, at first and whenever nothing is taken; 30 by default."""
    stop: threading.Event | None
    """Ends the simulation early, once it is set."""
    on_ready: Callable[[str], None] | None
    """Called with the address in use, once it can be connected to."""
    on_progress: Callable[[int, int], None] | None
    """Told ``(frames sent, frames in all)`` now and then; all is 0 where ``repeat`` is."""


class Detector(Protocol):
    """How one kind of detector says things; an encoded frame is whatever suits it."""

    frames_per_message: int

    def start(self, series: int) -> Iterable[Parts]:
        """The messages that announce a series."""
        ...

    def encode(self, frames: Frames, *, corrupt: bool = False) -> Any:
        """Encode the frames of one message, (n, h, w); ``corrupt``: leave out half of the bytes."""
        ...

    def message(self, series: int, first: int, encoded: Any) -> Parts:
        """The message that carries encoded frames, the first of which is number ``first``."""
        ...

    def end(self, series: int) -> Iterable[Parts]:
        """The messages that end a series."""
        ...


def run(
    detector: Detector,
    feed: FrameFeed,
    attach: Callable[[zmq.Socket[bytes]], str],
    options: Options,
) -> None:
    """Send a feed's frames the way a detector does.

    Args:
        detector: its protocol.
        feed: what it sees.
        attach: binds or connects the PUSH socket and returns its address.
        options: how it runs.

    Raises:
        ConfigError: a fault has a name that there is not.
        BindError: the address is in use, or not this machine's.
        NoAnswer: nobody takes what is sent.
    """
    faults = options.get("faults", ())
    fault_every = options.get("fault_every", 50)
    repeat = options.get("repeat", 1)
    patience_s = options.get("patience_s", 30.0)
    on_ready = options.get("on_ready")
    stop = options.get("stop") or threading.Event()
    on_progress = options.get("on_progress")
    unknown = set(faults) - set(FAULTS)
    if unknown:
        raise ConfigError(
            f"There is no fault named {min(unknown)!r}. Choose from {', '.join(FAULTS)}."
        )
    shots = _prepare(detector, feed, options.get("cycle", 0))
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.sndhwm = _HIGH_WATER
        socket.linger = 0
        socket.immediate = 1
        address = attach(socket)
        if on_ready is not None:
            on_ready(address)
        line = _Line(socket, address, patience_s, stop)
        pace = _Pace(options.get("rate", 0.0), feed.n_frames * repeat, on_progress, stop)
        try:
            for series in itertools.count(1) if repeat == 0 else range(1, repeat + 1):
                if series == 1 and "restart" in faults:
                    half = _until(shots(), feed.n_frames // 2)
                    _send_series(detector, 0, half, line, pace, (), fault_every)
                _send_series(detector, series, shots(), line, pace, faults, fault_every)
                if "no_end" not in faults:
                    line.send_all(detector.end(series))
        except _Stopped:
            pass
        else:  # what was accepted must still leave: closing waits for it, for so long
            socket.linger = round(min(patience_s * 1000, _LONGEST_MS))
    pace.tell()


@dataclass(frozen=True, slots=True)
class _Shot:
    """The frames of one message."""

    first: int
    frames: Frames
    encoded: Any
    """``None``: not encoded yet."""


def _prepare(detector: Detector, feed: FrameFeed, cycle: int) -> Callable[[], Iterator[_Shot]]:
    """How to go through a feed message by message, once or several times."""
    size = detector.frames_per_message
    if not cycle:
        return lambda: _shots(feed, size)
    known = [
        _Shot(0, shot.frames, detector.encode(shot.frames))
        for shot in _until(_shots(feed, size), cycle)
    ]

    def cycled() -> Iterator[_Shot]:
        first, turn = 0, itertools.cycle(known)
        while (left := feed.n_frames - first) > 0:
            shot = next(turn)
            whole = len(shot.frames) <= left
            yield _Shot(first, shot.frames[:left], shot.encoded if whole else None)
            first += len(shot.frames)

    return cycled


def _shots(feed: FrameFeed, size: int) -> Iterator[_Shot]:
    first = 0
    for block in feed.blocks():
        for start in range(0, len(block), size):
            frames = block[start : start + size]
            yield _Shot(first, frames, None)
            first += len(frames)


def _until(shots: Iterator[_Shot], limit: int) -> Iterator[_Shot]:
    return itertools.takewhile(lambda shot: shot.first < limit, shots)


def _send_series(
    detector: Detector,
    series: int,
    shots: Iterator[_Shot],
    line: _Line,
    pace: _Pace,
    faults: Collection[FaultName],
    fault_every: int,
) -> None:
    line.send_all(detector.start(series))
    mishaps = itertools.cycle([name for name in _PER_MESSAGE if name in faults] or [None])
    for count, shot in enumerate(shots, 1):
        mishap = next(mishaps) if count % fault_every == 0 else None
        encoded = shot.encoded
        if encoded is None or mishap == "corrupt":
            encoded = detector.encode(shot.frames, corrupt=mishap == "corrupt")
        message = detector.message(series, shot.first, encoded)
        if mishap == "garbage":
            line.send([_GARBAGE])
        if mishap != "drop":
            line.send(message)
        if mishap == "duplicate":
            line.send(message)
        pace.sent(len(shot.frames))


class _Stopped(Exception):
    """The simulation was asked to end."""


class _Line:
    """The way out: waits while nobody takes anything, but not forever."""

    def __init__(
        self, socket: zmq.Socket[bytes], address: str, patience_s: float, stop: threading.Event
    ) -> None:
        self.stop = stop
        self._socket = socket
        self._address = address
        self._patience_s = patience_s

    def send_all(self, messages: Iterable[Parts]) -> None:
        for message in messages:
            self.send(message)

    def send(self, parts: Parts) -> None:
        """Send one message.

        Raises:
            NoAnswer: nobody took it.
            _Stopped: the simulation was asked to end meanwhile.
        """
        deadline = None
        while not self.stop.is_set():
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self._patience_s
                elif now > deadline:
                    raise NoAnswer(
                        f"Nobody has taken anything from {self._address} for "
                        f"{self._patience_s:g} s. Is the service running, attached to it, and not "
                        "busy with another sender?"
                    ) from None
                self._socket.poll(_TICK_MS, zmq.POLLOUT)
            else:
                return
        raise _Stopped


class _Pace:
    """Holds the rate, and tells about the progress."""

    def __init__(
        self,
        rate: float,
        total: int,
        on_progress: Callable[[int, int], None] | None,
        stop: threading.Event,
    ) -> None:
        self._rate = rate
        self._total = total
        self._on_progress = on_progress
        self._stop = stop
        self._sent = 0
        self._began: float | None = None
        self._told = 0.0

    def sent(self, frames: int) -> None:
        """Count frames, and wait until the next ones are due."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        self._sent += frames
        if now > self._told + _TELL_EVERY_S:
            self._told = now
            self.tell()
        if self._rate > 0:
            ahead = self._began + self._sent / self._rate - now
            if ahead > _SHORTEST_SLEEP_S:
                self._stop.wait(ahead)

    def tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._sent, self._total)
