"""Detector compressions, decoded into memory that is already there.

The work is done by the bitshuffle and LZ4 routines inside hdf5plugin's bitshuffle filter, called
through ctypes: a wheel that needs no compiler, writes into the caller's memory and lets go of the
GIL meanwhile, so that decoding scales with threads (the `bitshuffle` and `imagecodecs` packages
each lack one of the three).

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
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import hdf5plugin
import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import CorruptFrame

Codec: TypeAlias = Literal["none", "lz4", "lz4-h5", "bslz4"]
Buffer: TypeAlias = "bytes | memoryview"

MAX_BYTES = 0x7E000000
"""The largest block LZ4 itself can handle (about 2 GB)."""

_FRAMING = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_BLOCK_BYTES = 8192


def _load() -> ctypes.CDLL:
    """The compiled filter, with the signatures of the routines that are used here.

    Raises:
        ImportError: this build of hdf5plugin does not have them.
    """
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    signatures = {
        "LZ4_decompress_safe": (ctypes.c_int, [ctypes.c_char_p, pointer, *[ctypes.c_int] * 2]),
        "LZ4_compress_default": (ctypes.c_int, [pointer, pointer, *[ctypes.c_int] * 2]),
        "LZ4_compressBound": (ctypes.c_int, [ctypes.c_int]),
        "bshuf_decompress_lz4": (ctypes.c_int64, [ctypes.c_char_p, pointer, size, size, size]),
        "bshuf_compress_lz4": (ctypes.c_int64, [pointer, pointer, size, size, size]),
        "bshuf_compress_lz4_bound": (size, [size, size, size]),
    }
    build = hdf5plugin.get_config().build_config
    path = Path(hdf5plugin.PLUGIN_PATH) / f"libh5bshuf{build.filter_file_extension}"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"The installed hdf5plugin has no usable bitshuffle filter ({error}). "
            "Install its wheel from the package index: pip install --force-reinstall hdf5plugin"
        ) from error
    return library


_library = _load()


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
        block, end = _check_bitshuffle(data, out.nbytes, element_size)
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
    blocks, parts = set(), []
    try:
        for frame in frames:
            data = bytes(frame)
            block, end = _check_bitshuffle(data, size, element_size)
            blocks.add(block)
            parts.append(data[_FRAMING.size : end])
        if len(blocks) > 1 or size % (block * element_size):
            return False
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
        buffer = ctypes.create_string_buffer(_library.bshuf_compress_lz4_bound(*shape))
        length = _library.bshuf_compress_lz4(source, buffer, *shape)
    else:
        bound = _library.LZ4_compressBound(array.nbytes)
        buffer = ctypes.create_string_buffer(bound)
        length = _library.LZ4_compress_default(source, buffer, array.nbytes, bound)
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
    got = _library.LZ4_decompress_safe(data, address, len(data), size)
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


def _check_bitshuffle(data: bytes, size: int, element_size: int) -> tuple[int, int]:
    """Check the framing of ``size`` bitshuffled bytes.

    Returns:
        ``(elements of a block, where the data end)``.
    """
    if element_size < 1 or size % element_size:
        raise CorruptFrame(f"{element_size}-byte elements do not fill {size} bytes.")
    block = _framing(data, size) // element_size
    if block == 0 or block % 8:
        raise CorruptFrame(f"A bitshuffle block of {block} elements is no multiple of 8.")
    elements = size // element_size
    if elements < 8:
        raise CorruptFrame("A frame of fewer than 8 elements cannot be bit-transposed.")
    # The last elements, fewer than eight, are neither transposed nor compressed.
    blocks = elements // block + (elements % block >= 8)
    end = _end_of_blocks(data, _FRAMING.size, blocks) + elements % 8 * element_size
    if end > len(data):
        raise CorruptFrame("The compressed frame is cut short in its last elements.")
    return block, end


def _bitshuffle_blocks(data: bytes, out: npt.NDArray[Any], element_size: int, block: int) -> None:
    """Decode blocks without a header, whose framing has been checked."""
    used = _library.bshuf_decompress_lz4(
        data,
        out.__array_interface__["data"][0],
        out.nbytes // element_size,
        element_size,
        block,
    )
    if used != len(data):
        raise CorruptFrame("A bitshuffle-LZ4 block does not decode to the bytes announced.")
