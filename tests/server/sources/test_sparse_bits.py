"""Frames decoded by what is in them: the same as by hdf5plugin, and no byte beside them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenet4d_server.errors import CorruptFrame
from prenet4d_server.sources import compression, sparse_bits
from prenet4d_server.sources.compression import compress, decompress, decompress_together
from prenet4d_server.sources.encoded import EncodedBlock, EncodedFrame

from .detector import bslz4

HEADER = 12
DTYPES = {1: "uint8", 2: "uint16", 4: "uint32"}


@pytest.fixture(autouse=True, scope="module")
def prepared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_sparse_bits", None)
        compression.prepare()
        yield


def draw_frames(data: st.DataObject, size: int) -> np.ndarray:
    """Frames with few counts, many, or both in different places."""
    n, height = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    frames = rng.poisson(data.draw(st.sampled_from([0.0, 0.01, 0.3, 20.0])), (n, height, 64))
    wild = data.draw(st.integers(0, height))
    frames[:, :wild] = rng.integers(0, 1 << 8 * size, (n, wild, 64))
    return frames.astype(DTYPES[size])


@pytest.mark.parametrize("size", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_frames_are_read_as_hdf5plugin_reads_them(size, data):
    frames = draw_frames(data, size)
    elements = data.draw(st.sampled_from([64, 128, 512, 8192 // size]))
    encoded = [bslz4(frame, elements) for frame in frames]
    assert sparse_bits.can_decode(frames[0].nbytes, size, elements)
    ours, theirs = np.full_like(frames, 7), np.full_like(frames, 9)
    assert sparse_bits.decode(encoded, HEADER, ours, size, elements)
    for content, out in zip(encoded, theirs, strict=True):
        decompress(content, "bslz4", out, size)
    np.testing.assert_array_equal(ours, frames)
    np.testing.assert_array_equal(theirs, frames)


@pytest.mark.parametrize("size", DTYPES)
@pytest.mark.parametrize("fill", [0, 1, 255])
def test_frames_of_one_value(size, fill):
    frames = np.full((3, 96, 96), fill, DTYPES[size])
    out = np.full_like(frames, 7)
    encoded = [compress(frame, "bslz4") for frame in frames]
    assert decompress_together(encoded, "bslz4", out, size)
    np.testing.assert_array_equal(out, frames)


@pytest.mark.parametrize(
    ("frame_bytes", "size", "elements"),
    [(8192, 3, 64), (8192, 8, 64), (8192, 2, 72), (8190, 2, 64), (1 << 20, 2, 1 << 19)],
)
def test_what_is_left_to_hdf5plugin(frame_bytes, size, elements):
    assert not sparse_bits.can_decode(frame_bytes, size, elements)


FRAMES = np.random.default_rng(3).poisson(0.1, (3, 96, 96)).astype(np.uint16)
ENCODED = [compress(frame, "bslz4") for frame in FRAMES]


def blocks_of(frame: bytes) -> list[int]:
    """Where the lengths in front of the blocks are."""
    places, place = [], HEADER
    while place < len(frame):
        places.append(place)
        place += 4 + struct.unpack_from(">I", frame, place)[0]
    return places


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("length", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, "one more", "next"])
def test_a_wrong_length_in_front_of_a_block(which, length):
    frame = bytearray(ENCODED[1])
    place = blocks_of(ENCODED[1])[which]
    (true,) = struct.unpack_from(">I", frame, place)
    # "next": this block would reach over the next frame's first bytes too.
    wrong = {"one more": true + 1, "next": len(frame) - place}.get(length, length)
    struct.pack_into(">I", frame, place, wrong)
    check_only_the_second_is_lost(bytes(frame))


@pytest.mark.parametrize("end", [HEADER, HEADER + 3, HEADER + 4, -3000, -1])
def test_a_frame_that_is_cut_short_reads_nothing_of_the_next(end):
    check_only_the_second_is_lost(ENCODED[1][:end])


def check_only_the_second_is_lost(damaged: bytes) -> None:
    frames = [
        EncodedFrame(content, "bslz4", 2, (96, 96), np.dtype("uint16"))
        for content in (ENCODED[0], damaged, ENCODED[2])
    ]
    memory = np.full((5, 96, 96), 0xABCD, np.uint16)
    ((number, error),) = EncodedBlock("s", np.arange(3), frames).read_into(0, memory[1:4])
    assert number == 1
    assert isinstance(error, CorruptFrame)
    np.testing.assert_array_equal(memory[[1, 3]], FRAMES[[0, 2]])
    assert (memory[[0, 4]] == 0xABCD).all()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damage_never_writes_beside_the_frames(data):
    frames = [bytearray(frame) for frame in ENCODED]
    for frame in frames:
        for place in data.draw(st.lists(st.integers(HEADER, len(frame) - 1), max_size=4)):
            frame[place] = data.draw(st.integers(0, 255))
        del frame[data.draw(st.integers(HEADER, len(frame))) :]
    memory = np.full((5, 96, 96), 0xABCD, np.uint16)
    sparse_bits.decode([bytes(frame) for frame in frames], HEADER, memory[1:4], 2, 4096)
    assert (memory[[0, 4]] == 0xABCD).all()


def test_bytes_after_the_last_block_are_ignored_as_by_hdf5plugin():
    out = np.zeros_like(FRAMES)
    assert decompress_together([frame + b"more" for frame in ENCODED], "bslz4", out, 2)
    np.testing.assert_array_equal(out, FRAMES)


PROGRAM = """
import sys
{first}
import numpy as np
from prenet4d_server.sources import compression
compression.prepare()
frames = np.random.default_rng(0).poisson(0.1, (4, 64, 64)).astype(np.uint16)
encoded = [compression.compress(frame, "bslz4") for frame in frames]
out = np.zeros_like(frames)
assert compression.decompress_together(encoded, "bslz4", out, 2)
assert (out == frames).all()
print("numba" in sys.modules and sys.modules["numba"] is not None)
"""


def run_program(first: str = "", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(first=first)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_without_numba_frames_are_decoded_all_the_same():
    assert run_program('sys.modules["numba"] = None') == "False"


def test_where_nothing_can_be_kept_it_is_compiled_anew():
    nowhere = {
        "NUMBA_CACHE_LOCATOR_CLASSES": "_UserProvidedCacheLocator",
        "NUMBA_CACHE_DIR": "/dev/null/nowhere",
    }
    assert run_program(**nowhere) == "True"
