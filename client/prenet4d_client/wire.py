"""The wire protocol's codec: messages to ZeroMQ parts and back, validated both ways.

A message is a ZeroMQ multipart message::

    [type]  [header]  [array 0]  [array 1] …

The first part is the message type in ASCII, which on the PUB socket doubles as the topic. The
second is a msgpack map of at most 1 MiB, the header (``prenet4d_client.messages`` holds the
models). Each further part is one array, C order, little-endian, in the order and with the dtype,
shape and encoding that ``header["arrays"]`` states. There is no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias, get_args

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

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
MAX_METADATA_BYTES = 1 << 18
MAX_TEXT = 1000
"""Characters of an acquisition's id and of what its sender says to people. Like the metadata, they
travel on in headers that hold other things as well."""
_LZ4_MAX_RATIO = 255  # one byte of an LZ4 block stands for at most this many

Array: TypeAlias = npt.NDArray[Any]

_DTYPES: dict[DType, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<") for name in get_args(DType)
}
# By dtype, in either byte order: asking numpy for a dtype's name takes ten times as long.
_NAMES = {
    stored: name for name, dtype in _DTYPES.items() for stored in (dtype, dtype.newbyteorder("S"))
}


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded message: its header and its arrays, which may be read-only views.

    Arrays and header fields can also be had as attributes of the message itself:
    ``batch.patterns``, ``telemetry.ellipticity.ratio``, ``event.message``.
    """

    header: Header
    arrays: dict[str, Array]
    gap: int = 0
    """Messages of this type that were missed just before this one."""

    def __getattr__(self, name: str) -> Any:
        # Names that no field can have are asked for by copy, pickle and the like.
        if not name.startswith("_"):
            if name in self.arrays:
                return self.arrays[name]
            if name in type(self.header).model_fields:
                return getattr(self.header, name)
        there = ", ".join([*self.arrays, *type(self.header).model_fields])
        raise AttributeError(
            f"This {self.header.type} message has no field or array {name!r}; it has {there}."
        )

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *type(self.header).model_fields, *self.arrays]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{array.shape}" for name, array in self.arrays.items())
        return f"<{self.header.type} {self.header.sequence}: {shapes or 'no arrays'}>"


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
        MalformedMessage: a free field (metadata, a result) holds what msgpack cannot carry.
        OversizeMessage: the header is larger than any receiver accepts.
    """
    specs: list[ArraySpec] = []
    buffers: list[Any] = []
    for name, array in (arrays or {}).items():
        stored = getattr(array, "dtype", None)
        dtype = None if stored is None else _NAMES.get(stored)
        if dtype is None:
            what = f"is a {type(array).__name__}" if stored is None else f"has dtype {stored}"
            raise PayloadMismatch(f"Array {name!r} {what}, with no wire form.")
        data = np.ascontiguousarray(array, dtype=_DTYPES[dtype])
        specs.append(ArraySpec(name, dtype, array.shape, "lz4" if lz4 else "raw"))
        # A zero-size memoryview cannot be cast, and there is nothing to share in it.
        raw = data.data.cast("B") if data.size else b""
        buffers.append(lz4_block().compress(raw, store_size=False) if lz4 else raw)
    _check_layout(type(header), tuple(specs))
    what = f"A field of this {header.type} message"
    packed = _pack({**vars(header), "arrays": specs}, what)
    if len(packed) > MAX_HEADER_BYTES:
        raise OversizeMessage(
            f"The header of this {header.type} message has {len(packed)} bytes; "
            f"at most {MAX_HEADER_BYTES} are accepted."
        )
    return [header.type.encode(), packed, *buffers]


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Whether an acquisition's metadata can be sent.

    Raises:
        MalformedMessage: they hold what msgpack cannot carry.
        OversizeMessage: they are too large to travel on with what the service has to say.
    """
    size = len(_pack(dict(metadata), "A value of these metadata"))
    if size > MAX_METADATA_BYTES:
        raise OversizeMessage(
            f"These metadata take {size} bytes; at most {MAX_METADATA_BYTES} are accepted: keep "
            "what is large in a file, and its name in the metadata."
        )


def _pack(value: object, what: str) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, default=_as_map)
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedMessage(f"{what} cannot be sent: {error}.") from None
    return packed


def _as_map(value: object) -> dict[str, Any]:
    if isinstance(value, BaseModel):
        return vars(value)
    if isinstance(value, ArraySpec):
        return {key: getattr(value, key) for key in ArraySpec.__slots__}
    raise TypeError(f"{type(value).__name__} has no wire form")


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
    total = sum([view.nbytes for view in views])
    if total > max_bytes:
        raise OversizeMessage(f"The message has {total} bytes; at most {max_bytes} are accepted.")
    if len(views) < 2:
        raise MalformedMessage(f"A message has at least 2 parts; this one has {len(views)}.")
    header = _decode_header(views[0], views[1])
    sizes = _check_layout(type(header), header.arrays)
    if len(views) - 2 != len(sizes):
        raise PayloadMismatch(
            f"The header announces {len(sizes)} arrays; {len(views) - 2} parts follow it."
        )
    if sum(sizes) > max_bytes:
        raise OversizeMessage(
            f"The arrays need {sum(sizes)} bytes; at most {max_bytes} are accepted."
        )
    arrays = {
        spec.name: _read_array(spec, size, view)
        for spec, size, view in zip(header.arrays, sizes, views[2:], strict=True)
    }
    return Message(header, arrays)


def _decode_header(topic: memoryview, packed: memoryview) -> Header:
    if packed.nbytes > MAX_HEADER_BYTES:
        raise OversizeMessage(f"The header has {packed.nbytes} bytes; at most {MAX_HEADER_BYTES}.")
    try:
        fields = msgpack.unpackb(packed, raw=False)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        why = str(error).rstrip(".") or type(error).__name__  # some of msgpack's say nothing
        raise MalformedMessage(f"The header is not a msgpack map: {why}.") from None
    if not isinstance(fields, dict) or fields.get("protocol") != PROTOCOL:
        raise MalformedMessage("This is not a prenet4d message: its header does not say so.")
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise UnsupportedVersion(
            f"The message has protocol version {version!r:.40}; this package speaks {VERSION}. "
            "Install matching versions of prenet4d on both sides."
        )
    if "type" not in fields:
        raise MalformedMessage("The header lacks its type, which is that of the first part.")
    kind = fields["type"]
    model = MESSAGE_TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise UnknownType(f"Version {VERSION} of the protocol has no message type {kind!r:.80}.")
    if topic != str(kind).encode():
        said = bytes(topic[:64])
        raise MalformedMessage(f"The topic {said!r} does not match the message type {kind!r}.")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise MalformedMessage(f"This {kind} message has a wrong {explain(error)}.") from None


def explain(error: ValidationError) -> str:
    """The first fault that pydantic found, as ``field: what is wrong with it``."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(key) for key in first["loc"]) or "header"
    return f"{where}: {first['msg']}"


@lru_cache(maxsize=256)  # of a stream's messages, nearly all have the same few layouts
def _check_layout(model: type[Header], specs: tuple[ArraySpec, ...]) -> tuple[int, ...]:
    """The arrays are those of the type, no more and no fewer, with fitting dtypes and shapes.

    Returns:
        The bytes of each.
    """
    kind = model.model_fields["type"].default
    present = {spec.name: spec for spec in specs}
    if len(present) != len(specs):
        raise PayloadMismatch(f"This {kind} message names an array twice.")
    sizes: dict[str, int] = {}
    for name, rule in model.LAYOUT.items():
        spec = present.pop(name, None)
        if spec is None:
            if rule.optional:
                continue
            raise PayloadMismatch(f"This {kind} message lacks its array {name!r}.")
        if spec.dtype not in rule.dtypes:
            allowed = " or ".join(rule.dtypes)
            raise PayloadMismatch(f"Array {name!r} has dtype {spec.dtype}; it must be {allowed}.")
        fits = len(rule.shape) == len(spec.shape) and all(
            size == (sizes.setdefault(side, size) if isinstance(side, str) else side)
            for side, size in zip(rule.shape, spec.shape, strict=True)
        )
        if not fits:
            raise PayloadMismatch(
                f"Array {name!r} has shape {spec.shape}; it must be "
                f"({', '.join(map(str, rule.shape))}) in agreement with the message's other arrays."
            )
    if present:
        raise PayloadMismatch(f"This {kind} message has no array named {next(iter(present))!r}.")
    return tuple(_nbytes(spec) for spec in specs)


def _nbytes(spec: ArraySpec) -> int:
    return int(prod(spec.shape) * _DTYPES[spec.dtype].itemsize)


def _read_array(spec: ArraySpec, expected: int, view: memoryview) -> Array:
    if spec.encoding == "lz4":
        # Checked first, so that a small message cannot make us reserve a large memory.
        if expected > _LZ4_MAX_RATIO * view.nbytes:
            raise _mismatch(spec, f"{view.nbytes} bytes of LZ4 cannot hold them")
        codec = lz4_block()
        try:
            view = memoryview(codec.decompress(view, uncompressed_size=expected))
        except (codec.LZ4BlockError, ValueError, OverflowError) as error:
            raise _mismatch(spec, f"its LZ4 block is corrupt: {error}") from None
    if view.nbytes != expected:
        raise _mismatch(spec, f"{view.nbytes} came")
    try:
        # Half the time of frombuffer and reshape, and a sender's frames may come one by one.
        array: Array = np.ndarray(spec.shape, _DTYPES[spec.dtype], view)
    except ValueError as error:  # no bytes in a shape that numpy cannot have: (0, 2**40, 2**40)
        raise _mismatch(spec, f"no array can have that shape: {error}") from None
    if spec.dtype == "bool" and (array.view(np.uint8) > 1).any():
        raise _mismatch(spec, "a bool is 0 or 1, and it holds other bytes")
    return array


def _mismatch(spec: ArraySpec, what: str) -> PayloadMismatch:
    return PayloadMismatch(
        f"Array {spec.name!r} announces {spec.dtype} {spec.shape}, "
        f"that is {_nbytes(spec)} bytes; {what}."
    )


def lz4_block() -> Any:
    """The LZ4 codec; raises MissingCodec where it is not installed."""
    try:
        import lz4.block
    except ImportError:
        raise MissingCodec("LZ4 needs a package more: pip install lz4.") from None
    return lz4.block
