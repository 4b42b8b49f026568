"""Detector compressions, decoded into memory that is already there.

The work is done by compiled routines (``hdf5_filter``), and where numba is installed, for sparse
frames, by our own (``sparse_bits``).

Three codecs exist on the wires that are spoken here:

========== =====================================================================================
``none``   the bytes themselves
``lz4``    one bare LZ4 block (DECTRIS Stream V1)
``lz4-h5`` the HDF5 LZ4 filter's framing: u64 size, u32 block bytes, then (u32 length, LZ4 block)…
``bslz4``  the same framing around bit-transposed blocks: the HDF5 bitshuffle filter's
========== =====================================================================================

Framing integers are big-endian. Everything a detector says about lengths is checked before the C
code sees it: it trusts the lengths in front of its blocks.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import CorruptFrame
from prenet4d_server.sources.hdf5_filter import LIBRARY

Codec: TypeAlias = Literal["none", "lz4", "lz4-h5", "bslz4"]
Buffer: TypeAlias = "bytes | memoryview"

MAX_BYTES = 0x7E000000
"""The largest block LZ4 itself can handle (about 2 GB)."""

log = logging.getLogger(__name__)

_FRAMING = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_BLOCK_BYTES = 8192


_sparse_bits: ModuleType | None = None


def prepare() -> None:
    """Compile, or load, what decodes sparse frames faster; without numba, nothing changes.

    It takes seconds the first time: to be called before a detector is attached, not during a scan.
    """
    global _sparse_bits
    try:
        from prenet4d_server.sources import sparse_bits
    except ImportError as error:
        log.info("Sparse frames are decoded more slowly: %s.", error)
    else:
        _sparse_bits = sparse_bits


def decompress(data: Buffer, codec: Codec, out: npt.NDArray[Any], element_size: int = 1) -> None:
    """Decode one frame's bytes into ``out``; the GIL is free while the bulk of it is done.

    Args:
        data: what the detector sent.
        codec: how it is encoded.
        out: C-contiguous, of exactly the size that ``data`` must decode to.
        element_size: bytes of one element in the bit transposition (``bslz4`` only).

    Raises:
        CorruptFrame: ``data`` does not decode to ``out.nbytes`` bytes. ``out`` may then hold a
            part of it.
    """
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("Frames are decoded into writeable C-contiguous memory only.")
    if len(data) > MAX_BYTES or out.nbytes > MAX_BYTES:
        raise CorruptFrame(f"A frame of {max(len(data), out.nbytes)} bytes is more than can be.")
    if codec == "none":
        if len(data) != out.nbytes:
            raise CorruptFrame(f"The frame has {len(data)} bytes; {out.nbytes} were announced.")
        np.copyto(out, np.frombuffer(data, out.dtype).reshape(out.shape))
    elif codec == "lz4":
        _lz4_block(bytes(data), out.__array_interface__["data"][0], out.nbytes)
    elif codec == "lz4-h5":
        _lz4_frame(bytes(data), out)
    else:
        data = bytes(data)
        block = _bitshuffle_block(data, out.nbytes, element_size)
        end = _end_of_bitshuffle(data, out.nbytes, element_size, block)
        _bitshuffle_blocks(data[_FRAMING.size : end], out, element_size, block)


def decompress_together(
    frames: Sequence[Buffer], codec: Codec, out: npt.NDArray[Any], element_size: int
) -> bool:
    """Decode several frames in one go, where their codec allows it and none of them is corrupt.

    Bit-transposed frames that are whole numbers of blocks can be strung together. One call for
    many frames leaves the GIL alone for long: threads that take it back for every frame get into
    each other's way.

    Args:
        frames: the n frames' bytes, as ``codec`` encodes each.
        codec: how they are encoded.
        out: (n, h, w), as for :func:`decompress`.
        element_size: as for :func:`decompress`.

    Returns:
        Whether it was done. If not, the frames are to be decoded one by one.
    """
    size = out[0].nbytes
    if codec != "bslz4" or not out.flags.c_contiguous or out.nbytes > MAX_BYTES:
        return False
    data = [bytes(frame) for frame in frames]
    try:
        blocks = {_bitshuffle_block(frame, size, element_size) for frame in data}
        if len(blocks) > 1:
            return False
        block = blocks.pop()
        if (
            _sparse_bits is not None
            and out.flags.aligned
            and _sparse_bits.can_decode(size, element_size, block)
        ):
            done: bool = _sparse_bits.decode(data, _FRAMING.size, out, element_size, block)
            return done
        if size % (block * element_size):
            return False
        ends = [_end_of_bitshuffle(frame, size, element_size, block) for frame in data]
        parts = [frame[_FRAMING.size : end] for frame, end in zip(data, ends, strict=True)]
        _bitshuffle_blocks(b"".join(parts), out, element_size, block)
    except CorruptFrame:
        return False
    return True


def compress(array: npt.NDArray[Any], codec: Codec) -> bytes:
    """Encode one frame as a detector does; the inverse of :func:`decompress`.

    Bit transposition uses the array's own element size.
    """
    array = np.ascontiguousarray(array)
    if codec == "none":
        return array.tobytes()
    source = array.__array_interface__["data"][0]
    if codec == "bslz4":
        shape = (array.size, array.itemsize, _BLOCK_BYTES // array.itemsize)
        buffer = ctypes.create_string_buffer(LIBRARY.bshuf_compress_lz4_bound(*shape))
        length = LIBRARY.bshuf_compress_lz4(source, buffer, *shape)
    else:
        bound = LIBRARY.LZ4_compressBound(array.nbytes)
        buffer = ctypes.create_string_buffer(bound)
        length = LIBRARY.LZ4_compress_default(source, buffer, array.nbytes, bound)
    if length <= 0:
        raise RuntimeError(f"The {codec} encoder failed with code {length}.")
    block = buffer.raw[:length]
    if codec == "lz4":
        return block
    if codec == "bslz4":
        return _FRAMING.pack(array.nbytes, _BLOCK_BYTES) + block
    if length >= array.nbytes:  # the format's way of saying "stored as it is"
        block = array.tobytes()
    return _FRAMING.pack(array.nbytes, array.nbytes) + _LENGTH.pack(len(block)) + block


def _lz4_block(data: bytes, address: int, size: int) -> None:
    got = LIBRARY.LZ4_decompress_safe(data, address, len(data), size)
    if got != size:
        raise CorruptFrame(f"An LZ4 block does not decode to the {size} bytes announced.")


def _framing(data: bytes, size: int) -> int:
    """Check the header of a framed codec and return its block size in bytes."""
    if len(data) < _FRAMING.size:
        raise CorruptFrame(f"A compressed frame of {len(data)} bytes lacks its 12-byte header.")
    total, block = _FRAMING.unpack_from(data)
    if total != size:
        raise CorruptFrame(
            f"The compressed frame says that it holds {total} bytes; {size} were announced."
        )
    return block or _BLOCK_BYTES


def _end_of_blocks(data: bytes, position: int, blocks: int) -> int:
    """Return where ``blocks`` blocks that begin at ``position`` end, or refuse them."""
    last = len(data) - _LENGTH.size
    for _ in range(blocks):
        if position > last:
            break
        position += _LENGTH.size + _LENGTH.unpack_from(data, position)[0]
    else:
        if position <= len(data):
            return position
    raise CorruptFrame("The compressed frame is cut short, or a length in it is wrong.")


def _lz4_frame(data: bytes, out: npt.NDArray[Any]) -> None:
    block = _framing(data, out.nbytes)
    flat = out.reshape(-1).view(np.uint8)
    address = flat.__array_interface__["data"][0]
    position = _FRAMING.size
    for start in range(0, out.nbytes, block):
        size = min(block, out.nbytes - start)
        end = _end_of_blocks(data, position, 1)
        content = data[position + _LENGTH.size : end]
        if len(content) == size:  # stored as it is
            flat[start : start + size] = np.frombuffer(content, np.uint8)
        else:
            _lz4_block(content, address + start, size)
        position = end


def _bitshuffle_block(data: bytes, size: int, element_size: int) -> int:
    """Check the header of ``size`` bitshuffled bytes and return the elements of a block."""
    if len(data) > MAX_BYTES or element_size < 1 or size % element_size:
        raise CorruptFrame(f"{element_size}-byte elements do not fill {size} bytes.")
    block = _framing(data, size) // element_size
    if block == 0 or block % 8:
        raise CorruptFrame(f"A bitshuffle block of {block} elements is no multiple of 8.")
    if size // element_size < 8:
        raise CorruptFrame("A frame of fewer than 8 elements cannot be bit-transposed.")
    return block


def _end_of_bitshuffle(data: bytes, size: int, element_size: int, block: int) -> int:
    """Check the lengths of ``size`` bitshuffled bytes and return where they end."""
    elements = size // element_size
    # The last elements, fewer than eight, are neither transposed nor compressed.
    blocks = elements // block + (elements % block >= 8)
    end = _end_of_blocks(data, _FRAMING.size, blocks) + elements % 8 * element_size
    if end > len(data):
        raise CorruptFrame("The compressed frame is cut short in its last elements.")
    return end


def _bitshuffle_blocks(data: bytes, out: npt.NDArray[Any], element_size: int, block: int) -> None:
    """Decode blocks without a header, whose framing has been checked."""
    used = LIBRARY.bshuf_decompress_lz4(
        data,
        out.__array_interface__["data"][0],
        out.nbytes // element_size,
        element_size,
        block,
    )
    if used != len(data):
        raise CorruptFrame("A bitshuffle-LZ4 block does not decode to the bytes announced.")
