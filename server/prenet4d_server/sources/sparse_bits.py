"""Bit-transposed frames of few counts, decoded by what is in them instead of by their size.

At its highest speed a detector counts little: most bits of its frames are zero. Transposing them
back through a table, skipping the words that are zero, takes less time than the routine of
hdf5plugin's filter, which moves every bit and is built for any processor. Blocks that are not
sparse, as their compressed size tells, are handed to that routine.

Importing this module compiles it with numba, or loads what an earlier process compiled.

Raises:
    ImportError: numba is not installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding
from numba import njit, types

from prenet4d_server.sources.hdf5_filter import LIBRARY

LARGEST_BLOCK = 1 << 16
"""Bytes of the largest block that is decoded here: detectors use 8192."""

_SPARSE = {1: 3, 2: 8, 4: 20}
"""Element size → how many times smaller a block must be compressed for the table to be faster."""

_Words = npt.NDArray[np.uint64]


def _external(name: str, result: Any, *arguments: Any) -> Any:
    """A routine of the filter, for compiled code to call.

    By name, not by address: what is compiled with an address in it cannot be kept for later.
    """
    symbol = f"prenet4d_{name}"
    binding.add_symbol(symbol, ctypes.cast(getattr(LIBRARY, name), ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


def _compiled(signature: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile now; keep the result for later processes if there is a place to keep it."""
    try:
        kept: Callable[..., Any] = njit(signature, nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # a read-only installation of a user without a home
        return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]
    return kept


def _spread(element_size: int) -> _Words:
    """(256, element_size) a byte's eight bits, each as the lowest one of an element."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.ascontiguousarray(bits.astype(f"<u{element_size}")).view(np.uint64)


_SPREAD = {size: _spread(size) for size in _SPARSE}

_lz4_decompress = _external(
    "LZ4_decompress_safe", types.int32, types.uintp, types.uintp, types.int32, types.int32
)
_memset: Any = types.ExternalFunction("memset", types.uintp(types.uintp, types.int32, types.uintp))
_bitunshuffle = _external("bshuf_bitunshuffle", types.int64, *[types.uintp] * 5)


def _writer(size: int) -> Callable[..., Any]:
    """What adds bit planes to zeroed elements of ``size`` bytes, which the compiler thus knows."""

    def write(planes: _Words, words: int, spread: _Words, out: _Words, first: int) -> None:
        for bit in range(8 * size):
            anything = np.uint64(0)
            for word in range(words):
                anything |= planes[bit * words + word]
            if anything == 0:
                continue
            for word in range(words):
                bits = planes[bit * words + word]
                if bits == 0:
                    continue
                place = first + 8 * size * word
                for byte in range(8):
                    entry = (bits >> np.uint64(8 * byte)) & np.uint64(255)
                    for part in range(size):
                        out[place + size * byte + part] |= spread[entry, part] << np.uint64(bit)

    compiled: Callable[..., Any] = njit(write)
    return compiled


_write_1, _write_2, _write_4 = map(_writer, _SPARSE)


def _decode(
    data: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    header: int,
    frame_bytes: int,
    size: int,
    block_bytes: int,
    sparse: int,
    spread: _Words,
    out: _Words,
) -> bool:
    """Decode frames that lie behind each other in ``data``; false at the first corrupt one."""
    planes = np.empty(block_bytes // 8, np.uint64)
    source, block, target = data.ctypes.data, planes.ctypes.data, out.ctypes.data
    begin = done = 0
    for end in ends:
        place = begin + header
        left = frame_bytes
        while left > 0:
            # Checked block by block: these lengths are whatever somebody sent.
            if end - place < 4:
                return False
            length: Any = (
                np.int64(data[place]) << 24
                | np.int64(data[place + 1]) << 16
                | np.int64(data[place + 2]) << 8
                | np.int64(data[place + 3])
            )
            place += 4
            wanted = min(block_bytes, left)
            if length > end - place:
                return False
            if _lz4_decompress(source + place, block, length, wanted) != wanted:
                return False
            words = wanted // (64 * size)
            if length * sparse > wanted:
                if _bitunshuffle(block, target + done, 64 * words, size, 64 * words) != wanted:
                    return False
            else:
                _memset(target + done, 0, wanted)  # half as long as a loop, in cold memory
                if size == 1:
                    _write_1(planes, words, spread, out, done // 8)
                elif size == 2:
                    _write_2(planes, words, spread, out, done // 8)
                else:
                    _write_4(planes, words, spread, out, done // 8)
            place += length
            left -= wanted
            done += wanted
        begin = end
    return True


_decode_all = _compiled(
    types.boolean(
        types.Array(types.uint8, 1, "C", readonly=True),
        types.int64[::1],
        *[types.int64] * 5,
        types.uint64[:, ::1],
        types.uint64[::1],
    ),
    _decode,
)


def can_decode(frame_bytes: int, element_size: int, block: int) -> bool:
    """Whether frames cut into blocks of ``block`` elements are whole numbers of 64 elements."""
    return (
        element_size in _SPARSE
        and block % 64 == 0
        and block * element_size <= LARGEST_BLOCK
        and frame_bytes % (64 * element_size) == 0
    )


def decode(
    frames: list[bytes], header: int, out: npt.NDArray[Any], element_size: int, block: int
) -> bool:
    """Decode bitshuffled frames in one go, without the GIL.

    Args:
        frames: as they came, each shorter than 2 GiB.
        header: bytes to skip at the beginning of each.
        out: (n, h, w), C-contiguous and aligned to 8 bytes, that :func:`can_decode`.
        element_size: bytes of one element in the bit transposition.
        block: elements of a block.

    Returns:
        Whether all could be decoded; ``out`` may hold a part of them otherwise.
    """
    data = np.frombuffer(b"".join(frames), np.uint8)
    ends = np.cumsum([len(frame) for frame in frames], dtype=np.int64)
    words = out.reshape(-1).view(np.uint64)
    done: bool = _decode_all(
        *(data, ends, header, out[0].nbytes, element_size, block * element_size),
        *(_SPARSE[element_size], _SPREAD[element_size], words),
    )
    return done
