"""The control socket: answers commands, one reply for each request."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import zmq

from prenet4d_client.errors import ProtocolError
from prenet4d_client.messages import ControlReply, ControlRequest
from prenet4d_client.wire import Array, decode, encode
from prenet4d_server.errors import CommandFailed
from prenet4d_server.sockets import KeyPair, bind, protect

Answer: TypeAlias = tuple[dict[str, Any], dict[str, Array]]
"""A command's result and arrays."""
Command: TypeAlias = Callable[[dict[str, Any]], Answer]

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
            self.address = bind(self._socket, address, "control.address")
        except BaseException:
            self._socket.close(0)
            raise
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self, commands: Mapping[str, Command]) -> None:
        """Answer from now on, what has been asked already included.

        Args:
            commands: name → what to do with the request's arguments; raises CommandFailed to
                refuse, with a sentence that is sent to the client.
        """
        self._commands = commands
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are or will be answered."""
        return self._thread.ident is None or self._thread.is_alive()

    def close(self) -> None:
        """Stop answering."""
        os.eventfd_write(self._stop, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close(LINGER_MS)
        os.close(self._stop)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while self._stop not in (ready := dict(poller.poll())):
            if self._socket in ready:
                identity, *parts = self._socket.recv_multipart(copy=False)
                self._reply(identity.bytes, *self._answer(parts))

    def _answer(self, parts: list[zmq.Frame]) -> tuple[ControlReply, dict[str, Array]]:
        try:
            request = decode([part.bytes for part in parts], max_bytes=_MAX_BYTES).header
        except ProtocolError as error:
            log.warning("A control request cannot be read: %s", error)
            return self._refusal(0, str(error)), {}
        if not isinstance(request, ControlRequest):
            return self._refusal(
                request.sequence, f"A {request.type} message is no control request."
            ), {}
        command = self._commands.get(request.command)
        if command is None:
            return self._refusal(
                request.sequence,
                f"There is no command {request.command!r}; there are {', '.join(self._commands)}.",
            ), {}
        if not (request.command in ASKING or self._may_command(parts[0])):
            return self._refusal(
                request.sequence,
                f"Only operators may {request.command}: this client's key is not among "
                "security.operator_keys.",
            ), {}
        try:
            result, arrays = command(request.arguments)
        except CommandFailed as error:
            return self._refusal(request.sequence, str(error)), {}
        reply = ControlReply(
            ok=True, result=result, sequence=request.sequence, publisher=self._publisher
        )
        return reply, arrays

    def _may_command(self, part: zmq.Frame) -> bool:
        return self._operators is None or part.get("User-Id") in self._operators

    def _refusal(self, sequence: int, error: str) -> ControlReply:
        return ControlReply(ok=False, error=error, sequence=sequence, publisher=self._publisher)

    def _reply(self, identity: bytes, reply: ControlReply, arrays: Mapping[str, Array]) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the client has gone in the meantime
            self._socket.send_multipart([identity, *encode(reply, arrays)], zmq.NOBLOCK)
