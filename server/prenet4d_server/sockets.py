"""Opening ZeroMQ sockets so that errors are sentences and nothing is reachable by accident."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket as system
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import zmq
import zmq.auth
from zmq.utils import z85

from prenet4d_client.addresses import address_fault, is_ipv6
from prenet4d_server.errors import BindError, ConfigError

KeyPair: TypeAlias = tuple[bytes, bytes]
"""CURVE keys ``(public, secret)``, Z85."""

_REASONS = {
    errno.EADDRINUSE: "another program uses the port; stop it, or choose another port",
    errno.EADDRNOTAVAIL: "the address is not one of this machine's",
    errno.ENODEV: "the address is not one of this machine's",
    errno.EINVAL: "it is not a valid address",
    errno.EACCES: "this user may not; choose a port from 1024 on, or another path",
    errno.EPROTONOSUPPORT: "the transport is unknown; use tcp:// or ipc://",
}


def bind(socket: zmq.Socket[bytes], address: str, what: str) -> str:
    """Bind and return the actual address, with the port that ``*`` became.

    An ``ipc`` path is a file, which is removed when the socket has been closed and is forgotten.

    Args:
        socket: the socket to bind.
        address: ``tcp://host:port`` or ``ipc://path``.
        what: the setting that holds the address, for the error's sentence.

    Raises:
        BindError: the address cannot be bound; the message says why and what to do.
    """
    if fault := address_fault(address):
        raise BindError(f"Cannot listen ({what}): {fault}")
    path = _file_of(address)
    if path is not None and (why := _taken(path)):
        raise BindError(f"Cannot listen on {address} ({what}): {why}.")
    socket.ipv6 = is_ipv6(address)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise BindError(f"Cannot listen on {address} ({what}): {refusal(error)}.") from None
    if path is not None:
        weakref.finalize(socket, _remove, path.absolute())
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def _file_of(address: str) -> Path | None:
    """The file that ZeroMQ makes for an address, if it is not one of its own choice."""
    transport, _, path = address.partition("://")
    named = transport == "ipc" and path != "*" and not path.startswith("@")
    return Path(path) if named else None


def _taken(path: Path) -> str:
    """Why nobody may listen at a path, without a full stop; empty: it is free, or left behind.

    ZeroMQ itself deletes whatever is there.
    """
    if not os.access(path, os.F_OK):
        return ""
    if not path.is_socket():
        return "there is a file of that name; choose another path"
    with system.socket(system.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            return ""
    return "another program listens there; stop it, or choose another path"


def _remove(path: Path) -> None:
    """Remove a socket's file, unless somebody else listens there by now."""
    with contextlib.suppress(OSError):
        if not _taken(path):
            path.unlink()


def refusal(error: Exception) -> str:
    """Why an address cannot be bound, and what to do, without a full stop."""
    if not isinstance(error, OSError | zmq.ZMQError):
        return "it is not a valid address; write for example tcp://127.0.0.1:5564"
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def protect(socket: zmq.Socket[bytes], keys: KeyPair | None) -> None:
    """Make the socket a CURVE server, where there are keys: one needs the public key to get in."""
    if keys is not None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys


def is_local(address: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        return True
    host = parts.netloc.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "lo")


def unknown_host(address: str) -> str:
    """A sentence where this machine does not know the name in a tcp address; else empty.

    ZeroMQ goes on trying in silence. Asking may take seconds where no name server answers.
    """
    parts = urlsplit(address)
    host = parts.netloc.rpartition(":")[0].strip("[]")
    if parts.scheme != "tcp" or not host:
        return ""
    try:
        system.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return (
            f"This machine knows no host {host!r}: check the name, or give the address in numbers."
        )
    return ""


def within_reach(address: str) -> str:
    """The address for a client on this machine, where the service listens on all interfaces."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def is_curve_key(text: str) -> bool:
    """Whether a text can be a CURVE key: 32 bytes in Z85."""
    try:
        return len(z85.decode(text)) == 32
    except (ValueError, KeyError):
        return False


@contextlib.contextmanager
def knowing_clients(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[None]:
    """Have the context's CURVE sockets tell each client's public key as its messages' User-Id."""
    from zmq.auth.thread import ThreadAuthenticator  # here: it loads asyncio, and few need it

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    try:
        # Who knows the service's key gets in; what a client may do is decided by its own.
        authenticator.configure_curve(domain="*", location=zmq.auth.CURVE_ALLOW_ANY)
        yield
    finally:
        authenticator.stop()


def generate_keys(directory: Path) -> tuple[Path, Path]:
    """Make the service's CURVE key pair as two files, which are never overwritten.

    Returns:
        ``(public, secret)``: give ``prenet4d.key`` to clients, and name ``prenet4d.key_secret``
        (readable by its owner only) in ``security.secret_key_file``.

    Raises:
        ConfigError: the files exist already, or the directory cannot be written.
    """
    for file in (directory / "prenet4d.key_secret", directory / "prenet4d.key"):
        if file.exists():
            raise ConfigError(f"{file} exists already. Move it first, or use another directory.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mask = os.umask(0o077)
        try:
            public, made = zmq.auth.create_certificates(directory, "prenet4d")
        finally:
            os.umask(mask)
        Path(public).chmod(0o644)
    except OSError as error:
        raise ConfigError(f"Cannot write keys to {directory}: {error.strerror}.") from None
    return Path(public), Path(made)


def load_keys(secret_key_file: Path | None) -> KeyPair | None:
    """Read the key pair from the secret key's file; ``None`` for no file.

    Raises:
        ConfigError: the file cannot be read or holds no secret key.
    """
    if secret_key_file is None:
        return None
    try:
        secret_key_file.stat()  # pyzmq calls a file that is not there invalid
        public, secret = zmq.auth.load_certificate(secret_key_file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"The key file {secret_key_file} cannot be read: {why}.") from None
    if secret is None:
        raise ConfigError(
            f"{secret_key_file} holds no secret key; name the file that ends in .key_secret."
        )
    if not all(is_curve_key(key.decode(errors="replace")) for key in (public, secret)):
        raise ConfigError(f"{secret_key_file} is damaged: its keys are not 40 characters in Z85.")
    return public, secret
