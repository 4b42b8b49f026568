"""``FrameSender`` against a real PULL socket."""

import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq

from prenet4d_client import FrameSender, InvalidUse, MissingCodec, NoAnswer, decode

from .conftest import PATIENCE_S


@pytest.fixture
def pull(bind):
    return bind(zmq.PULL)


def sender_to(pull, **options):
    return FrameSender(pull.address, timeout=PATIENCE_S, **options)


def received(pull):
    return decode(pull.socket.recv_multipart())


def start(sender, **changes):
    return sender.start(**({"frame_shape": (8, 9), "dtype": "uint16"} | changes))


def frames(n, dtype=np.uint16):
    return np.arange(n * 72).reshape(n, 8, 9).astype(dtype)


class OnAGpu:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("use Tensor.cpu() first.")


def test_an_acquisition_arrives_as_it_was_sent(pull):
    mask = np.ones((8, 9), bool)
    mask[2] = False
    with sender_to(pull) as sender:
        name = start(
            sender,
            scan_shape=(2, 3),
            pixel_mask=mask,
            saturation_value=4095,
            gain=2.0,
            metadata={"sample": "Si"},
        )
        sender.send(frames(1)[0])
        sender.send(frames(3))
        sender.send(frames(2), indices=[5, 4])
    begin, one, many, told, end = (received(pull) for _ in range(5))

    assert begin.acquisition_id == name
    assert begin.frame_shape == (8, 9)
    assert begin.scan_shape == (2, 3)
    assert (begin.saturation_value, begin.gain) == (4095, 2.0)
    assert begin.metadata == {"sample": "Si"}
    np.testing.assert_array_equal(begin.pixel_mask, mask)
    assert [m.indices.tolist() for m in (one, many, told)] == [[0], [1, 2, 3], [5, 4]]
    np.testing.assert_array_equal(many.frames, frames(3))
    assert [m.sequence for m in (one, many, told)] == [0, 1, 2]
    assert {m.acquisition_id for m in (one, many, told, end)} == {name}
    assert (end.type, end.aborted, end.frames) == ("acquisition_end", False, 6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("lz4", [False, True])
def test_every_dtype(pull, dtype, lz4):
    if lz4:
        pytest.importorskip("lz4.block", reason="the extra lz4 is not installed")
    with sender_to(pull, lz4=lz4) as sender:
        start(sender, dtype=np.dtype(dtype))
        sender.send(frames(2, dtype))
    assert received(pull).dtype == dtype
    block = received(pull)
    assert block.frames.dtype == dtype
    np.testing.assert_array_equal(block.frames, frames(2, dtype))


@pytest.mark.parametrize(
    "block",
    [
        frames(2, ">u2"),
        np.asfortranarray(frames(2)),
        list(frames(2)),
        np.ma.masked_array(frames(2)),
    ],
    ids=["big-endian", "Fortran", "list", "without a masked pixel"],
)
def test_frames_may_lie_in_memory_as_they_like(pull, block):
    with sender_to(pull) as sender:
        start(sender)
        sender.send(block)
    received(pull)
    np.testing.assert_array_equal(received(pull).frames, frames(2))


def test_a_frame_may_be_overwritten_as_soon_as_it_is_sent(pull):
    with sender_to(pull) as sender:
        sender.start(frame_shape=(512, 512), dtype="uint16")
        buffer = np.zeros((512, 512), np.uint16)
        for value in range(5):
            buffer[:] = value
            sender.send(buffer)
    received(pull)
    assert [int(received(pull).frames.max()) for _ in range(5)] == list(range(5))


def numbered(n, shape):
    """(n, h, w) frames, each of which holds its own number in every pixel: of hardly any memory."""
    return np.broadcast_to(np.arange(n, dtype=np.uint16)[:, None, None], (n, *shape))


def test_a_large_block_goes_in_messages_of_at_most_16_mib(pull):
    with sender_to(pull) as sender:
        sender.start(frame_shape=(1024, 1024), dtype="uint16")
        sender.send(numbered(20, (1024, 1024)))
        sender.send(numbered(9, (1024, 1024)), indices=range(40, 49))
        sender.send(numbered(1, (1024, 1024)))
        received(pull)
        messages = [received(pull) for _ in range(6)]
    assert [len(m.frames) for m in messages] == [8, 8, 4, 8, 1, 1]
    assert [m.sequence for m in messages] == list(range(6))
    indices = np.concatenate([m.indices for m in messages])
    assert indices.tolist() == [*range(20), *range(40, 49), 49]
    for message in messages[:3]:
        assert (message.frames == message.indices[:, None, None]).all()
    assert received(pull).header.frames == 30


def test_a_frame_of_more_than_16_mib_goes_alone(pull):
    with sender_to(pull) as sender:
        sender.start(frame_shape=(3072, 3072), dtype="uint16")
        sender.send(numbered(2, (3072, 3072)))
        received(pull)
        assert [received(pull).indices.tolist() for _ in range(2)] == [[0], [1]]


def test_several_acquisitions_over_one_sender(pull):
    with sender_to(pull) as sender:
        names = []
        for dtype in ("uint8", "float32"):
            names.append(start(sender, dtype=dtype))
            sender.send(frames(2, dtype))
            sender.end()
    messages = [received(pull) for _ in range(6)]
    assert [m.type for m in messages] == ["acquisition_start", "frames", "acquisition_end"] * 2
    assert [m.acquisition_id for m in messages] == [names[0]] * 3 + [names[1]] * 3
    assert messages[4].indices.tolist() == [0, 1]
    assert [m.sequence for m in messages] == [0, 0, 0, 1, 1, 1]


def test_an_exception_aborts_the_acquisition_and_is_seen(pull):
    with pytest.raises(ZeroDivisionError), sender_to(pull) as sender:  # noqa: PT012
        start(sender)
        sender.send(frames(2))
        1 / 0  # noqa: B018
    received(pull), received(pull)
    end = received(pull)
    assert (end.type, end.aborted, end.frames) == ("acquisition_end", True, 2)
    assert end.reason == "ZeroDivisionError: division by zero"


def test_ctrl_c_is_given_as_the_reason(pull):
    with pytest.raises(KeyboardInterrupt), sender_to(pull) as sender:  # noqa: PT012
        start(sender)
        raise KeyboardInterrupt
    received(pull)
    assert received(pull).reason == "KeyboardInterrupt"


INTERRUPTED = """
import random, signal, sys
import numpy as np
from prenet4d_client import FrameSender

signal.signal(signal.SIGALRM, signal.default_int_handler)
frame = np.zeros((8, 9), np.uint16)
with FrameSender(sys.argv[1]) as sender:
    sender.start(frame_shape=frame.shape, dtype=frame.dtype)
    sender.send(frame)  # which loads all that is loaded late
    for _ in range(300):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
            for _ in range(10_000):
                sender.send(frame)
        except KeyboardInterrupt:
            pass
"""


def test_ctrl_c_between_the_parts_of_a_message_does_not_spoil_the_next_one(bind):
    pull = bind(zmq.PULL, rcvhwm=0)
    subprocess.run([sys.executable, "-c", INTERRUPTED, pull.address], check=True)
    came = [pull.socket.recv_multipart()]
    while came[-1][0] != b"acquisition_end":
        came.append(pull.socket.recv_multipart())
        assert came[-1][0] in (b"frames", b"acquisition_end", b"")
        assert len(came[-1]) <= 4  # frames have as many, and none has another's
    assert decode(came[-1]).type == "acquisition_end"


def test_an_exception_about_a_name_that_is_no_text_aborts_it_too(pull):
    with (  # noqa: PT012
        pytest.raises(OSError, match="lost"),
        sender_to(pull) as sender,
    ):
        start(sender)
        raise OSError("scan\udcff.raw is lost")
    received(pull)
    assert received(pull).reason == "OSError: scan?.raw is lost"


# --- what is refused before it is sent -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dtype": "int64"}, "dtype int64 cannot be sent: convert them to uint8 or uint16"),
        ({"dtype": float}, "dtype float64 cannot be sent"),
        ({"dtype": "counts"}, "dtype counts cannot be sent"),
        ({"frame_shape": (8,)}, "frame_shape"),
        ({"frame_shape": (8, 1 << 20)}, "frame_shape"),
        ({"scan_shape": (0, 4)}, "scan_shape"),
        ({"gain": 0}, "gain"),
        ({"gain": float("inf")}, "gain"),
        ({"saturation_value": 0}, "saturation_value: Input should be greater than 0"),
        ({"saturation_value": float("nan")}, "saturation_value"),
        ({"metadata": {"a": [1, 2]}}, r"metadata\['a'\] is a list: its values must be text"),
        ({"metadata": "Si"}, "metadata is a str: give a map"),
        ({"metadata": ["Si"]}, "metadata is a list: give a map"),
        ({"metadata": {"log": "x" * (1 << 18)}}, "take 262154 bytes; at most 262144 are accepted"),
        ({"acquisition_id": "x" * 1001}, "acquisition_id has 1001 characters; at most 1000"),
        ({"metadata": {"log": "x" * (1 << 21)}}, "take 2097162 bytes; at most 262144 are accepted"),
        ({"pixel_mask": np.ones((9, 8))}, r"mask has shape \(9, 8\); the frames have \(8, 9\)"),
        ({"pixel_mask": [[1], [1, 2]]}, "The pixel mask cannot be read as an array: setting an"),
    ],
)
def test_an_impossible_acquisition_is_refused(pull, changes, what):
    with (
        sender_to(pull) as sender,
        pytest.raises(InvalidUse, match=what),
    ):
        start(sender, **changes)
    assert not pull.socket.poll(50)


@pytest.mark.parametrize(
    ("block", "indices", "what"),
    [
        (
            frames(2, np.int64),
            None,
            r"dtype int64.*announced uint16.*np.asarray\(frames, 'uint16'\)",
        ),
        (frames(1)[0].tolist(), None, "dtype int64"),
        (frames(2, np.float32), None, "dtype float32"),
        (frames(2).transpose(0, 2, 1), None, r"shape \(2, 9, 8\).*frames of 8 × 9"),
        (frames(2)[np.newaxis], None, r"shape \(1, 2, 8, 9\)"),
        (frames(1)[0, 0], None, r"shape \(9,\)"),
        (None, None, r"shape \(\).*send \(8, 9\) or"),
        ([], None, r"shape \(0,\)"),
        ([frames(1)[0], frames(1)[0, :4]], None, "The frames cannot be read as an array: setting"),
        (OnAGpu(), None, r"The frames cannot be read as an array: use Tensor.cpu\(\) first\.$"),
        (np.ma.masked_equal(frames(1), 5), None, "are masked.*give start.. the pixel_mask"),
        (frames(2), [[0], [1, 2]], "indices cannot be read as an array"),
        (frames(2), [1], "must be 2 integers"),
        (frames(2), 1, "must be 2 integers"),
        (frames(2), [0.0, 1.0], "must be 2 integers"),
        (frames(2), [0, -1], "integers from 0"),
        (frames(1), np.array([1 << 63], np.uint64), r"integers from 0, below 2\*\*62"),
        (frames(1), [(1 << 63) - 1], r"integers from 0, below 2\*\*62"),
    ],
)
def test_frames_that_do_not_fit_are_refused_and_lose_nothing_else(pull, block, indices, what):
    with sender_to(pull) as sender:
        start(sender)
        with pytest.raises(InvalidUse, match=what):
            sender.send(block, indices)
        sender.send(frames(1))
    received(pull)
    assert received(pull).indices.tolist() == [0]
    assert received(pull).frames == 1


def test_calls_out_of_order_are_refused(pull):
    sender = sender_to(pull)
    with pytest.raises(InvalidUse, match=r"call start\(\) before send\(\)"):
        sender.send(frames(1))
    with pytest.raises(InvalidUse, match=r"call start\(\) before end\(\)"):
        sender.end()
    start(sender)
    with pytest.raises(InvalidUse, match=r"call end\(\) before start\(\)"):
        start(sender)
    sender.close()
    sender.close()
    with pytest.raises(InvalidUse, match="is closed"):
        start(sender)


@pytest.mark.parametrize("call", ["start", "send", "end"])
def test_a_closed_sender_says_so(nobody, call):
    sender = FrameSender(nobody)
    sender.close()
    arguments = {"start": {"frame_shape": (8, 9), "dtype": "uint8"}, "send": {"frames": frames(1)}}
    with pytest.raises(InvalidUse, match="This FrameSender is closed"):
        getattr(sender, call)(**arguments.get(call, {}))


def test_metadata_that_cannot_be_sent_are_refused(nobody):
    with FrameSender(nobody) as sender, pytest.raises(InvalidUse, match="cannot be sent"):
        start(sender, metadata={"electrons": 2**70})


@pytest.mark.parametrize("aborted", [True, 1, None, b"beam lost"])
def test_a_reason_that_is_no_text_is_refused_and_the_acquisition_goes_on(pull, aborted):
    with sender_to(pull) as sender:
        start(sender)
        with pytest.raises(InvalidUse, match="say why the acquisition ended early, in a text"):
            sender.end(aborted=aborted)
        sender.send(frames(1))
    assert [received(pull).type for _ in range(3)][-1] == "acquisition_end"


def test_of_a_long_reason_the_beginning_is_sent(pull):
    with pytest.raises(OSError, match="x"), sender_to(pull) as sender:  # noqa: PT012
        start(sender)
        raise OSError("x" * (1 << 21))
    received(pull)
    end = received(pull)
    assert end.aborted
    assert end.reason.startswith("OSError: xxx")
    assert len(end.reason) == 1000


def test_no_frames_are_no_message(pull):
    with sender_to(pull) as sender:
        start(sender)
        sender.send(frames(0))
    assert [received(pull).type for _ in range(2)] == ["acquisition_start", "acquisition_end"]


@pytest.mark.parametrize(
    "address",
    [
        5560,
        "127.0.0.1",
        "tcp://",
        "http://localhost:5560",
        "tcp://host",
        "tcp://[::1]",
        "tcp://host:",
    ]
    + [f"tcp://127.0.0.1:{port}" for port in ("0", "00", "99999", "-1", "٥", "5560/")],
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(InvalidUse, match=r"tcp://127\.0\.0\.1:5560"):
        FrameSender(address)


@pytest.mark.parametrize("queue", [0, -1, 1 << 31, 1.5, "5"])
def test_a_queue_that_is_none_is_refused(nobody, queue):
    with pytest.raises(InvalidUse, match=f"queue is {queue!r}; it must be a whole number"):
        FrameSender(nobody, queue=queue)


def test_lz4_that_is_not_installed_is_told_at_once(monkeypatch, nobody):
    monkeypatch.setitem(__import__("sys").modules, "lz4.block", None)
    with pytest.raises(MissingCodec, match="pip install"):
        FrameSender(nobody, lz4=True)


# --- a service that is absent or slow ------------------------------------------------------------


def test_no_service(nobody):
    with FrameSender(nobody, timeout=0.1) as sender, pytest.raises(NoAnswer, match="is it running"):
        start(sender)


def test_a_service_that_takes_nothing_holds_the_sender_and_the_frame_can_be_sent_again(bind):
    pull = bind(zmq.PULL, rcvhwm=1, rcvbuf=4096)
    sender = sender_to(pull, queue=1)
    sender.start(frame_shape=(512, 512), dtype="float32")
    frame, sent = np.zeros((512, 512), np.float32), 0
    sender._socket.sndtimeo = 500
    with pytest.raises(NoAnswer, match="does it keep up, and is no other sender"):  # noqa: PT012
        while True:
            sender.send(frame)
            sent += 1
    assert sent < 100

    messages = []
    reader = threading.Thread(
        target=lambda: messages.extend(received(pull) for _ in range(sent + 3))
    )
    reader.start()
    sender._socket.sndtimeo = int(1000 * PATIENCE_S)
    sender.send(frame)
    sender.close()
    reader.join()
    indices = [m.indices[0] for m in messages if m.type == "frames"]
    assert indices == list(range(sent + 1))
    assert messages[-1].header.frames == sent + 1


def test_of_a_large_block_it_is_told_how_much_was_sent_and_the_rest_can_be_sent_again(bind):
    pull = bind(zmq.PULL, rcvhwm=1, rcvbuf=4096)
    sender = sender_to(pull, queue=1)
    sender.start(frame_shape=(1024, 1024), dtype="uint16")
    block, indices = numbered(100, (1024, 1024)), np.arange(1000, 1100)
    assert pull.socket.poll(1000 * PATIENCE_S)  # the start has made room for the next message
    sender._socket.sndtimeo = 500
    with pytest.raises(NoAnswer, match=r"Of these 100 frames, the first \d+ were sent") as caught:
        sender.send(block, indices)
    sent = caught.value.frames_sent
    assert 0 < sent < 100
    assert f"go on with frames[{sent}:]" in str(caught.value)

    def sent_of_the_rest():
        with pytest.raises(NoAnswer) as again:
            sender.send(block[sent:], indices[sent:])
        return again.value.frames_sent

    while more := sent_of_the_rest():  # where this machine stood still, there was room after all
        sent += more

    messages = []

    def read():
        while not messages or messages[-1][0] != "acquisition_end":
            message = received(pull)
            messages.append((message.type, message.arrays.get("indices"), message.header))

    reader = threading.Thread(target=read)
    reader.start()
    sender._socket.sndtimeo = int(1000 * PATIENCE_S)
    sender.send(block[sent:])  # whose numbers go on
    sender.close()
    reader.join()
    came = np.concatenate([numbers for kind, numbers, _ in messages if kind == "frames"])
    assert came.tolist() == indices.tolist()
    assert messages[-1][2].frames == 100


def test_a_connection_that_breaks_in_an_acquisition_is_told_and_counted(bind, caplog):
    first = bind(zmq.PULL)
    with sender_to(first) as sender:
        name = start(sender)
        sender.send(frames(1))
        assert [received(first).type for _ in range(2)] == ["acquisition_start", "frames"]
        assert sender.breaks == 0
        first.close()
        second = bind(zmq.PULL, first.address)
        with caplog.at_level(logging.WARNING):
            deadline = time.monotonic() + PATIENCE_S
            while not sender.breaks and time.monotonic() < deadline:
                sender.send(frames(1))
        assert sender.breaks == 1
        assert f"broke in the middle of acquisition {name}" in caplog.text
        sender.end(aborted="the service was started again")
        start(sender)
        sender.send(frames(1))
        assert sender.breaks == 0
        while received(second).type != "acquisition_start":
            pass
        assert received(second).type == "frames"


def test_a_sender_that_may_not_wait_still_hands_over_what_it_sent(pull, monkeypatch):
    monkeypatch.setattr("prenet4d_client.sender.LEAST_ANSWER_S", PATIENCE_S)
    with sender_to(pull) as sender:
        start(sender)
        sender._timeout = 0
    assert [received(pull).type for _ in range(2)] == ["acquisition_start", "acquisition_end"]


def more_than_is_taken(bind):
    """A service that reads nothing, and a sender with more than fits on the way to it."""
    pull = bind(zmq.PULL, rcvhwm=1, rcvbuf=4096)
    sender = sender_to(pull, queue=64)
    sender.start(frame_shape=(1024, 1024), dtype="float32")
    for _ in range(40):
        sender.send(np.zeros((1024, 1024), np.float32))
    return pull, sender


def test_frames_that_cannot_be_handed_over_are_told_on_close(bind):
    _pull, sender = more_than_is_taken(bind)
    sender._timeout = 1
    with pytest.raises(NoAnswer, match=r"did not take the last frames within 1 s"):
        sender.close()


def test_a_connection_that_breaks_while_the_last_frames_are_handed_over_is_told(bind):
    pull, sender = more_than_is_taken(bind)
    sender.end()

    def break_the_connection():
        while not sender._socket.closed:  # it is being handed over once it is
            time.sleep(0.01)
        pull.close()

    breaking = threading.Thread(target=break_the_connection)
    breaking.start()
    with pytest.raises(NoAnswer, match="did not take the last frames before the connection broke"):
        sender.close()
    breaking.join()


@pytest.mark.parametrize("then", ["close", "start"])
def test_a_connection_that_breaks_after_an_acquisition_is_told_and_counted(bind, caplog, then):
    pull = bind(zmq.PULL)
    with sender_to(pull) as sender:
        start(sender)
        sender.send(frames(1))
        sender.end()
        pull.close()
        assert sender._disconnections.poll(1000 * PATIENCE_S)
        if then == "start":
            bind(zmq.PULL, pull.address)
            start(sender)
        else:
            sender.close()
            assert sender.breaks == 1
        assert "broke after the last acquisition was sent" in caplog.text
        assert "in the middle" not in caplog.text


def test_a_connection_that_broke_between_acquisitions_lost_nothing(bind):
    pull = bind(zmq.PULL)
    with sender_to(pull) as sender:
        start(sender)
        sender.end()
        assert [received(pull).type for _ in range(2)] == ["acquisition_start", "acquisition_end"]
        pull.close()
        assert sender._disconnections.poll(1000 * PATIENCE_S)


def forgets(pull):
    sender = sender_to(pull)
    sender.start(frame_shape=(1024, 1024), dtype="uint16")
    for _ in range(10):
        sender.send(numbered(8, (1024, 1024)))
    sender.end()


ENDS = """
import sys
import numpy as np
from prenet4d_client import FrameSender

sender = FrameSender(sys.argv[1], timeout=60)
sender.start(frame_shape=(1024, 1024), dtype="uint16")
for _ in range(10):
    sender.send(np.zeros((8, 1024, 1024), np.uint16))
sender.end()
"""


def ends(pull):
    subprocess.run([sys.executable, "-c", ENDS, pull.address], check=True)


@pytest.mark.parametrize("leave", [forgets, ends])
def test_a_sender_that_nobody_closes_hands_over_what_it_sent(bind, leave):
    pull = bind(zmq.PULL, rcvhwm=1, rcvbuf=4096)
    leaving = threading.Thread(target=leave, args=(pull,))
    leaving.start()
    time.sleep(1)  # whoever does not wait for it is gone by then
    types = [received(pull).type for _ in range(12)]
    assert types == ["acquisition_start", *["frames"] * 10, "acquisition_end"]
    leaving.join()


def test_a_sender_that_was_closed_in_vain_says_so_on_leaving_the_block(bind):
    pull = bind(zmq.PULL, rcvhwm=1, rcvbuf=4096)
    told = pytest.raises(NoAnswer, match=r"did not take the last frames within 1 s")
    with told, sender_to(pull, queue=64) as sender:
        sender.start(frame_shape=(1024, 1024), dtype="float32")
        for _ in range(40):
            sender.send(np.zeros((1024, 1024), np.float32))
        sender._timeout = 1
        sender.close()


def test_an_exception_is_not_hidden_by_a_service_that_is_gone(bind):
    pull = bind(zmq.PULL)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError) as caught,
        sender_to(pull) as sender,
    ):
        start(sender)
        received(pull)
        pull.close()
        sender._socket.sndtimeo = 500
        with pytest.raises(NoAnswer):  # noqa: PT012
            while True:
                sender.send(frames(1))
        1 / 0  # noqa: B018
    assert "No service took the message" in caught.value.__notes__[0]
