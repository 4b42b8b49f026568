"""The wire protocol's codec: messages to ZeroMQ parts and back, validated both ways.

A message is a ZeroMQ multipart message::

    [type]  [header]  [array 0]  [array 1] …

The first part is the message type in ASCII, which on the PUB socket doubles as the topic. The
second is a msgpack map, the header (``prenet4d_client.messages`` holds the models). Each further
part is one array, C order, little-endian, in the order and with the dtype, shape and encoding that
``header["arrays"]`` states. There is no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, cast, get_args

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from prenet4d_client.errors import (
    MalformedMessage,
    MissingCodec,
    OversizeMessage,
    PayloadMismatch,
    UnknownType,
    UnsupportedVersion,
)
from prenet4d_client.messages import MESSAGE_TYPES, VERSION, ArraySpec, DType, Header

PROTOCOL = "prenet4d"
MAX_MESSAGE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20

Array: TypeAlias = npt.NDArray[Any]

_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in get_args(DType)}
_adapters: dict[str, TypeAdapter[Header]] = {
    name: TypeAdapter(model) for name, model in MESSAGE_TYPES.items()
}


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded message: its header and its arrays, which may be read-only views."""

    header: Header
    arrays: dict[str, Array]


def encode(
    header: Header, arrays: Mapping[str, Array] | None = None, *, lz4: bool = False
) -> list[Any]:
    """Turn a header and its arrays into the parts of one ZeroMQ message.

    Args:
        header: the message; its own ``arrays`` field is replaced by what ``arrays`` holds.
        arrays: name → array, as the type's ``LAYOUT`` asks. C-contiguous arrays are not copied.
        lz4: compress the arrays (needs the extra ``lz4``).

    Raises:
        PayloadMismatch: the arrays are not those that this message type carries.
        MissingCodec: ``lz4`` was asked for and is not installed.
    """
    specs: list[ArraySpec] = []
    buffers: list[Any] = []
    for name, array in (arrays or {}).items():
        if array.dtype.name not in _DTYPES:
            raise PayloadMismatch(
                f"Array {name!r} has dtype {array.dtype}, which has no wire form."
            )
        data = np.ascontiguousarray(array, dtype=_DTYPES[array.dtype.name])
        specs.append(
            ArraySpec(
                name=name,
                dtype=cast("DType", array.dtype.name),
                shape=data.shape,
                encoding="lz4" if lz4 else "raw",
            )
        )
        # A zero-size memoryview cannot be cast, and there is nothing to share in it.
        raw = data.data.cast("B") if data.size else b""
        buffers.append(_lz4().compress(raw, store_size=False) if lz4 else raw)
    complete = header.model_copy(update={"arrays": tuple(specs)})
    _check_layout(complete)
    packed: bytes = msgpack.packb(complete.model_dump(), use_bin_type=True)
    return [complete.type.encode(), packed, *buffers]


def decode(parts: Sequence[Any], *, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Read one ZeroMQ multipart message; the arrays share the parts' memory where they can.

    Args:
        parts: bytes-like parts, as ``recv_multipart`` returns them (``zmq.Frame.buffer`` too).
        max_bytes: the largest message, and the largest decompressed message, to accept.

    Raises:
        OversizeMessage, MalformedMessage, UnsupportedVersion, UnknownType, PayloadMismatch,
        MissingCodec: what is wrong with the message, in one sentence.
    """
    views = [memoryview(part) for part in parts]
    total = sum(view.nbytes for view in views)
    if total > max_bytes:
        raise OversizeMessage(f"The message has {total} bytes; at most {max_bytes} are accepted.")
    if len(views) < 2:
        raise MalformedMessage(f"A message has at least 2 parts; this one has {len(views)}.")
    header = _decode_header(bytes(views[0][:64]), views[1])
    _check_layout(header)
    if len(views) - 2 != len(header.arrays):
        raise PayloadMismatch(
            f"The header announces {len(header.arrays)} arrays; {len(views) - 2} parts follow it."
        )
    announced = sum(_nbytes(spec) for spec in header.arrays)
    if announced > max_bytes:
        raise OversizeMessage(
            f"The arrays need {announced} bytes; at most {max_bytes} are accepted."
        )
    arrays = {
        spec.name: _read_array(spec, view)
        for spec, view in zip(header.arrays, views[2:], strict=True)
    }
    return Message(header, arrays)


def _decode_header(topic: bytes, packed: memoryview) -> Header:
    if packed.nbytes > MAX_HEADER_BYTES:
        raise OversizeMessage(f"The header has {packed.nbytes} bytes; at most {MAX_HEADER_BYTES}.")
    try:
        fields = msgpack.unpackb(packed, raw=False)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"The header is not a msgpack map: {error}.") from None
    if not isinstance(fields, dict) or fields.get("protocol") != PROTOCOL:
        raise MalformedMessage("This is not a prenet4d message: its header does not say so.")
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise UnsupportedVersion(
            f"The message has protocol version {version!r}; this package speaks {VERSION}. "
            "Install matching versions of prenet4d on both sides."
        )
    kind = fields.get("type")
    adapter = _adapters.get(kind) if isinstance(kind, str) else None
    if adapter is None:
        raise UnknownType(f"Version {VERSION} of the protocol has no message type {kind!r}.")
    if topic != str(kind).encode():
        raise MalformedMessage(f"The topic {topic!r} does not match the message type {kind!r}.")
    try:
        return adapter.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(key) for key in first["loc"]) or "header"
        raise MalformedMessage(f"A {kind} message has a wrong {where}: {first['msg']}.") from None


def _check_layout(header: Header) -> None:
    """The arrays are those of the type, no more and no fewer, with fitting dtypes and shapes."""
    present = {spec.name: spec for spec in header.arrays}
    if len(present) != len(header.arrays):
        raise PayloadMismatch(f"A {header.type} message names an array twice.")
    sizes: dict[str, int] = {}
    for key, (dtypes, symbols) in header.LAYOUT.items():
        spec = present.pop(key.rstrip("?"), None)
        if spec is None:
            if key.endswith("?"):
                continue
            raise PayloadMismatch(f"A {header.type} message lacks its array {key!r}.")
        if spec.dtype not in dtypes:
            allowed = " or ".join(dtypes)
            raise PayloadMismatch(
                f"Array {spec.name!r} has dtype {spec.dtype}; it must be {allowed}."
            )
        names = symbols.split()
        fits = len(names) == len(spec.shape) and all(
            size == (int(name) if name.isdigit() else sizes.setdefault(name, size))
            for name, size in zip(names, spec.shape, strict=True)
        )
        if not fits:
            raise PayloadMismatch(
                f"Array {spec.name!r} has shape {spec.shape}; "
                f"it must be ({', '.join(names)}) in agreement with the message's other arrays."
            )
    if present:
        raise PayloadMismatch(
            f"A {header.type} message has no array named {next(iter(present))!r}."
        )


def _nbytes(spec: ArraySpec) -> int:
    return int(prod(spec.shape) * _DTYPES[spec.dtype].itemsize)


def _read_array(spec: ArraySpec, view: memoryview) -> Array:
    expected = _nbytes(spec)
    if spec.encoding == "lz4":
        try:
            view = memoryview(_lz4().decompress(view, uncompressed_size=expected))
        except (_lz4().LZ4BlockError, ValueError, OverflowError) as error:
            raise PayloadMismatch(
                f"Array {spec.name!r} is not an LZ4 block of {expected} bytes: {error}."
            ) from None
    if view.nbytes != expected:
        raise PayloadMismatch(
            f"Array {spec.name!r} announces {spec.dtype} {spec.shape}, that is {expected} bytes; "
            f"{view.nbytes} came."
        )
    return np.frombuffer(view, dtype=_DTYPES[spec.dtype]).reshape(spec.shape)


def _lz4() -> Any:
    try:
        import lz4.block
    except ImportError:
        raise MissingCodec("LZ4 needs a package more: pip install 'prenet4d[lz4]'.") from None
    return lz4.block
