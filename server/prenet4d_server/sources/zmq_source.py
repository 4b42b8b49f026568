"""What every detector that speaks ZeroMQ has in common: a PULL socket, polled in bounded bites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import zmq

from prenet4d_client.addresses import is_ipv6
from prenet4d_server.errors import ConfigError, ServiceError
from prenet4d_server.sources.base import Busy, SourceEvent, idle
from prenet4d_server.sources.compression import Buffer
from prenet4d_server.sources.encoded import EventList

MAX_BYTES = 256 << 20
"""The largest message accepted by default."""

_MESSAGES_PER_POLL = 256
_GATHER_MS = 1
"""How soon it is noticed that somebody waits for the events, where no message comes."""


class ZmqSource(ABC):
    """A :class:`~prenet4d_server.sources.base.Source` on a ZeroMQ PULL socket.

    A protocol is written by implementing :meth:`_read`. One thread polls; :meth:`close` belongs to
    the same thread.

    Args:
        address: to listen on or to connect to.
        max_bytes: larger messages become faults. Parts of more than four times this size, and of
            more than 1 GiB, are not even received: ZeroMQ cuts the connection, the sender connects
            anew, and nobody is told. No single frame is so large.
        high_water: messages that may wait in ZeroMQ before the sender is held back.
    """

    copies: ClassVar[bool]
    """Whether parts are copied into ``bytes`` (faster for small parts) or handed on as they are."""
    bite: ClassVar[int] = 32 << 20
    """A poll returns when it has taken so many bytes."""

    def __init__(self, address: str, *, max_bytes: int, high_water: int) -> None:
        self.address = address
        self._max_bytes = max_bytes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.rcvhwm = high_water
        self._socket.maxmsgsize = 4 * max(max_bytes, MAX_BYTES)
        self._socket.linger = 0
        # Notice a detector that lost its power without saying goodbye.
        self._socket.tcp_keepalive = 1
        self._socket.tcp_keepalive_idle = 10
        self._socket.tcp_keepalive_intvl = 5
        try:
            self._attach()
        except ServiceError:
            self.close()
            raise

    @abstractmethod
    def _attach(self) -> None:
        """Bind or connect the socket, and set ``address`` to what it became."""

    @abstractmethod
    def _read(self, parts: Sequence[Buffer], events: EventList) -> None:
        """Turn one message into events.

        Raises:
            ServiceError: why it cannot be used; a ``FrameError`` where one frame is lost by it.
        """

    def poll(self, timeout_s: float, busy: Busy = idle) -> Sequence[SourceEvent]:
        """Return what came, in order; see ``Source.poll``."""
        events = EventList()
        received = messages = 0
        waited = False
        while messages < _MESSAGES_PER_POLL and received < self.bite:
            try:
                parts = self._receive()
            except zmq.Again:
                if busy():
                    self._socket.poll(_GATHER_MS)
                elif messages or waited:
                    break
                else:
                    self._socket.poll(round(timeout_s * 1000))
                    waited = True
                continue
            messages += 1
            received += sum(map(len, parts))
            try:
                self._read(parts, events)
            except ServiceError as error:
                events.add_error(error)
        return events.take()

    def _receive(self) -> list[Buffer]:
        """One message's parts, in half the time of ``recv_multipart``: frames know of the next.

        Raises:
            zmq.Again: none has come.
        """
        frame: Any = self._socket.recv(zmq.NOBLOCK, copy=False)
        frames = [frame]
        while frame.more:
            frame = self._socket.recv(copy=False)
            frames.append(frame)
        if self.copies:
            return [frame.bytes for frame in frames]
        return [memoryview(frame) for frame in frames]

    def _refuse_oversize(self, parts: Sequence[Buffer], refusal: type[Exception]) -> None:
        size = sum(map(len, parts))
        if size > self._max_bytes:
            raise refusal(
                f"A message of {size} bytes; at most {self._max_bytes} are accepted: "
                "make source.max_message larger."
            )

    def close(self) -> None:
        """Close the socket; may be called twice."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(socket: zmq.Socket[bytes], address: str) -> None:
    """Connect to a detector, which need not be there yet: ZeroMQ goes on trying.

    Raises:
        ConfigError: the address makes no sense.
    """
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000
    socket.ipv6 = is_ipv6(address)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"Cannot connect to {address}: {error.strerror}. Use tcp://host:port."
        ) from None
