"""The native protocol over a real socket."""

from __future__ import annotations

import time

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prenet4d_client import FrameSender, messages, wire
from prenet4d_server.errors import (
    BadMessage,
    BadStart,
    BindError,
    CorruptFrame,
    SequenceError,
    WrongFrame,
)
from prenet4d_server.sources import turns
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault
from prenet4d_server.sources.native import NativeBlock, NativeSource

from .detector import WAIT_S, blocks_of, of, poll_to_end, poll_until, read

SHAPE = (24, 40)


def frames(first: int, count: int, dtype: str = "uint16", shape=SHAPE) -> np.ndarray:
    return np.stack(
        [
            np.random.default_rng(number).poisson(3 + number, shape).astype(dtype)
            for number in range(first, first + count)
        ]
    )


def start(name: str = "scan-1", mask: np.ndarray | None = None, **fields) -> list:
    header = messages.AcquisitionStart(
        acquisition_id=name, **{"frame_shape": SHAPE, "dtype": "uint16", **fields}
    )
    return wire.encode(header, None if mask is None else {"pixel_mask": mask})


def some(
    first: int, pixels: np.ndarray, name: str = "scan-1", lz4: bool = False, publisher: str = ""
) -> list:
    indices = np.arange(first, first + len(pixels), dtype=np.int64)
    header = messages.Frames(acquisition_id=name, publisher=publisher)
    return wire.encode(header, {"indices": indices, "frames": pixels}, lz4=lz4)


def end(name: str = "scan-1", publisher: str = "") -> list:
    return wire.encode(messages.AcquisitionEnd(acquisition_id=name, publisher=publisher))


@pytest.fixture
def source():
    with NativeSource("tcp://127.0.0.1:*") as source:
        yield source


@pytest.fixture
def connect(source):
    sockets = []
    context = zmq.Context()

    def new_sender():
        socket = context.socket(zmq.PUSH)
        socket.linger, socket.sndtimeo = 0, int(WAIT_S * 1000)
        socket.connect(source.address)
        sockets.append(socket)
        return socket.send_multipart

    yield new_sender
    for socket in sockets:
        socket.close()
    context.term()


@pytest.fixture
def send(connect):
    return connect()


def test_an_acquisition_is_told_as_it_was_said(send, source):
    mask = np.ones(SHAPE, bool)
    mask[3, 4] = False
    send(
        start(
            mask=mask,
            scan_shape=(2, 5),
            expected_frames=10,
            saturation_value=4095.0,
            gain=1.5,
            detector="ours",
            metadata={"camera_length_mm": 110.0},
        )
    )
    send(some(0, frames(0, 10)))
    send(end())
    series = read(poll_to_end(source))
    said = series.start
    assert (said.series, said.frame_shape, said.dtype) == ("scan-1", SHAPE, np.uint16)
    assert (said.scan_shape, said.expected_frames) == ((2, 5), 10)
    assert (said.saturation_value, said.gain, said.detector) == (4095.0, 1.5, "ours")
    assert said.metadata == {"camera_length_mm": 110.0}
    np.testing.assert_array_equal(said.pixel_mask, mask)
    assert series.order[-1] == "AcquisitionEnd"
    for number, pixels in enumerate(frames(0, 10)):
        np.testing.assert_array_equal(series.frames[number], pixels)


def test_a_pixel_mask_of_another_shape_is_left_out_and_said(send, source):
    send(start(mask=np.ones(SHAPE[::-1], bool)))
    send(end())
    events = poll_to_end(source)
    assert of(AcquisitionStart, events)[0].pixel_mask is None
    (fault,) = of(Fault, events)
    assert fault.frames == 0
    assert "The pixel mask of series scan-1 is left out. It is (40, 24) pixels" in str(fault.error)


@pytest.mark.parametrize("lz4", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
def test_every_type_of_frame(send, source, dtype, lz4):
    send(start(dtype=dtype))
    send(some(0, frames(0, 3, dtype), lz4=lz4))
    send(end())
    series = read(poll_to_end(source))
    for number, pixels in enumerate(frames(0, 3, dtype)):
        assert series.frames[number].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(series.frames[number], pixels)


def test_small_messages_are_joined_and_any_part_of_them_can_be_read(send, source):
    send(start())
    sizes = [1, 4, 1, 1, 7, 2]
    first = 0
    for size in sizes:
        send(some(first, frames(first, size)))
        first += size
    send(end())
    expected = frames(0, first)
    for block in blocks_of(poll_to_end(source)):
        count = len(block.indices)
        for begin in range(count):
            for stop in range(begin + 1, count + 1):
                out = np.zeros((stop - begin, *SHAPE), np.uint16)
                assert not block.read_into(begin, out)
                np.testing.assert_array_equal(out, expected[block.indices[begin:stop]])


def test_two_senders_are_told_apart(connect, source):
    one, other = connect(), connect()
    for send, name in ((one, "a"), (other, "b")):
        send(start(name))
    for number in range(5):
        one(some(number, frames(number, 1), "a"))
        other(some(number, frames(number, 1), "b"))
    one(end("a"))
    other(end("b"))
    events = poll_to_end(source, ends=2)
    assert {event.series for event in of(AcquisitionStart, events)} == {"a", "b"}
    for name in "ab":
        indices = [
            index for block in blocks_of(events) if block.series == name for index in block.indices
        ]
        assert indices == list(range(5))


def told(events) -> list[tuple[str, str]]:
    """What was said of which series, neighbouring blocks taken together."""
    said = [(type(event).__name__, event.series) for event in events]
    return [each for each, before in zip(said, [None, *said], strict=False) if each != before]


def counted(events, series: str) -> list[int]:
    return [
        index for block in blocks_of(events) if block.series == series for index in block.indices
    ]


def test_a_sender_that_begins_waits_until_the_one_before_it_is_read_to_its_end(
    send, source, monkeypatch
):
    monkeypatch.setattr(turns, "PATIENCE_S", WAIT_S)
    three = frames(0, 3)
    for parts in (
        start("one", publisher="a"),
        some(0, three, "one", publisher="a"),
        start("two", publisher="b"),
        some(3, three, "one", publisher="a"),
        some(0, three, "two", publisher="b"),
        start("three", publisher="c"),
        end("one", publisher="a"),
        some(0, three, "three", publisher="c"),
        end("two", publisher="b"),
        end("three", publisher="c"),
    ):
        send(parts)
    events = poll_to_end(source, ends=3)
    assert told(events) == [
        (kind, series)
        for series in ("one", "two", "three")
        for kind in ("AcquisitionStart", "NativeBlock", "AcquisitionEnd")
    ]
    assert counted(events, "one") == list(range(6))
    assert counted(events, "two") == counted(events, "three") == list(range(3))


def test_a_sender_that_is_gone_is_not_waited_for(send, source):
    for parts in (
        start("one", publisher="a"),
        start("two", publisher="b"),
        end("two", publisher="b"),
    ):
        send(parts)
    events = poll_to_end(source)
    assert told(events) == [
        ("AcquisitionStart", "one"), ("AcquisitionStart", "two"), ("AcquisitionEnd", "two"),
    ]  # fmt: skip


def test_a_slow_sender_is_waited_for_at_its_own_pace(send, source, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE_S", 0.2)
    monkeypatch.setattr(turns, "_GAPS", 100)  # where this machine stands still in the last pause
    events = []

    def pause():
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            events.extend(source.poll(0.05))

    send(start("slow", publisher="a"))
    for number in range(3):
        send(some(number, frames(number, 1), "slow", publisher="a"))
        pause()
    send(start("next", publisher="b"))
    send(end("next", publisher="b"))
    pause()
    send(some(3, frames(3, 1), "slow", publisher="a"))
    send(end("slow", publisher="a"))
    events += poll_to_end(source, ends=2)
    assert told(event for event in events if not isinstance(event, Fault)) == [
        (kind, series)
        for series, kinds in (
            ("slow", ("AcquisitionStart", "NativeBlock", "AcquisitionEnd")),
            ("next", ("AcquisitionStart", "AcquisitionEnd")),
        )
        for kind in kinds
    ]
    assert counted(events, "slow") == list(range(4))


def test_who_waits_for_another_sender_is_told_once():
    one, two = (AcquisitionStart(name, SHAPE, np.dtype("uint16")) for name in ("one", "two"))
    queue = turns.Turns(most_bytes=1)
    assert queue.take("a", one, 0) == [one]
    for pause in (0.0, 8.0):
        queue.pass_time(pause)
        queue.take("a", NativeBlock("one", np.arange(1), [frames(0, 1)]), 0)
    assert not queue.take("b", two, 0)
    assert not queue.pass_time(0.5)
    (fault,) = queue.pass_time(1.0)
    assert isinstance(fault.error, SequenceError)
    assert str(fault.error).startswith("Series two waits for its turn: another sender's is")
    assert str(fault.error).endswith("has been silent for 40 s.")
    assert not queue.pass_time(38.0)
    assert queue.pass_time(1.0) == [two]


def test_no_more_is_held_back_for_a_sender_than_one_message_may_have():
    eight = frames(0, 8)
    with (
        NativeSource("tcp://127.0.0.1:*", max_bytes=2 * eight.nbytes) as source,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as socket,
    ):
        socket.connect(source.address)
        socket.send_multipart(start("one", publisher="a"))
        socket.send_multipart(start("two", publisher="b"))
        for turn in range(4):
            socket.send_multipart(some(8 * turn, eight, "one", publisher="a"))
            socket.send_multipart(some(8 * turn, eight, "two", publisher="b"))
        socket.send_multipart(end("two", publisher="b"))
        events = poll_to_end(source)
    assert counted(events, "one") == counted(events, "two") == list(range(32))
    second = told(events).index(("AcquisitionStart", "two"))
    assert ("NativeBlock", "one") in told(events)[second:]  # it had not ended


def test_frames_of_another_shape_or_type_are_refused_and_their_neighbours_are_not(send, source):
    send(start())
    send(some(0, frames(0, 2)))
    send(some(2, frames(2, 2, "uint8")))
    send(some(4, frames(4, 1, shape=(40, 24))))
    send(some(5, frames(5, 1)))
    send(end())
    series = read(poll_to_end(source))
    assert sorted(series.frames) == [0, 1, 5]
    assert sorted(series.failures) == [2, 3, 4]
    assert all(isinstance(error, WrongFrame) for error in series.failures.values())


def test_an_empty_message_of_frames_is_nothing(send, source):
    send(start())
    send(some(0, np.zeros((0, *SHAPE), np.uint16)))
    send(end())
    events = poll_to_end(source)
    assert not blocks_of(events)
    assert not of(Fault, events)


def test_frames_that_were_announced_and_cannot_be_read_are_counted(send, source):
    whole = some(0, frames(0, 3))
    send([*whole[:3], whole[3][:50]])
    send(whole[:3])
    send([*whole[:3], b"\xff" * 99])
    send([b"frames", b"no header"])
    send(end())
    faults = of(Fault, poll_to_end(source))
    assert [fault.frames for fault in faults] == [3, 3, 3, 1]
    assert all(isinstance(fault.error, CorruptFrame) for fault in faults)


def test_a_header_beyond_the_limit_is_not_even_searched_for_the_frames_it_announces(send, source):
    """A megabyte of it may unpack to a hundred of empty lists; a message may have a thousand."""
    arrays = [{"shape": [3, *SHAPE]}]
    for padding in (0, wire.MAX_HEADER_BYTES):
        send([b"frames", msgpack.packb({"arrays": arrays, "padding": bytes(padding)})])
    send(end())
    assert [fault.frames for fault in of(Fault, poll_to_end(source))] == [3, 1]


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"hello"],
        [b"\xff", b"\xff"],
        [b"acquisition_start", b"\x80"],
        wire.encode(messages.AcquisitionStart(frame_shape=SHAPE, dtype="uint8"))[:1],
        wire.encode(messages.Goodbye()),
    ],
)
def test_messages_of_no_such_protocol(send, source, parts):
    send(parts)
    send(end())
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadMessage)
    assert of(Fault, events)[0].frames == 0


@pytest.mark.parametrize(
    ("name", "error", "series"),
    [("mine", BadStart, "mine"), ("", BadMessage, ""), ("x" * 1001, BadMessage, "")],
)
def test_a_start_that_cannot_be_read_is_refused_under_its_own_id(send, source, name, error, series):
    topic, header = start(name)
    send([topic, msgpack.packb(msgpack.unpackb(header) | {"dtype": "int16"})])
    send(end())
    (fault,) = of(Fault, poll_to_end(source))
    assert (type(fault.error), fault.series) == (error, series)
    assert "wrong dtype" in str(fault.error)


def test_a_message_beyond_the_limit_is_refused():
    with (
        NativeSource("tcp://127.0.0.1:*", max_bytes=4000) as source,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as socket,
    ):
        socket.connect(source.address)
        socket.send_multipart(some(0, frames(0, 3)))
        socket.send_multipart(end())
        events = poll_to_end(source)
    assert "at most 4000 are accepted: make source.max_message larger." in str(
        of(Fault, events)[0].error
    )
    assert of(Fault, events)[0].frames == 3


def test_a_frame_far_beyond_the_limit_is_refused_and_not_lost_in_silence():
    with (
        NativeSource("tcp://127.0.0.1:*", max_bytes=1 << 16) as source,
        FrameSender(source.address, timeout=WAIT_S) as sender,
    ):
        sender.start(frame_shape=(2048, 2048), dtype="float32")
        sender.send(np.zeros((2048, 2048), np.float32))
        sender.end()
        events = poll_to_end(source)
        assert sender.breaks == 0
    (fault,) = of(Fault, events)
    assert (type(fault.error), fault.frames) == (CorruptFrame, 1)


def test_a_block_beyond_the_limit_comes_in_parts_that_are_not():
    side, n = 1024, 40
    block = np.broadcast_to(np.arange(n, dtype=np.uint16)[:, None, None], (n, side, side))
    with (
        NativeSource("tcp://127.0.0.1:*", max_bytes=17 << 20) as source,
        FrameSender(source.address, timeout=WAIT_S) as sender,
    ):
        sender.start(frame_shape=(side, side), dtype="uint16")
        sender.send(block)
        sender.end()
        events = poll_to_end(source)
    assert not of(Fault, events)
    series = read(events)
    assert sorted(series.frames) == list(range(n))
    assert all((pixels == number).all() for number, pixels in series.frames.items())


def test_a_port_in_use(source):
    with pytest.raises(BindError, match="another program uses the port"):
        NativeSource(source.address)


def test_with_curve_keys_only_those_who_know_the_public_key_get_in():
    public, secret = zmq.curve_keypair()
    with (
        NativeSource("tcp://127.0.0.1:*", curve=(public, secret)) as source,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as stranger,
        context.socket(zmq.PUSH) as friend,
    ):
        for socket in (stranger, friend):
            socket.linger = 0
        friend.curve_publickey, friend.curve_secretkey = zmq.curve_keypair()
        friend.curve_serverkey = public
        stranger.connect(source.address)
        friend.connect(source.address)
        stranger.send_multipart(end("stranger"))
        friend.send_multipart(end("friend"))
        events = poll_until(source, lambda events: len(events) >= 1)
        events += source.poll(0.3)
    assert [event.series for event in events] == ["friend"]


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_messages_lose_nothing_else(send, source, data):
    message = data.draw(
        st.sampled_from(
            [
                start(mask=np.ones(SHAPE, bool)),
                some(0, frames(0, 2)),
                some(0, frames(0, 2), lz4=True),
                end(),
            ]
        )
    )
    parts = [bytearray(part) for part in message]
    for part in parts:
        for place in data.draw(st.lists(st.integers(0, len(part) - 1), max_size=3)):
            part[place] = data.draw(st.integers(0, 255))
    send([bytes(part) for part in parts[: data.draw(st.integers(1, 9))]])
    send(some(0, frames(0, 1), "good"))
    send(end("good"))
    events: list = []
    while not any(event.series == "good" for event in of(AcquisitionEnd, events)):
        events += source.poll(5)
    good = AcquisitionStart("good", SHAPE, np.dtype("uint16"))
    for block in blocks_of(events):
        if block.series == "good":
            np.testing.assert_array_equal(read([block], good).frames[0], frames(0, 1)[0])
        else:
            read([block], good)
