"""The ingest process's parts: decoding on threads, and telling troubles at a bounded rate."""

import multiprocessing
import threading
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_client import FrameSender
from prenet4d_client.messages import AcquisitionStart, Frames
from prenet4d_client.wire import encode
from prenet4d_server.errors import BadCounts, CorruptFrame
from prenet4d_server.ingest import process
from prenet4d_server.ingest.decoder import Decoder
from prenet4d_server.ingest.introduction import Introduction
from prenet4d_server.ingest.notices import Ended, Failed, Ready, Remark, Started, pack, unpack
from prenet4d_server.ingest.remarks import Remarks
from prenet4d_server.ingest.ring import RingHandle, RingReader, RingWriter
from prenet4d_server.service import Service
from prenet4d_server.sources.native import NativeSource

from ..live import TIMEOUT_S, frames, listening, sender, settings, until


class Block:
    """A block whose frames hold their own number, some of them undecodable."""

    series = "1"
    packed = True

    def __init__(self, n, bad=()):
        self.indices = np.arange(n, dtype=np.int64)
        self.bad = set(bad)

    def read_into(self, start, out):
        out[:] = np.arange(start, start + len(out)).reshape(-1, 1, 1)
        return [
            (number, CorruptFrame("torn"))
            for number in range(start, start + len(out))
            if number in self.bad
        ]


@pytest.mark.parametrize("threads", [1, 3])
@given(chosen=st.sets(st.integers(0, 39), min_size=1), bad=st.sets(st.integers(0, 39), max_size=5))
def test_any_choice_of_frames_is_decoded_to_its_places(threads, chosen, bad):
    decoder = Decoder(threads)
    numbers = np.array(sorted(chosen))
    out = np.zeros((len(numbers), 256, 256), np.uint32)
    failed = decoder.decode(Block(40, bad), numbers, out).result()
    decoder.close()
    assert (out == numbers[:, None, None]).all()
    assert sorted(numbers[place] for place, _ in failed) == sorted(bad & chosen)


def test_what_is_but_a_copy_is_made_at_once():
    class Copied(Block):
        packed = False

    decoder = Decoder(2)
    out = np.zeros((40, 256, 256), np.uint32)
    decoding = decoder.decode(Copied(40), np.arange(40), out)
    decoder.close()
    assert decoding.done
    assert (out == np.arange(40)[:, None, None]).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, -1.0, -1e-30])
def test_float_frames_that_are_no_counts_are_found(wrong):
    class Floats(Block):
        def read_into(self, start, out):
            failed = super().read_into(start, out)
            if start <= 4 < start + len(out):
                out[4 - start, 3, 5] = wrong
            return failed

    decoder = Decoder(2)
    out = np.zeros((8, 256, 256), np.float32)
    failed = decoder.decode(Floats(8, bad=[1]), np.arange(8), out).result()
    decoder.close()
    assert {(place, type(error)) for place, error in failed} == {(1, CorruptFrame), (4, BadCounts)}


@given(
    counts=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 9)), max_size=30
    )
)
def test_a_flood_of_remarks_is_summed_and_nothing_is_lost(counts):
    told = []
    remarks = Remarks(told.append, every_s=1000.0)
    for code, rejected, shed in counts:
        remarks.add(Remark("warning", code, "It broke.", rejected=rejected, shed=shed))
    kinds = {code for code, _, _ in counts}
    assert len(told) == len(kinds)
    remarks.flush()
    assert len(told) == len(kinds)
    remarks.flush(everything=True)
    assert len(told) <= 2 * len(kinds)
    for code in kinds:
        mine = [remark for remark in told if remark.code == code]
        assert sum(remark.rejected for remark in mine) == sum(r for c, r, _ in counts if c == code)
        assert sum(remark.shed for remark in mine) == sum(s for c, _, s in counts if c == code)
        assert mine[0].message == "It broke."


STARTED = Started(
    5, "id", "7", (3, 4), "uint16", 10, 5, (2, 2), None, None, 1.5, "toy", {"a": 1}, b"\xff\xf0"
)


@pytest.mark.parametrize(
    "notice",
    [
        Ready("tcp://127.0.0.1:5560"),
        Failed("cannot_bind", "Cannot listen."),
        STARTED,
        Ended(9, "id", True, "because"),
        Remark("error", "code", "Sentence.", "id", 3, 4, {"x": None}),
    ],
)
def test_notices_survive_the_pipe(notice):
    assert unpack(pack(notice)) == notice


@pytest.mark.parametrize("started", [STARTED, replace(STARTED, packed_mask=None)])
def test_what_was_announced_is_known_from_the_notice(started):
    assert Started.of(started.start, started.acquisition_id, started.at, started.layout) == started


@pytest.mark.parametrize("layout", [None, STARTED.layout])
@pytest.mark.parametrize("running", [None, STARTED])
def test_a_new_process_is_told_all(layout, running):
    ring = RingHandle(memory=3, size=1 << 20, committed=4, freed=5, head=7, tail=6)
    told = Introduction(settings(source={"scan_shape": (2, 3)}), ring, layout, running)
    assert Introduction.unpack(told.pack()) == told


def test_a_complete_acquisition_ends_though_its_end_never_comes(monkeypatch):
    monkeypatch.setattr(process, "END_PATIENCE_S", 0.2)
    ours, theirs = multiprocessing.Pipe()
    reader = RingReader(1 << 20)

    def ingest():
        source = NativeSource("tcp://127.0.0.1:*", max_bytes=1 << 20)
        writer = RingWriter(reader.handle())
        theirs.send_bytes(pack(Ready(source.address)))
        try:
            process.Ingest(source, writer, theirs, settings()).run()
        finally:
            source.close()
            writer.close()

    def next_notice():
        assert ours.poll(TIMEOUT_S)
        return unpack(ours.recv_bytes())

    thread = threading.Thread(target=ingest)
    thread.start()
    try:
        with FrameSender(next_notice().address, timeout=TIMEOUT_S) as source:
            source.start(frame_shape=(16, 24), dtype="uint16", expected_frames=3)
            source.send(frames(3))
            begun, remark, ended = next_notice(), next_notice(), next_notice()
            source.end()
            late = next_notice()
    finally:
        ours.send_bytes(b"")
        thread.join()
        reader.close()
    assert remark.code == "out_of_sequence"
    assert "have come, and for 0.2 s not its end" in remark.message
    assert (ended.acquisition_id, ended.aborted) == (begun.acquisition_id, False)
    assert ended.at == begun.at + 3
    assert "that series is over" in late.message


# --- of a running service -------------------------------------------------------------------------


def unlimited(message):
    """The same message, of a start whose frames are larger than the protocol allows."""
    header = msgpack.unpackb(message[1])
    return [message[0], msgpack.packb(header | {"frame_shape": (9000, 9000)}), *message[2:]]


def nameless(message):
    """The same message, of a start whose id cannot be read."""
    header = msgpack.unpackb(message[1])
    return [message[0], msgpack.packb(header | {"acquisition_id": 5}), *message[2:]]


@pytest.mark.parametrize(
    ("announced", "change", "code", "why"),
    [
        (
            {"scan_shape": (20_000, 20_000)},
            list,
            "bad_start",
            "its start was refused: Series x announces",
        ),
        (
            {"frame_shape": (4096, 4096)},
            list,
            "bad_start",
            "its start was refused: Frames of 4096 × 4096",
        ),
        ({}, unlimited, "bad_start", "its start was refused: This acquisition_start message has"),
        ({}, nameless, "bad_message", "the last start was refused: "),
    ],
)
def test_frames_whose_start_was_refused_are_told_why(announced, change, code, why):
    start = AcquisitionStart(
        acquisition_id="x", **{"frame_shape": (16, 24), "dtype": "uint16"} | announced
    )
    some = {"indices": np.arange(3), "frames": frames(3)}
    context = zmq.Context()
    with Service(settings()) as service, listening(service) as listener:
        with context.socket(zmq.PUSH) as socket:
            socket.connect(service.endpoints["ingest"])
            socket.send_multipart(change(encode(start)))
            socket.send_multipart(encode(Frames(acquisition_id="x"), some))
            refusal = listener.wait_for_event(code)
            refused = refusal.message
            told = listener.wait_for_event("no_acquisition").message
        assert f"came, but {why}" in told
        assert refused.removesuffix(".") in told
        assert refusal.acquisition_id == ("x" if code == "bad_start" else "")
        until(lambda: service.status().counters.rejected == 3)
    context.term()


def test_of_an_acquisition_without_a_scan_the_announced_frames_are_told():
    with Service(settings()) as service, listening(service) as listener:
        with sender(service) as source:
            source.start(frame_shape=(16, 24), dtype="uint16", expected_frames=12)
        told = listener.wait_for_event("acquisition_started").message
    assert told.endswith("began: 12 frames of 16 × 24 uint16.")
