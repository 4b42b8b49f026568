"""The lossless path: receivers that get every message they registered for, under their own credit.

A receiver (DEALER) registers with the topics it wants and a credit, the number of messages it has
room for; the service (ROUTER) sends it no more than that. Credit grows as the receiver consumes.
What finds no credit waits here, and while it waits the pipeline is held back, for a bounded time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import zmq

from prenet4d_client.errors import ProtocolError
from prenet4d_client.messages import (
    STREAM_TOPICS,
    AcquisitionEnd,
    AcquisitionStart,
    Credit,
    Event,
    Goodbye,
    Header,
    Heartbeat,
    Register,
    Registered,
)
from prenet4d_client.wire import decode, encode
from prenet4d_server.config import LosslessSettings

Parts: TypeAlias = Sequence[Any]
Stamp: TypeAlias = Callable[[Header], Header]

# A register or credit message is small; nothing that a receiver says may be large.
_MAX_BYTES = 1 << 16
# What a receiver that grants itself absurd credit may make us queue in the socket.
_HIGH_WATER = 256
_TICK_S = 1.0
"""Between two ticks there is never more, unless something holds their thread up."""


@dataclass(slots=True)
class _Receiver:
    name: str
    topics: frozenset[str]
    credit: int
    heard: float
    pending: deque[tuple[float, Parts]] = field(default_factory=deque)
    """What finds no credit: when it was made, on the monotonic clock, and the message."""
    waiting_since: float = 0.0


class Receivers:
    """The registered receivers, on one ROUTER socket; used by the publisher's thread alone."""

    def __init__(self, socket: zmq.Socket[bytes], settings: LosslessSettings, stamp: Stamp) -> None:
        """Serve an open socket.

        Args:
            socket: a ROUTER, bound.
            settings: heartbeats and what is done about lag.
            stamp: gives a header its publisher and sequence.
        """
        self._socket = socket
        socket.router_mandatory = True
        socket.sndhwm = _HIGH_WATER
        socket.maxmsgsize = 4 * _MAX_BYTES  # what is larger is not even received
        self._settings = settings
        self._stamp = stamp
        self._receivers: dict[bytes, _Receiver] = {}
        self._unreachable: dict[bytes, str] = {}
        """Names of those whom the last messages did not reach: their goodbye may still come."""
        self.patience_ends = math.inf
        """From this time on, who holds the pipeline back is dropped."""
        self._start: Parts | None = None
        self._next_heartbeat = 0.0
        self._ticked = time.monotonic()
        self._events: list[Event] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Who is registered."""
        return tuple(receiver.name for receiver in self._receivers.values())

    @property
    def behind_s(self) -> dict[str, float]:
        """How old the oldest message is that waits for each receiver's credit, in seconds."""
        now = time.monotonic()
        behind = dict.fromkeys(self.names, 0.0)
        for receiver in self._receivers.values():
            if receiver.pending:
                age = now - receiver.pending[0][0]
                behind[receiver.name] = max(age, behind[receiver.name])
        return behind

    @property
    def holding(self) -> bool:
        """Whether some message waits for a receiver's credit."""
        return any(receiver.pending for receiver in self._receivers.values())

    @property
    def topics(self) -> frozenset[str]:
        """What the receivers have registered for, taken together."""
        return frozenset[str]().union(*(receiver.topics for receiver in self._receivers.values()))

    def offer(self, header: Header, parts: Parts) -> None:
        """Send a message to every receiver of its type, now or as soon as it has credit."""
        if isinstance(header, AcquisitionStart):
            self._start = parts
        elif isinstance(header, AcquisitionEnd):
            self._start = None
        made = time.monotonic() - (time.time() - header.time)
        for identity, receiver in list(self._receivers.items()):
            if header.type in receiver.topics:
                if self._settings.on_lag == "drop" and receiver.credit == 0:
                    self._drop(identity, "it did not keep up")
                    continue
                if not receiver.pending:
                    receiver.waiting_since = time.monotonic()
                receiver.pending.append((made, parts))
                self._serve(identity)

    def listen(self) -> None:
        """Take everything that receivers have said."""
        while True:
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._hear(identity, decode(parts, max_bytes=_MAX_BYTES).header)
            except ProtocolError as error:
                self._say("warning", "bad_receiver_message", f"A receiver sent nonsense: {error}")
                if identity not in self._receivers:  # it waits for an answer to its register
                    self._part(identity, str(error))

    def tick(self) -> list[Event]:
        """Send heartbeats, drop who is silent or lags too long; returns what is to be told.

        To be called after :meth:`listen`.
        """
        for name in self._unreachable.values():  # no goodbye came: it would have been heard by now
            self._say("warning", "receiver_dropped", f"Receiver {name!r} is unreachable.")
        self._unreachable.clear()
        now = time.monotonic()
        # Time in which this thread did not run is nobody's silence: the machine may have stood
        # still, and the receivers' hearts with it.
        overslept = max(0.0, now - self._ticked - _TICK_S)
        self._ticked = now
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self._settings.heartbeat_s / 4
            for identity in list(self._receivers):
                self._send(identity, encode(self._stamp(Heartbeat())))
        for identity, receiver in list(self._receivers.items()):
            receiver.heard += overslept
            if now - receiver.heard > self._settings.heartbeat_s:
                self._drop(identity, f"it was silent for {self._settings.heartbeat_s:g} s")
            elif receiver.pending and (
                now - receiver.waiting_since > self._settings.max_lag_s or now > self.patience_ends
            ):
                lag = now - receiver.waiting_since
                self._drop(identity, f"it took nothing for {lag:.1f} s")
            else:
                self._serve(identity)
        events, self._events = self._events, []
        return events

    def dismiss(self, reason: str) -> None:
        """Say goodbye to all."""
        for identity in list(self._receivers):
            self._part(identity, reason)
        self._receivers.clear()

    def _hear(self, identity: bytes, said: Header) -> None:
        receiver = self._receivers.get(identity)
        if receiver is not None:
            receiver.heard = time.monotonic()
        match said:
            case Goodbye() if (name := self._unreachable.pop(identity, None)) is not None:
                self._say("info", "receiver_left", f"Receiver {name!r} left.")
            case Register():
                self._register(identity, said)
            case Credit() if receiver is not None:
                receiver.credit += said.credit
                self._serve(identity)
            case Goodbye() if receiver is not None:
                del self._receivers[identity]
                self._say("info", "receiver_left", f"Receiver {receiver.name!r} left.")
            case Heartbeat():
                pass
            case _ if receiver is not None:
                self._drop(identity, f"it sent a message of type {said.type!r}")
            case _:
                pass  # the last words of one who was dropped

    def _register(self, identity: bytes, said: Register) -> None:
        unknown = set(said.topics) - set(STREAM_TOPICS)
        if unknown or not said.topics:
            self._receivers[identity] = _Receiver(said.name, frozenset(), 0, time.monotonic())
            self._drop(identity, f"it asked for topics {sorted(unknown)}; there are "
                                 f"{', '.join(STREAM_TOPICS)}")  # fmt: skip
            return
        receiver = _Receiver(said.name, frozenset(said.topics), said.credit, time.monotonic())
        self._receivers[identity] = receiver
        if not self._send(
            identity, encode(self._stamp(Registered(heartbeat_s=self._settings.heartbeat_s)))
        ):
            return
        self._say("info", "receiver_registered", f"Receiver {said.name!r} registered.")
        if self._start is not None and AcquisitionStart.model_fields["type"].default in said.topics:
            receiver.waiting_since = time.monotonic()
            receiver.pending.append((receiver.waiting_since, self._start))
            self._serve(identity)

    def _serve(self, identity: bytes) -> None:
        """Send what waits, as far as the credit goes."""
        receiver = self._receivers[identity]
        while receiver.pending and receiver.credit:
            if not self._send(identity, receiver.pending[0][1]):
                return
            receiver.pending.popleft()
            receiver.credit -= 1
            receiver.waiting_since = time.monotonic()

    def _send(self, identity: bytes, parts: Parts) -> bool:
        """Send without waiting; a receiver that cannot be reached any more is dropped."""
        try:
            self._socket.send_multipart([identity, *parts], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError:
            if (receiver := self._receivers.pop(identity, None)) is not None:
                self._unreachable[identity] = receiver.name
            return False
        return True

    def _part(self, identity: bytes, reason: str) -> None:
        self._send(identity, encode(self._stamp(Goodbye(reason=reason))))

    def _drop(self, identity: bytes, reason: str) -> None:
        receiver = self._receivers.pop(identity)
        self._part(identity, f"Dropped: {reason}.")
        missed = len(receiver.pending)
        self._say(
            "warning", "receiver_dropped", f"Receiver {receiver.name!r} was dropped: {reason}.",
            messages_lost=missed,
        )  # fmt: skip

    def _say(self, level: Any, code: str, message: str, **details: Any) -> None:
        self._events.append(Event(level=level, code=code, message=message, details=details))
