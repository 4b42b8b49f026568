"""The publisher: subscribers may miss messages and see that they did; receivers miss none."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import zmq

from prenet4d_client import LosslessReceiver, Subscriber
from prenet4d_client.errors import ConnectionRefused
from prenet4d_client.messages import (
    AcquisitionEnd,
    AcquisitionStart,
    Corrected,
    Event,
    Goodbye,
    Mean,
    Register,
)
from prenet4d_client.wire import decode, encode
from prenet4d_server.config import LosslessSettings, StreamSettings
from prenet4d_server.errors import BindError
from prenet4d_server.publishing.lossless import Receivers
from prenet4d_server.publishing.publisher import Publisher

from ..live import FREE, TIMEOUT_S, until

START = AcquisitionStart(acquisition_id="scan", frame_shape=(8, 8), dtype="uint16")


@contextmanager
def publishing(stream=None, **lossless):
    context = zmq.Context()
    publisher = Publisher(
        StreamSettings(address=FREE, **(stream or {})),
        LosslessSettings(address=FREE, **({"heartbeat_s": TIMEOUT_S} | lossless)),
        context=context,
    )
    try:
        yield publisher
    finally:
        publisher.close(2.0)
        context.term()


def batch(number, size=2, side=8):
    patterns = np.full((size, side, side), number, np.float32)
    indices = np.arange(size, dtype=np.int64)
    return Corrected(batch=number), {"indices": indices, "patterns": patterns}


def receiver(publisher, topics=("corrected",), **options):
    return LosslessReceiver(
        publisher.lossless_address, name="tester", topics=topics,
        **({"timeout": TIMEOUT_S} | options),
    )  # fmt: skip


class RawReceiver:
    """A receiver that says only what it is told to, to misbehave with."""

    def __init__(self, publisher, *parts):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(publisher.lossless_address)
        self.socket.send_multipart(parts)

    def receive(self):
        assert self.socket.poll(TIMEOUT_S * 1000)
        return decode(self.socket.recv_multipart()).header

    def receive_until(self, kind):
        while (header := self.receive()).type != kind:
            pass
        return header

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)


def codes(publisher):
    return [event.code for event in publisher.recent_events]


def test_each_type_is_numbered_without_holes_wanted_or_not():
    with publishing() as publisher:
        sent = threading.Event()
        for number in range(5):
            publisher.publish(batch(number), on_sent=sent.set if number == 4 else None)
        assert sent.wait(TIMEOUT_S)  # or whoever subscribes now would get some of them
        with Subscriber(publisher.stream_address, "corrected", timeout=TIMEOUT_S) as stream:
            until(lambda: publisher.wants("corrected"))
            assert not publisher.wants("aligned")
            for number in (5, 6):
                publisher.publish(batch(number), (Event(level="info", code="x", message="y"), {}))
            came = [stream.receive() for _ in range(2)]
        assert [message.header.sequence for message in came] == [5, 6]
        assert {message.header.publisher for message in came} == {publisher.id}
        assert (came[0].patterns == 5).all()
        until(lambda: not publisher.wants("corrected"))


def test_a_slow_subscriber_never_holds_anything_back_and_sees_its_gap():
    side, count = 256, 200
    with (
        publishing(stream={"high_water": 1}) as publisher,
        Subscriber(publisher.stream_address, "corrected", timeout=TIMEOUT_S, queue=1) as stream,
    ):
        until(lambda: publisher.wants("corrected"))
        sent = threading.Event()
        for number in range(count):
            publisher.publish(batch(number, 8, side), on_sent=sent.set)
            assert sent.wait(TIMEOUT_S)
        while stream.missed == 0:  # until one finds room again
            publisher.publish(batch(count, 1))
            while stream._socket.poll(20):
                stream.receive()


def test_a_receiver_with_little_credit_gets_every_message_in_order():
    with publishing() as publisher, receiver(publisher, credit=2) as messages:

        def publish():
            for number in range(100):
                publisher.publish(batch(number))

        thread = threading.Thread(target=publish)
        thread.start()
        came = [messages.receive() for _ in range(100)]
        thread.join()
        assert [message.batch for message in came] == list(range(100))
        assert messages.missed == 0


def test_nobody_registered_holds_nothing_back():
    with publishing() as publisher:
        done = threading.Event()
        for number in range(50):
            publisher.publish(batch(number))
        publisher.publish(on_sent=done.set)
        assert done.wait(TIMEOUT_S)


def test_a_receiver_that_lags_holds_back_and_is_dropped_in_the_end():
    with publishing(max_lag_s=1.0) as publisher, receiver(publisher, credit=3) as messages:
        sent = []
        for number in range(20):
            publisher.publish(
                batch(number), on_sent=lambda: sent.append("receiver_dropped" in codes(publisher))
            )
        until(lambda: len(sent) == 20)
        # The fourth message found no credit; what came after it waited until the drop.
        assert sent == [False] * 4 + [True] * 16
        assert [messages.receive().batch for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionRefused, match="took nothing"):
            messages.receive()


def test_a_receiver_that_takes_its_time_is_waited_for():
    with publishing(max_lag_s=30.0) as publisher, receiver(publisher, credit=1) as messages:

        def publish():
            for number in range(8):
                publisher.publish(batch(number))

        thread = threading.Thread(target=publish)
        thread.start()
        came = []
        for _ in range(8):
            time.sleep(0.05)
            came.append(messages.receive().batch)
        thread.join()
        assert came == list(range(8))
        assert "receiver_dropped" not in codes(publisher)


def test_with_drop_a_receiver_without_credit_is_dropped_at_once():
    dropping = publishing(on_lag="drop", max_lag_s=1000)
    with dropping as publisher, receiver(publisher, credit=3) as messages:
        done = threading.Event()
        for number in range(20):
            publisher.publish(batch(number))
        publisher.publish(on_sent=done.set)
        assert done.wait(TIMEOUT_S)
        assert [messages.receive().batch for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionRefused, match="did not keep up"):
            messages.receive()


def test_a_receiver_that_died_is_noticed_by_its_silence():
    register = encode(Register(name="zombie", topics=("corrected",), credit=1))
    with publishing(heartbeat_s=0.8, max_lag_s=1000) as publisher:
        with RawReceiver(publisher, *register) as zombie:
            assert zombie.receive().type == "registered"
            assert zombie.receive_until("heartbeat")
            done = threading.Event()
            for number in range(10):
                publisher.publish(batch(number))
            publisher.publish(on_sent=done.set)
            assert done.wait(TIMEOUT_S)
            assert publisher.receivers == ()
            assert "silent" in zombie.receive_until("goodbye").reason
        assert "receiver_dropped" in codes(publisher)


def test_a_receiver_that_registers_without_a_name_is_called_unnamed():
    packed = msgpack.unpackb(encode(Register(name="x", topics=("corrected",), credit=1))[1])
    register = b"register", msgpack.packb(packed | {"name": ""})
    with publishing() as publisher, RawReceiver(publisher, *register) as nameless:
        assert nameless.receive().type == "registered"
        until(lambda: publisher.receivers == ("unnamed",))
        until(
            lambda: (
                "Receiver 'unnamed' registered."
                in [event.message for event in publisher.recent_events]
            )
        )
        publisher.publish(batch(0), batch(1))
        until(lambda: publisher.behind_s.get("unnamed", 0) > 0)


def test_a_machine_that_stood_still_is_no_silence_of_the_receivers(monkeypatch):
    with publishing() as publisher, receiver(publisher) as messages:
        until(lambda: publisher.receivers == ("tester",))
        now = time.monotonic
        later = SimpleNamespace(monotonic=lambda: now() + 10 * TIMEOUT_S, time=time.time)
        monkeypatch.setattr("prenet4d_server.publishing.lossless.time", later)
        looked = threading.Event()
        publisher.publish(on_sent=looked.set)
        assert looked.wait(TIMEOUT_S)
        publisher.publish(batch(0))
        assert messages.receive().batch == 0
        assert "receiver_dropped" not in codes(publisher)


def test_a_receiver_that_leaves_is_let_go():
    with publishing() as publisher:
        with receiver(publisher):
            until(lambda: publisher.receivers == ("tester",))
        until(lambda: publisher.receivers == ())
        assert "receiver_left" in codes(publisher)


def test_one_who_leaves_in_the_middle_is_no_cause_for_alarm():
    """Messages may find it gone before its goodbye, which came before, has been heard."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    receivers = Receivers(router, LosslessSettings(), lambda header: header)
    router.bind(FREE)
    dealer = zmq.Context()
    leaving = dealer.socket(zmq.DEALER)
    leaving.connect(router.getsockopt_string(zmq.LAST_ENDPOINT))
    leaving.send_multipart(encode(Register(name="tester", topics=("corrected",), credit=1 << 20)))
    try:
        assert router.poll(TIMEOUT_S * 1000)
        receivers.listen()
        leaving.send_multipart(encode(Goodbye()))
        leaving.close(int(TIMEOUT_S * 1000))
        dealer.term()
        header, arrays = batch(0)
        parts = encode(header, arrays)
        until(lambda: receivers.offer(header, parts) or not receivers.names)
        receivers.listen()
        assert [event.code for event in receivers.tick()] == [
            "receiver_registered",
            "receiver_left",
        ]
    finally:
        router.close(0)
        context.term()


def test_how_far_behind_a_receiver_is_does_not_change_when_the_clock_is_set(monkeypatch):
    topics = ("acquisition_start", "corrected")
    with publishing() as publisher, receiver(publisher, topics, credit=1):
        publisher.publish((START, {}), batch(0), batch(1))
        until(lambda: publisher.behind_s.get("tester"))
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 1e6)
        before = publisher.behind_s["tester"]
        until(lambda: publisher.behind_s["tester"] != before)
        assert publisher.behind_s["tester"] < 1e5


def test_one_who_disappears_without_a_word_is_told():
    with publishing() as publisher:
        hello = Register(name="lost", topics=("corrected",), credit=1 << 20)
        with RawReceiver(publisher, *encode(hello)) as lost:
            lost.receive_until("registered")

        def dropped():
            publisher.publish(batch(0))
            return "receiver_dropped" in codes(publisher)

        until(dropped)
        assert "receiver_left" not in codes(publisher)


def test_a_late_receiver_is_told_of_the_running_acquisition_first():
    topics = ("acquisition_start", "corrected", "acquisition_end")
    with publishing() as publisher:
        sent = threading.Event()
        publisher.publish((START, {"pixel_mask": np.eye(8, dtype=bool)}))
        publisher.publish(batch(0), on_sent=sent.set)
        assert sent.wait(TIMEOUT_S)
        with receiver(publisher, topics) as messages:
            publisher.publish(batch(1))
            start = messages.receive()
            assert start.acquisition_id == "scan"
            assert (start.pixel_mask == np.eye(8)).all()
            assert messages.receive().batch == 1
            publisher.publish((AcquisitionEnd(acquisition_id="scan"), {}))
            assert messages.receive().type == "acquisition_end"
        with receiver(publisher, topics) as messages:
            publisher.publish(batch(2))
            assert messages.receive().batch == 2


def test_nonsense_on_the_lossless_socket_is_told_and_harms_nobody():
    with publishing() as publisher, receiver(publisher) as messages:
        with RawReceiver(publisher, b"what", b"\xc1"):
            until(lambda: "bad_receiver_message" in codes(publisher))
        register = encode(Register(name="newer", topics=("event",), credit=1))
        newer = msgpack.packb(msgpack.unpackb(register[1]) | {"version": 2})
        with RawReceiver(publisher, register[0], newer) as refused:
            assert "version 2" in refused.receive_until("goodbye").reason
        unknown = encode(Register(name="dreamer", topics=("dreams",), credit=1))
        with RawReceiver(publisher, *unknown) as dreamer:
            assert "dreams" in dreamer.receive_until("goodbye").reason
        strange = encode(Register(name="echo", topics=("event",), credit=1))
        with RawReceiver(publisher, *strange) as echo:
            assert echo.receive().type == "registered"
            echo.socket.send_multipart(encode(Event(level="info", code="x", message="y")))
            assert "'event'" in echo.receive_until("goodbye").reason
        publisher.publish(batch(7))
        assert messages.receive().batch == 7


def test_receivers_are_told_goodbye_after_their_last_message():
    with publishing() as publisher:
        messages = receiver(publisher, credit=1)
        for number in range(3):
            publisher.publish(batch(number))
        closing = threading.Thread(target=publisher.close, args=(TIMEOUT_S,))
        closing.start()
        assert [messages.receive().batch for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ConnectionRefused, match="stopped"):
            messages.receive()
        closing.join()
        messages.close()


@pytest.mark.parametrize(("credit", "overtaken"), [(10, []), (1, [2])])
def test_an_announced_event_overtakes_what_a_receiver_holds_back_and_nothing_else(
    credit, overtaken
):
    topics = ("corrected", "event")
    with (
        publishing() as publisher,
        receiver(publisher, credit=credit) as slow,
        Subscriber(publisher.stream_address, topics, timeout=TIMEOUT_S, queue=100) as stream,
    ):
        until(lambda: publisher.receivers and publisher.wants("event"))
        all_handed_over = threading.Event()
        publisher.publish(batch(0), on_sent=lambda: all_handed_over.wait(TIMEOUT_S))
        publisher.publish(batch(1))
        publisher.publish(batch(2))
        publisher.announce(Event(level="info", code="now", message="Now."))
        all_handed_over.set()
        before = []
        while (message := stream.receive()).type != "event" or message.code != "now":
            before += [message.batch] if message.type == "corrected" else []
        assert before == [number for number in range(3) if number not in overtaken]
        assert [slow.receive().batch for _ in range(3)] == [0, 1, 2]


def test_what_was_announced_before_the_end_is_still_told():
    with publishing() as publisher:
        closing = threading.Thread(target=publisher.close, args=(TIMEOUT_S,))

        def announce():  # on the publisher's thread, which is closed before it can look
            publisher.announce(Event(level="info", code="last", message="It is over."))
            closing.start()
            until(lambda: publisher._closing_at is not None)

        publisher.publish(on_sent=announce)
        until(lambda: not publisher.alive)
        closing.join()
        assert codes(publisher) == ["last"]


def test_the_mean_goes_to_who_asked_for_it():
    mean = np.full((4, 6), np.nan, np.float32)
    with (
        publishing() as publisher,
        Subscriber(publisher.stream_address, "mean", timeout=TIMEOUT_S) as stream,
    ):
        until(lambda: publisher.wants("mean"))
        publisher.publish((Mean(patterns=3, ellipticity={}), {"mean": mean}))
        message = stream.receive()
        assert message.patterns == 3
        assert np.isnan(message.mean).all()


@pytest.mark.parametrize("which", ["stream", "lossless"])
def test_a_port_in_use_is_named(which):
    with publishing() as publisher:
        taken = getattr(publisher, f"{which}_address")
        addresses = {"stream": FREE, "lossless": FREE, which: taken}
        with zmq.Context() as context, pytest.raises(BindError) as caught:
            Publisher(
                StreamSettings(address=addresses["stream"]),
                LosslessSettings(address=addresses["lossless"]),
                context=context,
            )
        assert taken in str(caught.value)
        assert f"{which}.address" in str(caught.value)
        assert "another program uses the port" in str(caught.value)
