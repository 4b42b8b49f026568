"""The control socket: answers commands, one reply for each request."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import zmq

from prenet4d_client.errors import ProtocolError
from prenet4d_client.messages import ControlReply, ControlRequest, Header
from prenet4d_client.wire import Array, decode, encode
from prenet4d_server.errors import COMMAND_FAULT, CommandFailed
from prenet4d_server.sockets import KeyPair, bind, protect

Answer: TypeAlias = tuple[dict[str, Any], dict[str, Array]]
"""A command's result and arrays."""


@dataclass(frozen=True, slots=True)
class Later:
    """The answer to a command that takes its time; others are answered meanwhile."""

    done: Future[Any]
    """When it is carried out, or why it failed: a CommandFailed."""
    answer: Callable[[], Answer]
    """Called then, on the control thread."""
    patience_s: float = math.inf
    """What has not begun by then is not carried out any more."""

    def result(self) -> Answer:
        """The answer, once it is done; raises CommandFailed where it failed."""
        try:
            self.done.result()
        except CancelledError:
            raise CommandFailed(
                "The pipeline is busy: a batch takes long, or a lossless receiver holds it back. "
                "Ask again."
            ) from None
        return self.answer()


Command: TypeAlias = Callable[[dict[str, Any]], Answer | Later]

ASKING = frozenset({"status", "config", "save_calibration", "maps", "snapshot"})
"""Commands that change nothing."""
# A calibration is the largest thing that a request carries.
_MAX_BYTES = 1 << 20
LINGER_MS = 500
log = logging.getLogger(__name__)


class Control:
    """A thread with a ROUTER socket and a table of commands."""

    def __init__(
        self,
        address: str,
        *,
        publisher: str,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: KeyPair | None = None,
        operators: Collection[str] | None = None,
    ) -> None:
        """Bind; :meth:`start` begins to answer.

        Args:
            address: where to listen.
            publisher: the service's life.
            context: ZeroMQ's.
            keys: encrypts the socket, where given.
            operators: public CURVE keys of those who may change something; ``None``: everybody.

        Raises:
            BindError: the address cannot be bound.
        """
        self._commands: Mapping[str, Command] = {}
        self._publisher = publisher
        self._operators = operators
        self._socket = context.socket(zmq.ROUTER)
        try:
            protect(self._socket, keys)
            self._socket.maxmsgsize = 4 * _MAX_BYTES  # what is larger is not even received
            self.address = bind(self._socket, address, "control.address")
        except BaseException:
            self._socket.close(0)
            raise
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._due = os.eventfd(0, os.EFD_CLOEXEC)
        self._late: deque[tuple[bytes, int, Later]] = deque()
        """What can be answered now: who asked, the request's sequence number, and the answer."""
        self._begun: list[tuple[float, Later]] = []
        """What takes its time, each with the time at which patience ends."""
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self, commands: Mapping[str, Command]) -> None:
        """Answer from now on, what has been asked already included.

        Args:
            commands: name → what to do with the request's arguments, without waiting for
                anything; raises CommandFailed to refuse, with a sentence that is sent to the
                client.
        """
        self._commands = commands
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are or will be answered."""
        return self._thread.ident is None or self._thread.is_alive()

    def close(self) -> None:
        """Stop answering."""
        with self._closing:
            self._closed = True
        os.eventfd_write(self._stop, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close(LINGER_MS)
        os.close(self._stop)
        os.close(self._due)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        poller.register(self._due, zmq.POLLIN)
        while self._stop not in (ready := dict(poller.poll(self._give_up()))):
            if self._socket in ready:
                identity, *parts = self._socket.recv_multipart(copy=False)
                self._answer(identity.bytes, parts)
            if self._due in ready:
                self._answer_late()

    def _answer(self, asker: bytes, parts: list[zmq.Frame]) -> None:
        """Reply to a request, now or later."""
        try:
            request = decode([part.bytes for part in parts], max_bytes=_MAX_BYTES).header
        except ProtocolError as error:
            log.warning("A control request cannot be read: %s", error)
            self._reply(asker, self._refusal(0, str(error)), {})
            return
        self._settle(asker, request.sequence, lambda: self._carry_out(request, parts))

    def _settle(self, asker: bytes, sequence: int, work: Callable[[], Answer | Later]) -> None:
        """Reply with what comes of some work, or have it done later."""
        try:
            answer = work()
        except CommandFailed as error:
            self._reply(asker, self._refusal(sequence, str(error)), {})
        except Exception:
            # A fault in one command must not leave a running scan without all of them.
            log.exception("A command failed by a fault in the program.")
            self._reply(asker, self._refusal(sequence, COMMAND_FAULT), {})
        else:
            if isinstance(answer, Later):
                self._begun.append((time.monotonic() + answer.patience_s, answer))
                answer.done.add_done_callback(lambda _: self._is_due(asker, sequence, answer))
            else:
                self._reply(asker, self._success(sequence, answer), answer[1])

    def _carry_out(self, request: Header, parts: list[zmq.Frame]) -> Answer | Later:
        """Carry out what is asked, or begin to.

        Raises:
            CommandFailed: it cannot be done, or not for this client.
        """
        if not isinstance(request, ControlRequest):
            raise CommandFailed(f"A {request.type} message is no control request.")
        command = self._commands.get(request.command)
        if command is None:
            raise CommandFailed(
                f"There is no command {request.command!r}; there are {', '.join(self._commands)}."
            )
        if not (request.command in ASKING or self._may_command(parts[0])):
            raise CommandFailed(
                f"Only operators may {request.command}: this client's key is not among "
                "security.operator_keys."
            )
        return command(request.arguments)

    def _give_up(self) -> int | None:
        """Cancel what has waited for too long; return the ms until something else will have."""
        now = time.monotonic()
        self._begun = [(until, later) for until, later in self._begun if not later.done.done()]
        for until, later in self._begun:
            if until <= now:
                later.done.cancel()  # what has begun by now goes on, and is answered in the end
        ends = [until for until, _ in self._begun if now < until < math.inf]
        return math.ceil(1e3 * (min(ends) - now)) if ends else None

    def _is_due(self, asker: bytes, sequence: int, later: Later) -> None:
        """Have the control thread answer; on any thread, also after the end of this."""
        with self._closing:
            if not self._closed:
                self._late.append((asker, sequence, later))
                os.eventfd_write(self._due, 1)

    def _answer_late(self) -> None:
        os.eventfd_read(self._due)
        while self._late:
            asker, sequence, later = self._late.popleft()
            self._settle(asker, sequence, later.result)

    def _may_command(self, part: zmq.Frame) -> bool:
        return self._operators is None or part.get("User-Id") in self._operators

    def _success(self, sequence: int, answer: Answer) -> ControlReply:
        return ControlReply(ok=True, result=answer[0], sequence=sequence, publisher=self._publisher)

    def _refusal(self, sequence: int, error: str) -> ControlReply:
        return ControlReply(ok=False, error=error, sequence=sequence, publisher=self._publisher)

    def _reply(self, identity: bytes, reply: ControlReply, arrays: Mapping[str, Array]) -> None:
        try:
            parts = encode(reply, arrays)
        except ProtocolError as error:
            log.warning("An answer cannot be sent: %s", error)
            parts = encode(self._refusal(reply.sequence, f"The answer cannot be sent: {error}"))
        with contextlib.suppress(zmq.ZMQError):  # the client has gone in the meantime
            self._socket.send_multipart([identity, *parts], zmq.NOBLOCK)
