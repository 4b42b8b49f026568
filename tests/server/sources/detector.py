"""A detector's side of a socket, and the bytes it says, written from the protocols' descriptions.

Nothing here uses the package's own encoders: a misreading of a protocol would otherwise be shared
by both sides and stay unseen.
"""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import zmq

from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault

WAIT_S = 60.0


class PushSocket:
    """The sending end of a detector."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.linger = 0
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"

    def send(self, *parts: bytes) -> None:
        assert self._socket.poll(WAIT_S * 1000, zmq.POLLOUT), "nobody is connected"
        self._socket.send_multipart(parts)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextmanager
def push_socket() -> Iterator[PushSocket]:
    socket = PushSocket()
    try:
        yield socket
    finally:
        socket.close()


def poll_until(source: Any, done: Callable[[list[Any]], bool]) -> list[Any]:
    """Poll a source until what it said is enough."""
    events: list[Any] = []
    deadline = time.monotonic() + WAIT_S
    while not done(events):
        assert time.monotonic() < deadline, f"only {events} came"
        events.extend(source.poll(0.2))
    return events


def poll_to_end(source: Any, ends: int = 1) -> list[Any]:
    return poll_until(source, lambda events: len(of(AcquisitionEnd, events)) >= ends)


def of(kind: type, events: Sequence[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def blocks_of(events: Sequence[Any]) -> list[Any]:
    return [event for event in events if hasattr(event, "read_into")]


@dataclass
class Series:
    start: Any
    frames: dict[int, np.ndarray]
    failures: dict[int, Exception]
    faults: list[Any]
    order: list[str]


def read(events: Sequence[Any], start: AcquisitionStart | None = None) -> Series:
    """Decode every block into memory of the announced shape, as the service does."""
    start = start or of(AcquisitionStart, events)[0]
    series = Series(start, {}, {}, of(Fault, events), [type(event).__name__ for event in events])
    for block in blocks_of(events):
        out = np.full((len(block.indices), *start.frame_shape), 77, start.dtype)
        failed = dict(block.read_into(0, out))
        for number, index in enumerate(block.indices.tolist()):
            if number in failed:
                series.failures[index] = failed[number]
            else:
                series.frames[index] = out[number]
    return series


# --- compression, by the reference implementation in HDF5 ----------------------------------------


def hdf5_chunk(array: np.ndarray, **compression: Any) -> bytes:
    """One chunk of an HDF5 file, as its filter wrote it."""
    with h5py.File(io.BytesIO(), "w") as file:
        data = file.create_dataset("data", data=array, chunks=array.shape, **compression)
        mask, chunk = data.id.read_direct_chunk((0,) * array.ndim)
        assert mask == 0
        return bytes(chunk)


def bslz4(array: np.ndarray, nelems: int = 0) -> bytes:
    return hdf5_chunk(array, **hdf5plugin.Bitshuffle(nelems=nelems, cname="lz4"))


def lz4_h5(array: np.ndarray, nbytes: int = 0) -> bytes:
    return hdf5_chunk(array, **hdf5plugin.LZ4(nbytes=nbytes))


# --- CBOR, by RFC 8949 ---------------------------------------------------------------------------


@dataclass
class Tag:
    number: int
    value: Any


def cbor(value: Any) -> bytes:
    match value:
        case None:
            return b"\xf6"
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int():
            return _head(0, value) if value >= 0 else _head(1, -1 - value)
        case float():
            return b"\xfb" + struct.pack(">d", value)
        case bytes():
            return _head(2, len(value)) + value
        case str():
            return _head(3, len(value.encode())) + value.encode()
        case list():
            return _head(4, len(value)) + b"".join(map(cbor, value))
        case dict():
            items = (cbor(key) + cbor(item) for key, item in value.items())
            return _head(5, len(value)) + b"".join(items)
        case Tag():
            return _head(6, value.number) + cbor(value.value)
    raise TypeError(type(value))


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for code, letter in ((24, "B"), (25, "H"), (26, "I"), (27, "Q")):
        if argument < 1 << 8 * struct.calcsize(letter):
            return bytes([major << 5 | code]) + struct.pack(f">{letter}", argument)
    raise OverflowError(argument)
