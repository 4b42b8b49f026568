"""The ring: what is committed is read, in order and whole, whoever dies in between."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_server.errors import ServiceError
from prenet4d_server.ingest.ring import RingReader, RingWriter, wait_readable

SHAPE = (8, 8)
DTYPE = np.dtype("uint16")
FRAME = 8 * 8 * 2 + 16


@pytest.fixture
def ring():
    reader = RingReader(10 * FRAME)
    writer = RingWriter(reader.handle())
    yield reader, writer
    writer.close()
    reader.close()


def lay(reader, writer, shape=SHAPE, dtype=DTYPE):
    layout = writer.fit(shape, dtype)
    writer.lay(layout)
    reader.lay(layout)
    return layout


def put(writer, numbers):
    """Write frames that hold their numbers; returns how many found neighbouring room."""
    slots = writer.claim(min(len(numbers), writer.free()))
    n = len(slots.indices)
    slots.frames[:] = np.asarray(numbers[:n])[:, None, None]
    slots.indices[:] = numbers[:n]
    slots.arrived[:] = 0.5
    writer.commit(n)
    return n


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=60))
def test_frames_come_out_as_they_went_in(steps):
    reader = RingReader(10 * FRAME)
    writer = RingWriter(reader.handle())
    try:
        assert lay(reader, writer).slots == 10
        written = read = 0
        for write, n in steps:
            if write:
                if writer.free():
                    written += put(writer, list(range(written, written + n)))
            else:
                reader.update()
                slots = reader.view(read, min(n, reader.committed - read))
                assert slots.indices.tolist() == list(range(read, read + len(slots.indices)))
                assert (slots.frames == slots.indices[:, None, None]).all()
                read += len(slots.indices)
                reader.release(len(slots.indices))
            assert writer.free() == 10 - (written - read)
            assert writer.empty() == (written == read)
        assert reader.update() == written
    finally:
        writer.close()
        reader.close()


def test_the_layout_moves_only_when_the_frame_size_does(ring):
    reader, writer = ring
    first = lay(reader, writer)
    put(writer, [0, 1, 2])
    same = writer.fit((16, 4), DTYPE)
    assert (same.slots, same.base) == (first.slots, first.base)
    larger = writer.fit(SHAPE, np.dtype("float32"))
    assert larger.slots == 10 * FRAME // (8 * 8 * 4 + 16)
    assert larger.base == writer.position
    assert not writer.empty()


def test_frames_too_large_for_the_memory_do_not_fit(ring):
    assert ring[1].fit((64, 64), DTYPE) is None


def test_a_new_writer_goes_on_where_a_dead_one_stopped(ring):
    reader, writer = ring
    layout = lay(reader, writer)
    put(writer, [0, 1, 2])
    writer.claim(4).indices[:] = -1  # claimed, never committed
    reader.update()
    reader.release(1)
    heir = RingWriter(reader.handle())
    heir.lay(layout)
    assert heir.free() == writer._layout.slots - 2
    put(heir, [3, 4])
    assert reader.update() == 5
    assert reader.view(1, 4).indices.tolist() == [1, 2, 3, 4]
    heir.close()


def test_waiting_ends_when_frames_come(ring):
    reader, writer = ring
    lay(reader, writer)
    assert wait_readable([reader.committed_fd], 0) == []
    put(writer, [7])
    assert wait_readable([reader.committed_fd], 5) == [reader.committed_fd]


def test_more_memory_than_there_is_is_refused():
    with pytest.raises(ServiceError, match=r"Make ring\.size smaller"):
        RingReader(2 * psutil.virtual_memory().total)


def _die_with_a_ring() -> None:
    ring = RingReader(1 << 20)
    held = Path(f"/proc/self/fd/{ring.handle().memory}").readlink()
    # Only memory without a name ends with its last user, who needs no chance to tidy up.
    os.kill(os.getpid(), 9 if str(held).startswith("/memfd:") else 15)


def test_nothing_is_left_behind_by_a_process_that_is_killed():
    process = multiprocessing.get_context("spawn").Process(target=_die_with_a_ring)
    process.start()
    process.join()
    assert process.exitcode == -9


def test_a_closed_ring_gives_its_descriptors_back():
    process = psutil.Process()
    before = process.num_fds()
    for _ in range(3):
        reader = RingReader(1 << 20)
        RingWriter(reader.handle()).close()
        reader.close()
    assert process.num_fds() == before
