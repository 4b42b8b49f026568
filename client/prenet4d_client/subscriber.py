"""``Subscriber``: what the service publishes, as an iterator."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import zmq

from prenet4d_client._gaps import GapCounter
from prenet4d_client._sockets import (
    check_usable,
    checked_count,
    checked_timeout,
    connect,
    deadline_after,
    disconnect,
    milliseconds,
    wait,
)
from prenet4d_client.errors import InvalidUse, NoAnswer, ProtocolError
from prenet4d_client.messages import STREAM_TOPICS
from prenet4d_client.wire import MAX_MESSAGE_BYTES, Message, decode

if TYPE_CHECKING:
    import zmq.asyncio

_log = logging.getLogger(__name__)


class Subscriber:
    """Iterates over what the service publishes: ``for`` and ``async for`` both work.

    ::

        with Subscriber("tcp://127.0.0.1:5561", topics="corrected") as stream:
            for batch in stream:
                print(batch.indices, batch.patterns.shape)

    Fields and arrays of a message are its attributes. The service waits for no subscriber: one that
    is too slow misses messages, and is told so by ``message.gap`` (missed just before this one) and
    ``missed`` (in all). Use :class:`LosslessReceiver` where nothing may be missed. It reconnects by
    itself when the service is started again. A message that breaks the protocol is skipped and
    counted in ``bad``; what is wrong with it is logged, once for those that come alike.

    Args:
        address: the service's stream address.
        topics: one message type or several: ``telemetry``, ``corrected``, ``aligned``, ``mean``,
            ``preview``, ``maps``, ``event``, ``acquisition_start``, ``acquisition_end``.
        timeout: seconds to wait for the next message before :class:`NoAnswer` is raised; ``None``
            waits for ever, and 0 only takes what is there, as a timer in a program with windows
            does.
        queue: how many messages may wait here before newer ones are missed. More wait on the way:
            ``stream.high_water`` of them in the service, and what the network's buffers hold.
        max_bytes: the largest message to accept.
        server_key: the service's public CURVE key (Z85), where it has one.

    Raises:
        InvalidUse: there is no such topic, or another argument cannot be as it is.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5561",
        topics: str | Iterable[str] = "telemetry",
        *,
        timeout: float | None = None,
        queue: int = 64,
        max_bytes: int = MAX_MESSAGE_BYTES,
        server_key: str | bytes | None = None,
    ) -> None:
        self.address = address
        self.topics = stream_topics(topics)
        self.bad = 0
        self._fault = ""
        self._timeout = None if timeout is None else checked_timeout(timeout)
        self._max_bytes = max_bytes
        self._gaps = GapCounter()
        self._socket = connect(
            zmq.SUB,
            address,
            usual_port=5561,
            server_key=server_key,
            options={zmq.RCVHWM: checked_count("queue", queue)},
        )
        for topic in self.topics:
            self._socket.subscribe(topic)
        self._async_socket: zmq.asyncio.Socket | None = None
        self._forgotten = weakref.finalize(self, disconnect, self._socket)
        self._forgotten.atexit = False  # another thread may be using it

    @property
    def missed(self) -> int:
        """Messages missed so far."""
        return self._gaps.missed

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            NoAnswer: nothing that can be used came within ``timeout`` seconds.
            InvalidUse: this was closed, perhaps while it waited.
        """
        deadline, bad = deadline_after(self._timeout), self.bad
        try:
            while wait(self._open(), deadline):
                if (message := self._take()) is not None:
                    return message
        except zmq.ZMQError:
            self._open()  # or another thread has closed it
            raise
        raise self._silence(self.bad - bad)

    async def receive_async(self) -> Message:
        """The same as :meth:`receive`, for asyncio; several tasks take turns at the messages.

        Raises:
            NoAnswer: nothing that can be used came within ``timeout`` seconds.
            InvalidUse: this was closed while it waited.
        """
        import asyncio  # here, because loading it takes time that few need to spend

        import zmq.asyncio

        socket = self._open()
        if self._async_socket is None:
            self._async_socket = zmq.asyncio.Socket(shadow=socket)
            self._forgotten.detach()  # the event loop goes on using it
        deadline, bad = deadline_after(self._timeout), self.bad
        try:
            while True:
                left = None if deadline is None else milliseconds(deadline - time.monotonic())
                ready = await self._async_socket.poll(left)
                self._open()  # or another task has closed it
                if ready:
                    if (message := self._take()) is not None:
                        return message
                elif deadline is not None and time.monotonic() >= deadline:
                    raise self._silence(self.bad - bad)
        except asyncio.CancelledError:  # so pyzmq tells of a socket that was closed, too
            if (task := asyncio.current_task()) is not None and not task.cancelling():
                self._open()
            raise

    def close(self) -> None:
        """Leave the stream; may be called twice."""
        if self._async_socket is not None:
            self._async_socket.close()
        disconnect(self._socket)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        return self.receive()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        return await self.receive_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> zmq.Socket[bytes]:
        check_usable(self._socket, self)
        return self._socket

    def _take(self) -> Message | None:
        """Read what is waiting, without waiting for it; ``None`` where it is not usable."""
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:  # another task was quicker
            return None
        try:
            message = decode([frame.buffer for frame in frames], max_bytes=self._max_bytes)
        except ProtocolError as error:
            self.bad += 1
            if str(error) != self._fault:
                self._fault = str(error)
                _log.warning("Skipped a message from %s: %s", self.address, error)
            return None
        gap = self._gaps.gap_before(message.header)
        return replace(message, gap=gap) if gap else message

    def _silence(self, bad: int) -> NoAnswer:
        if bad:
            return NoAnswer(
                f"Nothing that can be used came from {self.address} within {self._timeout:g} s. "
                f"Skipped: {bad}; of the last one: {self._fault}"
            )
        return NoAnswer(
            f"Nothing came from {self.address} within {self._timeout:g} s on "
            f"{', '.join(self.topics)}: is the service running, is this its stream address, "
            "does it ask for another key, and does it get frames?"
        )


def stream_topics(topics: str | Iterable[str]) -> tuple[str, ...]:
    """The topics as a tuple; raises InvalidUse for one that is not published."""
    if isinstance(topics, str):
        topics = (topics,)
    chosen = tuple(topics) if isinstance(topics, Iterable) else (topics,)
    for topic in chosen or ("",):
        if topic not in STREAM_TOPICS:
            raise InvalidUse(
                f"There is no topic {topic!r}: choose from {', '.join(STREAM_TOPICS)}."
            )
    return chosen
