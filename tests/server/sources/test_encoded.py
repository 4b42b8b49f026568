"""Blocks of encoded frames: many decoded in one go, and what one bad frame does to the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenet4d_server.errors import CorruptFrame, WrongFrame
from prenet4d_server.sources.compression import decompress_together
from prenet4d_server.sources.encoded import EncodedBlock, EncodedFrame

from .detector import bslz4

WHOLE_BLOCKS, BROKEN_BLOCKS = (64, 64), (30, 50)
"""Frames that are, and are not, whole numbers of bitshuffle blocks."""
PIXELS = {
    shape: np.random.default_rng(0).poisson(4, (40, *shape)).astype(np.uint16)
    for shape in (WHOLE_BLOCKS, BROKEN_BLOCKS)
}
DATA = {shape: [bslz4(pixels) for pixels in stack] for shape, stack in PIXELS.items()}


def encoded(data: bytes, shape: tuple[int, int], dtype: str = "uint16") -> EncodedFrame:
    return EncodedFrame(data, "bslz4", 2, shape, np.dtype(dtype))


@pytest.mark.parametrize("shape", PIXELS)
@pytest.mark.parametrize(("first", "count"), [(0, 40), (0, 1), (3, 16), (7, 33), (39, 1)])
def test_any_part_of_a_block_is_decoded(shape, first, count):
    block = EncodedBlock("s", np.arange(40), [encoded(data, shape) for data in DATA[shape]])
    out = np.zeros((count, *shape), np.uint16)
    assert not block.read_into(first, out)
    np.testing.assert_array_equal(out, PIXELS[shape][first : first + count])


@pytest.mark.parametrize("shape", PIXELS)
def test_bad_frames_take_nothing_along(shape):
    frames = [encoded(data, shape) for data in DATA[shape]]
    frames[5] = encoded(DATA[shape][5][:-1], shape)
    frames[6] = encoded(DATA[shape][6], shape[::-1] if shape[0] != shape[1] else (32, 128))
    frames[20] = encoded(DATA[shape][20], shape, "uint8")
    frames[21] = encoded(DATA[shape][21][:16] + b"\xff" * 400, shape)
    out = np.zeros((40, *shape), np.uint16)
    failed = dict(EncodedBlock("s", np.arange(40), frames).read_into(0, out))
    assert {number: type(error) for number, error in failed.items()} == {
        5: CorruptFrame,
        6: WrongFrame,
        20: WrongFrame,
        21: CorruptFrame,
    }
    good = [number for number in range(40) if number not in failed]
    np.testing.assert_array_equal(out[good], PIXELS[shape][good])


def test_frames_of_different_kinds_are_decoded_side_by_side():
    pixels = PIXELS[WHOLE_BLOCKS]
    frames = [
        encoded(DATA[WHOLE_BLOCKS][0], WHOLE_BLOCKS),
        EncodedFrame(pixels[1].tobytes(), "none", 1, WHOLE_BLOCKS, np.dtype("uint16")),
        EncodedFrame(bslz4(pixels[2], 512), "bslz4", 2, WHOLE_BLOCKS, np.dtype("uint16")),
        EncodedFrame(
            bslz4(pixels[3].astype(">u2")), "bslz4", 2, WHOLE_BLOCKS, np.dtype(">u2"), False
        ),
        EncodedFrame(
            bslz4(np.ascontiguousarray(pixels[4].T)),
            "bslz4",
            2,
            WHOLE_BLOCKS,
            np.dtype("uint16"),
            True,
        ),
    ]
    out = np.zeros((5, *WHOLE_BLOCKS), np.uint16)
    assert not EncodedBlock("s", np.arange(5), frames).read_into(0, out)
    np.testing.assert_array_equal(out, pixels[:5])


def test_frames_with_blocks_of_different_sizes_are_not_strung_together():
    pixels = PIXELS[WHOLE_BLOCKS][:2]
    frames = [bslz4(pixels[0], 512), bslz4(pixels[1], 1024)]
    assert not decompress_together(frames, "bslz4", np.zeros_like(pixels), 2)
    assert decompress_together(
        [frames[0], bslz4(pixels[1], 512)], "bslz4", np.zeros_like(pixels), 2
    )


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_never_writes_beside_the_frames(data):
    frames = [bytearray(frame) for frame in DATA[WHOLE_BLOCKS][:3]]
    for frame in frames:
        for place in data.draw(st.lists(st.integers(0, len(frame) - 1), max_size=3)):
            frame[place] = data.draw(st.integers(0, 255))
    memory = np.full((9, *WHOLE_BLOCKS), 0xABCD, np.uint16)
    decompress_together([bytes(frame) for frame in frames], "bslz4", memory[3:6], 2)
    assert (memory[:3] == 0xABCD).all()
    assert (memory[6:] == 0xABCD).all()
