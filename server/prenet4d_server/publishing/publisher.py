"""The publisher: one thread that owns the stream and the lossless sockets.

What the pipeline hands over is encoded once, and only if somebody wants it; the same parts go to
the subscribers, who may miss some, and to the registered receivers, who may not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import zmq

from prenet4d_client.messages import Event, Header
from prenet4d_client.wire import Array, encode
from prenet4d_server.config import LosslessSettings, StreamSettings
from prenet4d_server.ingest.notices import Level
from prenet4d_server.publishing.lossless import Receivers
from prenet4d_server.publishing.outgoing import Outgoing
from prenet4d_server.sockets import KeyPair, bind, protect

QUEUE = 4
"""Groups of messages (one batch's each) that wait between the pipeline and the sockets."""
TICK_MS = 100
_HELD_S = 0.1
"""How often ``while_held`` is called."""
LINGER_MS = 1000
RECENT_EVENTS = 50
_MAX_SUBSCRIPTION = 1 << 12
"""Bytes; no topic is as long. Who sends more is cut off."""
log = logging.getLogger(__name__)


class Publisher:
    """Publishes in order; ``publish`` and ``event`` may be called from any thread but its own."""

    def __init__(
        self,
        stream: StreamSettings,
        lossless: LosslessSettings,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: KeyPair | None = None,
    ) -> None:
        """Bind both sockets and start the thread.

        Raises:
            BindError: an address cannot be bound.
        """
        self.id = secrets.token_hex(4)
        """Identifies this service's life on the wire."""
        self.recent_events: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self._sequences: Counter[str] = Counter()
        self._topics: frozenset[bytes] = frozenset()
        self.while_held: Callable[[], object] = lambda: None
        """Called again and again by who waits in ``publish``; may announce, not publish."""
        self._queue: deque[tuple[tuple[Outgoing, ...], Callable[[], None] | None]] = deque()
        self._changed = threading.Condition()
        self._closing_at: float | None = None
        with contextlib.ExitStack() as undo:
            self._stream = context.socket(zmq.XPUB)
            undo.callback(self._stream.close, 0)
            self._stream.sndhwm = stream.high_water
            self._stream.maxmsgsize = _MAX_SUBSCRIPTION
            protect(self._stream, keys)
            self.stream_address = bind(self._stream, stream.address, "stream.address")
            router = context.socket(zmq.ROUTER)
            undo.callback(router.close, 0)
            protect(router, keys)
            self._receivers = Receivers(router, lossless, self._stamp)
            self.lossless_address = bind(router, lossless.address, "lossless.address")
            undo.pop_all()
        self._router = router
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._received: frozenset[str] = frozenset()
        """Topics that some receiver has registered for."""
        self.receivers: tuple[str, ...] = ()
        """Names of the registered lossless receivers."""
        self.behind_s: Mapping[str, float] = {}
        """Receiver → the age of the oldest message that waits for its credit, in seconds."""
        self._announced: deque[tuple[int, Event]] = deque()
        """Events, and how many groups had been handed over before each."""
        self._handed_over = self._sent = 0
        """Groups, since the beginning."""
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def wants(self, topic: str) -> bool:
        """Whether anybody would get a message of this type now."""
        return topic in self._received or self._subscribed(topic)

    def _subscribed(self, topic: str) -> bool:
        return any(topic.encode().startswith(prefix) for prefix in self._topics)

    def publish(self, *messages: Outgoing, on_sent: Callable[[], None] | None = None) -> None:
        """Hand over a group of messages; waits while the queue is full, that is, while held back.

        Args:
            messages: they are sent in this order.
            on_sent: called by the publisher's thread once all are with the sockets.
        """
        while not self._has_room():
            self.while_held()
        with self._changed:
            if self.alive:
                self._handed_over += 1
                self._queue.append((messages, on_sent))
                os.eventfd_write(self._wake, 1)

    def _has_room(self) -> bool:
        """Wait for room in the queue, for a moment; where nothing is sent any more, there is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self._queue) < QUEUE or not self.alive or self._closing_at is not None,
                _HELD_S,
            )

    def event(
        self, level: Level, code: str, message: str, acquisition_id: str = "", **details: Any
    ) -> None:
        """Log an event and publish it."""
        event = Event(
            level=level, code=code, message=message, acquisition_id=acquisition_id, details=details
        )
        self._note(event)
        self.publish((event, {}))

    def announce(self, event: Event) -> None:
        """Log an event and publish it in its turn, or at once while a receiver holds the rest back.

        Never waits.
        """
        with self._changed:
            if self.alive and self._closing_at is None:
                self._announced.append((self._handed_over, event))
                os.eventfd_write(self._wake, 1)
                return
        self._note(event)

    def hasten(self, timeout_s: float) -> None:
        """Let receivers hold the pipeline back for no longer than ``timeout_s`` from now."""
        ends = time.monotonic() + timeout_s
        self._receivers.patience_ends = min(self._receivers.patience_ends, ends)

    def close(self, timeout_s: float) -> None:
        """Send what waits, for at most ``timeout_s``; say goodbye to receivers and close."""
        with self._changed:
            if self._closing_at is not None:
                return
            self._closing_at = time.monotonic() + timeout_s
            self._changed.notify_all()
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._changed:  # nobody is about to ring it
            os.close(self._wake)

    def _run(self) -> None:
        poller = zmq.Poller()
        for waited in (self._stream, self._router, self._wake):
            poller.register(waited, zmq.POLLIN)
        try:
            while not self._finished():
                busy = self._announced or self._may_send()
                ready = dict(poller.poll(0 if busy else TICK_MS))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._stream in ready:
                    self._read_subscriptions()
                if self._router in ready:
                    self._receivers.listen()
                for event in (*self._receivers.tick(), *self._take_announced()):
                    self._note(event)
                    self._send(event, {})
                self.receivers, self._received = self._receivers.names, self._receivers.topics
                self.behind_s = self._receivers.behind_s
                if self._may_send():
                    self._send_next()
            self._receivers.dismiss("The service has stopped.")
        finally:
            for socket in (self._stream, self._router):
                socket.close(LINGER_MS)

    def _take_announced(self) -> Iterator[Event]:
        while self._announced and (self._receivers.holding or self._announced[0][0] <= self._sent):
            yield self._announced.popleft()[1]

    def _may_send(self) -> bool:
        return bool(self._queue) and not self._receivers.holding

    def _finished(self) -> bool:
        if self._closing_at is None:
            return False
        idle = not (self._queue or self._announced or self._receivers.holding)
        return idle or time.monotonic() > self._closing_at

    def _send_next(self) -> None:
        with self._changed:
            messages, on_sent = self._queue.popleft()
            self._changed.notify_all()
        for header, arrays in messages:
            self._send(header, arrays)
        if on_sent is not None:
            on_sent()
        self._sent += 1

    def _send(self, header: Header, arrays: Mapping[str, Array] | None) -> None:
        stamped = self._stamp(header)  # counted even if nobody listens: gaps must show
        if arrays is None:
            return
        # Starts and ends are kept by the lossless path for who registers later.
        wanted = self._subscribed(header.type) or header.type in self._receivers.topics
        if wanted or header.type.startswith("acquisition_"):
            parts = encode(stamped, arrays)
            self._stream.send_multipart(parts, copy=False)
            self._receivers.offer(stamped, parts)

    def _stamp(self, header: Header) -> Header:
        sequence = self._sequences[header.type]
        self._sequences[header.type] += 1
        return header.model_copy(update={"publisher": self.id, "sequence": sequence})

    def _read_subscriptions(self) -> None:
        topics = set(self._topics)
        with contextlib.suppress(zmq.Again):
            while True:
                said = self._stream.recv(zmq.NOBLOCK)
                if said[:1] == b"\x01":
                    topics.add(said[1:])
                elif said[:1] == b"\x00":
                    topics.discard(said[1:])
        self._topics = frozenset(topics)

    def _note(self, event: Event) -> None:
        self.recent_events.append(event)
        log.log(
            getattr(logging, event.level.upper()),
            "%s", event.message,
            extra={
                "code": event.code,
                "acquisition_id": event.acquisition_id,
                "details": event.details,
            },
        )  # fmt: skip
