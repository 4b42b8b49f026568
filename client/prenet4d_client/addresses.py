"""What an address looks like: mistakes that ZeroMQ would keep to itself."""

from __future__ import annotations

_LAST_PORT = 65535


def is_ipv6(address: str) -> bool:
    """Whether a host stands there as an IPv6 number, of which a ZeroMQ socket has to be told."""
    return address.count(":") > 2  # tcp://host:port has two


def address_fault(address: str, usual_port: int = 5560) -> str:
    """What is wrong with the form of an address, as a sentence; empty where it can be one.

    The sentence shows an address with the port that is usual there.

    ZeroMQ cuts a port's number to 16 bits without a word: 99999 would be port 34463. It would try
    to connect to port 0, where nobody can listen, for ever.
    """
    example = f"tcp://127.0.0.1:{usual_port}"
    transport, mark, where = str(address).partition("://")  # not everybody checks types
    if not mark or transport not in ("tcp", "ipc") or not where:
        return f"{address!r} is not an address: write for example {example}."
    if transport != "tcp":
        return ""
    host, _, port = where.rpartition(":")
    if not host or (host.startswith("[") and not host.endswith("]")):
        return f"{address!r} says no port: write for example {example}."
    if port != "*" and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= _LAST_PORT):
        return (
            f"{address!r} is not an address: "
            f"a port is a number from 1 to {_LAST_PORT}, as in {example}."
        )
    return ""
