"""Whether a detector has been reached at all: ZeroMQ tries for ever, and says nothing."""

from __future__ import annotations

import time
from typing import Any

import zmq

from prenet4d_server.errors import NotReached
from prenet4d_server.sockets import unknown_host

PATIENCE_S = 10.0
"""How long a detector may take to answer before a person is told that it does not."""


class Reach:
    """Watches a socket until it has shaken hands with a peer for the first time.

    Args:
        socket: not connected yet.
        address: where it will connect to.
        patience_s: how long that may take.
    """

    def __init__(
        self, socket: zmq.Socket[Any], address: str, patience_s: float = PATIENCE_S
    ) -> None:
        self._socket = socket
        self._address = address
        self._due = time.monotonic() + patience_s
        self._monitor: zmq.Socket[Any] | None = socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED
        )

    def trouble(self) -> NotReached | None:
        """Why nothing comes, once, when the patience is at its end."""
        if self._monitor is None:
            return None
        if self._monitor.poll(0):
            self.close()
            return None
        if time.monotonic() < self._due:
            return None
        self.close()
        why = unknown_host(self._address) or (
            f"Nothing answers at {self._address}: is the detector on, is its stream enabled, and "
            "is this the stream's address?"
        )
        return NotReached(f"{why} Trying again and again.")

    def close(self) -> None:
        """Watch no longer; may be called twice."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close()
            self._monitor = None
