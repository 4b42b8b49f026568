"""Decoding against independent encoders, and against bytes that lie."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat

import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prenet4d_server.errors import CorruptFrame
from prenet4d_server.sources.compression import compress, decompress

from .detector import bslz4, lz4_h5

DTYPES = ["uint8", "uint16", "uint32", "float32"]
SHAPES = [(256, 256), (37, 61), (515, 128), (9, 11)]


def counts(shape: tuple[int, ...], dtype: str, mean: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.poisson(mean, shape).astype(dtype)


def decoded(data: bytes, codec: str, like: np.ndarray, element_size: int = 1) -> np.ndarray:
    out = np.empty_like(like)
    decompress(data, codec, out, element_size)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_hdf5_bitshuffled_is_read_back(dtype, shape):
    frame = counts(shape, dtype)
    np.testing.assert_array_equal(decoded(bslz4(frame), "bslz4", frame, frame.itemsize), frame)


@pytest.mark.parametrize("nelems", [8, 256, 4096])
def test_any_bitshuffle_block_size_is_read(nelems):
    frame = counts((65, 67), "uint16")
    np.testing.assert_array_equal(decoded(bslz4(frame, nelems), "bslz4", frame, 2), frame)


@pytest.mark.parametrize("nbytes", [0, 1000, 4096])
@pytest.mark.parametrize("mean", [0.1, 3.0, 30000.0])
def test_what_hdf5_lz4_wrote_is_read_back(mean, nbytes):
    frame = counts((65, 67), "uint16", mean)
    np.testing.assert_array_equal(decoded(lz4_h5(frame, nbytes), "lz4-h5", frame), frame)


def test_incompressible_blocks_which_hdf5_stores_as_they_are():
    frame = np.random.default_rng(0).integers(0, 1 << 16, (64, 64), np.uint16)
    np.testing.assert_array_equal(decoded(lz4_h5(frame), "lz4-h5", frame), frame)
    np.testing.assert_array_equal(decoded(bslz4(frame), "bslz4", frame, 2), frame)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bare_lz4_block(dtype):
    frame = counts((33, 44), dtype)
    data = lz4.block.compress(frame.tobytes(), store_size=False)
    np.testing.assert_array_equal(decoded(data, "lz4", frame), frame)


@pytest.mark.parametrize("codec", ["none", "lz4", "lz4-h5", "bslz4"])
@given(
    frame=hnp.arrays(
        st.sampled_from(DTYPES[:3]),
        st.tuples(st.integers(3, 40), st.integers(3, 40)),
        elements=st.integers(0, 255),
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_compressed_is_read_back(codec, frame):
    data = compress(frame, codec)
    np.testing.assert_array_equal(decoded(data, codec, frame, frame.itemsize), frame)


def test_what_is_compressed_can_be_read_by_others():
    frame = counts((256, 256), "uint16")
    assert compress(frame, "bslz4") == bslz4(frame)
    bare = lz4.block.decompress(compress(frame, "lz4"), uncompressed_size=frame.nbytes)
    assert bare == frame.tobytes()


def test_threads_decode_at_the_same_time():
    frames = [counts((128, 128), "uint16", mean) for mean in range(1, 40)]
    data = [bslz4(frame) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(decoded, data, repeat("bslz4"), frames, repeat(2)))
    for result, frame in zip(results, frames, strict=True):
        np.testing.assert_array_equal(result, frame)


FRAME = counts((64, 64), "uint16")
ENCODED = {
    "none": FRAME.tobytes(),
    "lz4": lz4.block.compress(FRAME.tobytes(), store_size=False),
    "lz4-h5": lz4_h5(FRAME, 1024),
    "bslz4": bslz4(FRAME),
}


@pytest.mark.parametrize("codec", ["lz4-h5", "bslz4"])
@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\0" * 12,
        b"\0" * 4,
        struct.pack(">QI", FRAME.nbytes, 8192),
        struct.pack(">QII", FRAME.nbytes, 8192, 0xFFFFFFFF) + b"\0" * 50,
        struct.pack(">QII", FRAME.nbytes, 8192, 0) + b"\0" * 50,
        struct.pack(">QII", FRAME.nbytes, 0xFFFFFFFF, 20) + b"\xff" * 20,
        struct.pack(">QII", FRAME.nbytes, 1, 20) + b"\xff" * 20,
        struct.pack(">QII", FRAME.nbytes, 30, 20) + b"\xff" * 20,
        struct.pack(">QI", FRAME.nbytes * 2, 8192) + ENCODED["bslz4"][12:],
        struct.pack(">QI", 1 << 63, 8192) + ENCODED["bslz4"][12:],
    ],
)
def test_a_lying_frame_is_refused(codec, lie):
    with pytest.raises(CorruptFrame):
        decoded(lie, codec, FRAME, 2)


@pytest.mark.parametrize("codec", ENCODED)
def test_the_size_must_be_the_announced_one(codec):
    for shape in ((64, 63), (64, 65), (8, 8)):
        with pytest.raises(CorruptFrame):
            decoded(ENCODED[codec], codec, np.empty(shape, np.uint16), 2)


@pytest.mark.parametrize("element_size", [0, -2, 3, 1 << 40])
def test_an_impossible_element_size_is_refused(element_size):
    with pytest.raises(CorruptFrame):
        decoded(ENCODED["bslz4"], "bslz4", FRAME, element_size)


@pytest.mark.parametrize("codec", ENCODED)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_decodes_and_never_writes_beside_the_frame(codec, data):
    bytes_ = bytearray(ENCODED[codec])
    for place in data.draw(st.lists(st.integers(0, len(bytes_) - 1), max_size=6)):
        bytes_[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(bytes_)))
    memory = np.full(FRAME.size * 3, 0xABCD, np.uint16)
    out = memory[FRAME.size : 2 * FRAME.size].reshape(FRAME.shape)
    with suppress(CorruptFrame):
        decompress(bytes(bytes_[:cut]), codec, out, data.draw(st.sampled_from([1, 2, 4])))
    assert (memory[: FRAME.size] == 0xABCD).all()
    assert (memory[2 * FRAME.size :] == 0xABCD).all()
