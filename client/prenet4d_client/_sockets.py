"""How every client opens and closes its ZeroMQ socket."""

from __future__ import annotations

import os
import struct
import time
from numbers import Integral, Real
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from prenet4d_client.addresses import address_fault, is_ipv6
from prenet4d_client.errors import InvalidUse

# Held until they are closed: a forgotten context that the garbage collector finds before it finds
# the context's socket would wait for that socket for ever. With each, the process that opened it.
_contexts: dict[zmq.Context[zmq.Socket[bytes]], int] = {}

LEAST_ANSWER_S = 1.0
"""The service gets so long for an answer, however short the wait for messages is to be."""

_LONGEST_WAIT_S = 2e6  # ZeroMQ counts milliseconds in 31 bits
_MOST_MESSAGES = (1 << 31) - 1  # and messages too


def connect(
    kind: int,
    address: str,
    *,
    usual_port: int,
    server_key: str | bytes | None,
    keys: tuple[str | bytes, str | bytes] | None = None,
    options: dict[int, Any],
) -> zmq.Socket[bytes]:
    """Open a socket of this kind towards ``address``; ``options`` are set before it connects.

    With ``server_key`` it is encrypted, under ``keys`` (public, secret) where the service is to
    know who this is, and else under a pair made for this connection alone.

    It has a context of its own, because only a context's end waits until all is handed over.

    Raises:
        InvalidUse: the address or the key cannot be one.
    """
    if keys is not None and server_key is None:
        raise InvalidUse("keys serve only beside the service's own public key, server_key.")
    if fault := address_fault(address, usual_port):
        raise InvalidUse(fault)
    context = zmq.Context()
    _contexts[context] = os.getpid()
    socket = context.socket(kind)
    try:
        socket.linger = 0
        for option, value in options.items():
            socket.setsockopt(option, value)
        if server_key is not None:
            _encrypt(socket, server_key, keys)
        socket.ipv6 = is_ipv6(address)
        socket.connect(address)
    except zmq.ZMQError as error:
        disconnect(socket)
        raise InvalidUse(
            f"Cannot connect to {address!r}: {error}. "
            f"An address looks like tcp://host:{usual_port}."
        ) from None
    except BaseException:
        disconnect(socket)
        raise
    return socket


def disconnect(socket: zmq.Socket[bytes], *, linger: float = 0.0) -> None:
    """Close the socket, and wait up to ``linger`` seconds until what was sent is handed over."""
    socket.close(linger=milliseconds(linger))
    socket.context.term()
    _contexts.pop(socket.context, None)


def hand_over(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], patience: float) -> bool:
    """Disconnect once all that was sent is handed over, or after ``patience`` seconds.

    Returns:
        Whether the connection broke before. ``monitor`` tells that, and when the socket is gone.
    """
    if not opened_here(socket):  # the one that opened it does this
        return False
    while monitor.poll(0):  # what broke until now broke no handing over
        recv_monitor_message(monitor)
    socket.close(linger=milliseconds(patience))
    broke, deadline = False, deadline_after(patience + 1)
    while wait(monitor, deadline):
        if recv_monitor_message(monitor)["event"] == zmq.EVENT_MONITOR_STOPPED:
            break
        broke = True
    monitor.close()
    disconnect(socket)
    return broke


def opened_here(socket: zmq.Socket[bytes]) -> bool:
    """Whether this process opened the socket, and was not forked since: only it may touch it."""
    return _contexts.get(socket.context) == os.getpid()


def check_usable(socket: zmq.Socket[bytes], owner: object) -> None:
    """Raise InvalidUse where ``owner`` was closed, or this process was forked since it was made."""
    pid = _contexts.get(socket.context)
    if pid is None or socket.closed:
        raise InvalidUse(f"This {type(owner).__name__} is closed: make a new one.")
    check_process(pid, owner)


def check_process(pid: int, owner: object) -> None:
    """Raise InvalidUse where this process is not ``pid``: no socket survives a fork."""
    if pid != os.getpid():
        raise InvalidUse(
            f"This {type(owner).__name__} was made before this process was forked from another: "
            "make one here."
        )


def _encrypt(
    socket: zmq.Socket[bytes],
    server_key: str | bytes,
    keys: tuple[str | bytes, str | bytes] | None,
) -> None:
    """Encrypt with CURVE; the service proves with its key that it is the one meant."""
    if not zmq.has("curve"):
        raise InvalidUse("This pyzmq was built without CURVE: install one of its wheels.")
    socket.curve_serverkey = _key(server_key, "server_key must be the service's public")
    if keys is None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    else:
        if not isinstance(keys, tuple | list) or len(keys) != 2:
            raise InvalidUse("keys must be a pair: this client's public and secret CURVE key.")
        public, secret = (_key(key, "keys must be this client's public and secret") for key in keys)
        socket.curve_publickey, socket.curve_secretkey = public, secret


def _key(key: str | bytes, what: str) -> bytes:
    try:
        text = key.encode() if isinstance(key, str) else key
        raw = z85.decode(text)
    except (TypeError, ValueError, KeyError, struct.error):
        raw = b""
    if len(raw) != 32:
        raise InvalidUse(f"{what} CURVE key: 40 characters in Z85.")
    return text


def checked_count(what: str, count: int) -> int:
    """How many messages may wait; raises InvalidUse where it is no count that ZeroMQ can keep.

    It would take 0 for no limit at all.
    """
    if not isinstance(count, Integral) or not 1 <= count <= _MOST_MESSAGES:
        raise InvalidUse(
            f"{what} is {count!r}; it must be a whole number of messages from 1 to "
            f"{_MOST_MESSAGES}."
        )
    return int(count)


def checked_timeout(timeout: float) -> float:
    """The timeout; raises InvalidUse where it is no number of seconds from 0."""
    if not isinstance(timeout, Real) or not timeout >= 0:  # NaN is not
        raise InvalidUse(f"timeout is {timeout!r}; it must be a number of seconds from 0.")
    return timeout


def wait(socket: zmq.Socket[bytes], deadline: float | None) -> bool:
    """Whether something can be received before ``deadline``; ``None`` waits for ever."""
    while not socket.poll(milliseconds(next_slice(deadline))):
        if deadline is not None and time.monotonic() >= deadline:
            return False
    return True


def next_slice(deadline: float | None) -> float:
    """How long to wait before looking up: Windows lets Ctrl-C through only between waits."""
    return 0.5 if deadline is None else max(0.0, min(0.5, deadline - time.monotonic()))


def deadline_after(timeout: float | None) -> float | None:
    """When ``timeout`` seconds from now will be up."""
    return None if timeout is None else time.monotonic() + timeout


def milliseconds(seconds: float) -> int:
    """Seconds as ZeroMQ wants them."""
    return round(1000 * min(max(0.0, seconds), _LONGEST_WAIT_S))
