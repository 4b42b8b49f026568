"""``LosslessReceiver``: every batch and every event, none missed."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Self

import zmq
from pydantic import ValidationError

from prenet4d_client._gaps import GapCounter
from prenet4d_client._sockets import (
    LEAST_ANSWER_S,
    check_process,
    checked_count,
    checked_timeout,
    connect,
    deadline_after,
    disconnect,
    milliseconds,
    next_slice,
)
from prenet4d_client.errors import (
    ConnectionRefused,
    InvalidUse,
    NoAnswer,
    Prenet4dError,
    ProtocolError,
)
from prenet4d_client.messages import (
    Credit,
    Goodbye,
    Header,
    Heartbeat,
    Register,
    Registered,
)
from prenet4d_client.subscriber import stream_topics
from prenet4d_client.wire import MAX_MESSAGE_BYTES, Message, decode, encode, explain

_TOPICS = ("telemetry", "corrected", "event", "acquisition_start", "acquisition_end")
_CONVERSATION = ("registered", "heartbeat", "goodbye")  # they cost no credit
_GOODBYE_LINGER_S = 1.0
_OVERSLEPT_S = 0.1
"""Whoever wakes up so much too late has not been running."""


class LosslessReceiver:
    """Iterates over every message of its topics, held back by the service until it can take them.

    ::

        with LosslessReceiver("tcp://127.0.0.1:5562", name="recorder") as batches:
            for message in batches:
                save(message)

    The service sends only as many messages as this receiver granted credit for, and holds the whole
    pipeline back meanwhile (up to its configured limit): consume promptly. A thread answers the
    service's heartbeats, so the code in the loop may take its time with a single message.

    When the service goes silent or drops this receiver, what has been received is still delivered;
    then the iteration raises :class:`ConnectionRefused`, and a new receiver has to be made. After
    :class:`NoAnswer`, which says that nothing came within ``timeout``, it can go on. A message that
    breaks the protocol raises its :class:`ProtocolError`; iterating on goes on with the next.

    Args:
        address: the service's lossless address.
        name: who this is; the service shows it to the operator.
        topics: the message types wanted, as for :class:`Subscriber`.
        credit: how many messages may wait here.
        timeout: seconds to wait for the service to answer, 1 at least, and then for each next
            message, before :class:`NoAnswer` is raised. ``None`` waits for messages for ever, and
            10 s for the service; 0 only takes what is there.
        max_bytes: the largest message to accept.
        server_key: the service's public CURVE key (Z85), where it has one.

    Raises:
        NoAnswer: no service answered.
        ConnectionRefused: the service refused; the message says why.
        InvalidUse: an argument cannot be as it is.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5562",
        *,
        name: str,
        topics: str | Iterable[str] = _TOPICS,
        credit: int = 64,
        timeout: float | None = None,
        max_bytes: int = MAX_MESSAGE_BYTES,
        server_key: str | bytes | None = None,
    ) -> None:
        self.address = address
        self.topics = stream_topics(topics)
        credit = checked_count("credit", credit)
        try:
            self._register = Register(name=name, topics=self.topics, credit=credit)
        except ValidationError as error:
            raise InvalidUse(f"This receiver cannot be: {explain(error)}.") from None
        self.name = self._register.name
        self._credit = credit
        self._timeout = None if timeout is None else checked_timeout(timeout)
        self._max_bytes = max_bytes
        self._gaps = GapCounter()

        self._pid = os.getpid()
        self._publisher = uuid.uuid4().hex
        self._sequences: dict[str, int] = {}

        # Shared by the user's thread and ours, under this lock.
        self._state = threading.Condition()
        self._waiting: deque[list[zmq.Frame]] = deque()
        self._consumed = 0  # since credit was last granted
        self._failure: Prenet4dError | None = None
        self._registered = False
        self._closing = False

        # Used by our thread alone.
        self._granted = credit
        self._silence_allowed = 10.0 if timeout is None else max(timeout, LEAST_ANSWER_S)
        self._beat_every: float | None = None
        self._heard = self._spoke = time.monotonic()

        # No high-water mark: the credit bounds what can wait.
        self._socket = connect(
            zmq.DEALER,
            address,
            usual_port=5562,
            server_key=server_key,
            options={zmq.RCVHWM: 0},
        )
        self._ring, self._bell = (self._socket.context.socket(zmq.PAIR) for _ in range(2))
        self._bell.bind("inproc://bell")
        self._ring.connect("inproc://bell")
        self._thread = threading.Thread(target=self._run, name=f"lossless {name}", daemon=True)
        self._thread.start()
        try:
            self._await_service()
        except BaseException:
            self.close()
            raise

    @property
    def missed(self) -> int:
        """Messages missed so far: 0, unless something is broken."""
        return self._gaps.missed

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            NoAnswer: nothing came within ``timeout`` seconds, from a service that is there.
            ConnectionRefused: the service dropped this receiver, or is gone; the message says why.
            ProtocolError: the next message breaks the protocol.
        """
        check_process(self._pid, self)
        with self._state:
            came = self._wait_until(
                lambda: bool(self._waiting) or self._failure is not None or self._closing,
                self._timeout,
            )
            if self._closing:
                raise InvalidUse("This LosslessReceiver is closed: make a new one.")
            if not came:
                raise NoAnswer(
                    f"Nothing came from {self.address} within {self._timeout:g} s: "
                    "the service is there, but seems to get no frames."
                )
            if not self._waiting:
                assert self._failure is not None
                raise self._failure
            frames = self._waiting.popleft()
            self._consumed += 1
            # Half the credit at once: one message for many, and the service never runs dry.
            if 2 * self._consumed >= self._credit:
                self._wake()
        message = decode([frame.buffer for frame in frames], max_bytes=self._max_bytes)
        gap = self._gaps.gap_before(message.header)
        return replace(message, gap=gap) if gap else message

    def close(self) -> None:
        """Say goodbye to the service; may be called twice."""
        if self._pid != os.getpid():  # the thread and the connection are the other process's
            return
        with self._state:
            self._closing = True
            self._state.notify_all()
            self._wake()
        self._thread.join()

    def _await_service(self) -> None:
        self._wait_until(lambda: self._registered or self._failure is not None, None)
        if self._failure is not None:
            raise self._failure

    def _wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        deadline = deadline_after(timeout)
        with self._state:
            while not self._state.wait_for(condition, next_slice(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    return False
        return True

    def _wake(self) -> None:
        if not self._ring.closed:
            with suppress(zmq.Again):  # so many rings are waiting that one more changes nothing
                self._ring.send(b"", zmq.NOBLOCK)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- our thread: it owns the socket -----------------------------------------------------------

    def _run(self) -> None:
        try:
            self._say(self._register)
            self._converse()
        except Prenet4dError as error:
            self._fail(error)
        finally:
            self._fail(Prenet4dError("The receiving thread has ended unexpectedly: see its log."))
            self._bell.close()
            with self._state:
                self._ring.close()
            disconnect(self._socket, linger=_GOODBYE_LINGER_S)

    def _converse(self) -> None:
        """Receive, grant credit and keep the heart beating, until this receiver is closed."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while True:
            due = self._next_duty()
            ready = dict(poller.poll(milliseconds(due - time.monotonic()) + 1))
            if self._bell in ready:
                self._bell.recv()
                if self._closing:
                    self._say(Goodbye())
                    return
                self._grant()
            now = time.monotonic()
            # Time in which this thread did not run is no silence: its machine may have stood still,
            # and the service's heart with it.
            self._heard += max(0.0, now - due - _OVERSLEPT_S)
            if self._socket in ready:
                self._heard = now
                self._hear(self._socket.recv_multipart(copy=False))
            elif now - self._heard >= self._silence_allowed:
                raise self._silence(now - self._heard)
            if self._beat_every is not None and now - self._spoke >= self._beat_every:
                self._say(Heartbeat())

    def _next_duty(self) -> float:
        give_up = self._heard + self._silence_allowed
        return give_up if self._beat_every is None else min(give_up, self._spoke + self._beat_every)

    def _grant(self) -> None:
        with self._state:
            more, self._consumed = self._consumed, 0
        if more:
            self._granted += more
            self._say(Credit(credit=more))

    def _hear(self, frames: list[zmq.Frame]) -> None:
        kind = bytes(frames[0].buffer[:64]).decode("ascii", "replace")
        if kind not in _CONVERSATION:
            if not self._granted:
                raise ProtocolError("The service sent more messages than it had credit for.")
            self._granted -= 1
            with self._state:
                self._waiting.append(frames)
                self._state.notify_all()
            return
        header = decode([frame.buffer for frame in frames], max_bytes=self._max_bytes).header
        if isinstance(header, Registered):
            self._silence_allowed = header.heartbeat_s
            self._beat_every = header.heartbeat_s / 4
            with self._state:
                self._registered = True
                self._state.notify_all()
        elif isinstance(header, Goodbye):
            why = header.reason.rstrip(".") or "it gives no reason"
            raise ConnectionRefused(f"The service at {self.address} lets {self.name!r} go: {why}.")

    def _say(self, header: Header) -> None:
        sequence = self._sequences.get(header.type, 0)
        self._sequences[header.type] = sequence + 1
        update = {"publisher": self._publisher, "sequence": sequence}
        self._socket.send_multipart(encode(header.model_copy(update=update)))
        self._spoke = time.monotonic()

    def _fail(self, error: Prenet4dError) -> None:
        with self._state:
            if self._failure is None:
                self._failure = error
            self._state.notify_all()

    def _silence(self, seconds: float) -> Prenet4dError:
        if self._registered:
            return ConnectionRefused(
                f"The service at {self.address} has been silent for {seconds:.1f} s and is "
                "taken to be gone: begin anew when it is back."
            )
        return NoAnswer(
            f"No service answered at {self.address} within {seconds:.1f} s: "
            "is it running, is this its lossless address, and does it ask for another key?"
        )
