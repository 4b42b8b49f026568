"""The batcher, fed by a real ingest process: batches are full or late, and never mixed."""

import os
import signal
import socket
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from prenet4d_client import FrameSender
from prenet4d_client.wire import MAX_HEADER_BYTES
from prenet4d_server.config import BatchSettings
from prenet4d_server.correction import batcher as batcher_module
from prenet4d_server.correction.batcher import Batch, Batcher
from prenet4d_server.ingest.inlet import Inlet
from prenet4d_server.ingest.notices import Ended, Started
from prenet4d_server.ingest.ring import wait_readable

from ..live import TIMEOUT_S, frames, settings, until


@contextmanager
def line(**options):
    """An inlet with its ingest process, a sender to it, and the remarks it made."""
    remarks = []
    inlet = Inlet(settings(**options), remarks.append)
    try:
        inlet.open()
        with FrameSender(inlet.address, timeout=TIMEOUT_S) as sender:
            yield inlet, sender, remarks
    finally:
        inlet.close()


@pytest.fixture(scope="module")
def shared_line():
    with line(ring={"size": 1 << 20}) as parts:
        yield parts


def everything(batcher, acquisitions):
    """What comes until so many acquisitions have ended, with the batches' frames copied."""
    came, ended, deadline = [], 0, time.monotonic() + TIMEOUT_S
    while ended < acquisitions:
        assert time.monotonic() < deadline
        item = batcher.next(0.5)
        if isinstance(item, Batch):
            came.append((item.acquisition, item.indices.copy(), item.frames.copy()))
            batcher.release(item)
        elif item is not None:
            came.append(item)
            ended += isinstance(item, Ended)
    return came


_acquisition = st.tuples(
    st.integers(0, 200),
    st.sampled_from([((8, 8), "uint16"), ((16, 8), "uint8"), ((40, 24), "float32")]),
    st.integers(1, 70),
)


@pytest.mark.usefixtures("shared_line")
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(acquisitions=st.lists(_acquisition, min_size=1, max_size=4), size=st.integers(1, 64))
def test_batches_hold_all_frames_in_order_of_one_acquisition_each(shared_line, acquisitions, size):
    inlet, sender, _ = shared_line
    batcher = Batcher(inlet, BatchSettings(size=size, max_delay_ms=20))
    batcher.position = inlet.ring.committed
    for n, (shape, dtype), block in acquisitions:
        sender.start(frame_shape=shape, dtype=dtype, expected_frames=max(n, 1))
        pixels = frames(n, shape, dtype)
        for first in range(0, n, block):
            sender.send(pixels[first : first + block])
        sender.end()
    came = everything(batcher, len(acquisitions))
    for n, (shape, dtype), _ in acquisitions:
        started = came.pop(0)
        assert isinstance(started, Started)
        assert (started.frame_shape, started.dtype) == (shape, dtype)
        indices = []
        while not isinstance(came[0], Ended):
            acquisition, numbers, pixels = came.pop(0)
            assert acquisition is started
            assert 1 <= len(numbers) <= size
            expected = np.broadcast_to(numbers[:, None, None].astype(dtype), pixels.shape)
            assert (pixels == expected).all()
            indices += numbers.tolist()
        assert indices == list(range(n))
        assert came.pop(0).acquisition_id == started.acquisition_id
    assert not came
    assert batcher.backlog == 0


def test_a_batch_that_is_not_full_closes_when_its_oldest_frame_has_waited():
    with line() as (inlet, sender, _):
        batcher = Batcher(inlet, BatchSettings(size=100, max_delay_ms=300))
        sender.start(frame_shape=(8, 8), dtype="uint16", expected_frames=200)
        sender.send(frames(3, (8, 8)))
        assert isinstance(batcher.next(TIMEOUT_S), Started)
        batch = batcher.next(TIMEOUT_S)
        assert batch.indices.tolist() == [0, 1, 2]
        assert time.monotonic() - batch.slots.arrived[0] >= 0.3
        batcher.release(batch)
        sender.send(frames(150, (8, 8)), range(10, 160))
        assert len(batcher.next(TIMEOUT_S)) == 100


def test_a_hurried_batch_does_not_wait():
    with line() as (inlet, sender, _):
        batcher = Batcher(inlet, BatchSettings(size=100, max_delay_ms=60_000))
        sender.start(frame_shape=(8, 8), dtype="uint16", expected_frames=200)
        sender.send(frames(3, (8, 8)))
        assert isinstance(batcher.next(TIMEOUT_S), Started)
        batch = None
        while batch is None:
            batch = batcher.next(1, hurry=True)
        assert len(batch) == 3


def test_what_a_killed_process_left_in_the_ring_is_not_written_over_by_the_next():
    """Its last acquisition's frames lie in the ring otherwise than those that were read before."""
    with line(ring={"size": 1 << 20}) as (inlet, sender, _):

        def send(n, shape):
            sender.start(frame_shape=shape, dtype="uint16", expected_frames=n)
            sender.send(frames(n, shape))
            sender.end()

        def told():
            with socket.socket(fileno=os.dup(inlet._pipe.fileno())) as pipe:
                return pipe.recv(1 << 16, socket.MSG_PEEK)

        batcher = Batcher(inlet, BatchSettings(size=64, max_delay_ms=0))
        send(10, (8, 8))
        assert len(everything(batcher, 1)) > 1
        send(400, (16, 16))
        until(lambda: b"Ended" in told())  # and nobody has read it yet
        os.kill(inlet.pid, signal.SIGKILL)
        until(lambda: psutil.Process(inlet.pid).status() == psutil.STATUS_ZOMBIE)
        until(lambda: inlet.update() or (inlet.restarts == 1 and inlet.ready))
        send(10, (8, 8))
        wait_readable([inlet.ring.committed_fd], 0.5)
        _, *batches, ended, started = everything(batcher, 2)[:-2]
        assert (type(ended), type(started)) == (Ended, Started)
        for _, numbers, pixels in batches:
            assert (pixels == numbers[:, None, None]).all()
        assert sum(len(numbers) for _, numbers, _ in batches) == 400


def test_a_start_reaches_the_batcher_with_all_that_was_said():
    mask = np.ones((9, 11), bool)
    mask[2, 3:7] = False
    with line() as (inlet, sender, _):
        batcher = Batcher(inlet, BatchSettings())
        name = sender.start(
            frame_shape=(9, 11), dtype="uint32", scan_shape=(2, 5), pixel_mask=mask, gain=2.5,
            saturation_value=4095, detector="toy", metadata={"tilt": 1.5, "user": "me"},
        )  # fmt: skip
        started = batcher.next(TIMEOUT_S)
        assert started.acquisition_id == name
        assert (started.frame_shape, started.dtype, started.scan_shape) == (
            (9, 11),
            "uint32",
            (2, 5),
        )
        assert (started.gain, started.saturation_value, started.detector) == (2.5, 4095, "toy")
        assert started.metadata == {"tilt": 1.5, "user": "me"}
        assert (started.pixel_mask == mask).all()


def test_a_batch_is_never_larger_than_what_its_receivers_accept(monkeypatch):
    each = 4 * 64 * 64 + 8  # a pattern in float32, and its index
    monkeypatch.setattr(batcher_module, "MAX_MESSAGE_BYTES", MAX_HEADER_BYTES + 3 * each)
    with line() as (inlet, sender, _):
        batcher = Batcher(inlet, BatchSettings(size=8, max_delay_ms=100))
        sender.start(frame_shape=(64, 64), dtype="uint8", expected_frames=12)
        sender.send(np.zeros((12, 64, 64), np.uint8))
        sender.end()
        came = [item for item in everything(batcher, 1) if isinstance(item, tuple)]
    assert max(len(indices) for _, indices, _ in came) == 3
    assert sum(len(indices) for _, indices, _ in came) == 12
