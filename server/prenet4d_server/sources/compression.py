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
        _bitshuffle_frame(bytes(data), out, element_size)


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


def _next_block(data: bytes, position: int) -> int:
    """Return where the block that starts at ``position`` ends, or refuse it."""
    end = position + _LENGTH.size
    if end <= len(data):
        end += _LENGTH.unpack_from(data, position)[0]
    if end > len(data):
        raise CorruptFrame(
            f"The compressed frame is cut short: a block should end at byte {end}, "
            f"the data end at {len(data)}."
        )
    return end


def _lz4_frame(data: bytes, out: npt.NDArray[Any]) -> None:
    block = _framing(data, out.nbytes)
    flat = out.reshape(-1).view(np.uint8)
    address = flat.__array_interface__["data"][0]
    position = _FRAMING.size
    for start in range(0, out.nbytes, block):
        size = min(block, out.nbytes - start)
        end = _next_block(data, position)
        content = data[position + _LENGTH.size : end]
        if len(content) == size:  # stored as it is
            flat[start : start + size] = np.frombuffer(content, np.uint8)
        else:
            _lz4_block(content, address + start, size)
        position = end


def _bitshuffle_frame(data: bytes, out: npt.NDArray[Any], element_size: int) -> None:
    if element_size < 1 or out.nbytes % element_size:
        raise CorruptFrame(
            f"{out.nbytes} bytes are no whole number of {element_size}-byte elements."
        )
    block = _framing(data, out.nbytes) // element_size
    if block == 0 or block % 8:
        raise CorruptFrame(f"A bitshuffle block of {block} elements is no multiple of 8.")
    elements = out.nbytes // element_size
    # The last elements, fewer than eight, are neither transposed nor compressed.
    blocks = elements // block + (elements % block >= 8)
    position = _FRAMING.size
    for _ in range(blocks):
        position = _next_block(data, position)
    if position + elements % 8 * element_size > len(data):
        raise CorruptFrame("The compressed frame is cut short in its last elements.")
    if position == _FRAMING.size:
        raise CorruptFrame("A frame of fewer than 8 elements cannot be bit-transposed.")
    used = _library.bshuf_decompress_lz4(
        data[_FRAMING.size :], out.__array_interface__["data"][0], elements, element_size, block
    )
    if used != position + elements % 8 * element_size - _FRAMING.size:
        raise CorruptFrame("A bitshuffle-LZ4 block does not decode to the bytes announced.")
