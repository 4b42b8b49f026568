"""``LosslessReceiver`` against a real ROUTER socket that plays the service."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import zmq

from prenet4d_client import (
    ConnectionRefused,
    InvalidUse,
    LosslessReceiver,
    MalformedMessage,
    NoAnswer,
    ProtocolError,
    decode,
    encode,
)
from prenet4d_client.messages import Goodbye, Heartbeat, Registered

from .conftest import PATIENCE_S
from .examples import EXAMPLES


class Router:
    """Plays the service, step by step; every step waits for what the receiver says."""

    def __init__(self, bind):
        self.bound = bind(zmq.ROUTER)
        self.address = self.bound.address
        self.identity = b""
        self.credit = 0
        self.sent = 0

    def hear(self, *kinds):
        """The next message that is none of the heartbeats nobody asked for."""
        while True:
            self.identity, *parts = self.bound.socket.recv_multipart()
            message = decode(parts)
            if message.type == "heartbeat" and "heartbeat" not in kinds:
                continue
            assert message.type in kinds, message
            if message.type in ("register", "credit"):
                self.credit += message.credit
            return message

    def say(self, header, arrays=None):
        self.bound.socket.send_multipart([self.identity, *encode(header, arrays)])

    def send(self, kind="event", **changes):
        assert self.credit > 0
        self.credit -= 1
        header, arrays = EXAMPLES[kind]
        update = {"publisher": "p1", "sequence": self.sent} | changes
        self.say(header.model_copy(update=update), arrays)
        self.sent += 1


@pytest.fixture
def router(bind):
    return Router(bind)


@pytest.fixture
def registered(router):
    """Makes a receiver and lets it in."""
    made = []

    def make(heartbeat_s=PATIENCE_S, **options):
        def let_in():
            router.registration = router.hear("register")
            router.say(Registered(heartbeat_s=heartbeat_s))

        helper = threading.Thread(target=let_in)
        helper.start()
        options = {"name": "recorder", "timeout": PATIENCE_S} | options
        made.append(LosslessReceiver(router.address, **options))
        helper.join()
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


def test_every_message_comes_in_order(router, registered):
    receiver = registered(credit=4)
    assert router.registration.name == "recorder"
    assert router.registration.credit == 4
    assert set(router.registration.topics) == {
        "telemetry", "corrected", "event", "acquisition_start", "acquisition_end",
    }  # fmt: skip
    got = []
    for k in range(50):
        while not router.credit:
            router.hear("credit")
        router.send("corrected" if k % 2 else "event", sequence=k // 2)
        got.append(next(receiver))
    assert [m.type for m in got] == ["event", "corrected"] * 25
    assert [m.sequence for m in got] == [k // 2 for k in range(50)]
    np.testing.assert_array_equal(got[1].patterns, EXAMPLES["corrected"][1]["patterns"])
    assert receiver.missed == 0


@pytest.mark.parametrize("name", ["", " "])
def test_a_receiver_without_a_name_is_called_unnamed(router, registered, name):
    receiver = registered(name=name)
    assert (receiver.name, router.registration.name) == ("unnamed", "unnamed")
    router.say(Goodbye(reason="it may not"))
    with pytest.raises(ConnectionRefused, match="lets 'unnamed' go: it may not"):
        receiver.receive()


@pytest.mark.parametrize("credit", [1, 2, 5, 64])
def test_credit_outstanding_never_exceeds_what_was_granted(router, registered, credit):
    receiver = registered(credit=credit)
    read = 0
    for _ in range(5):
        while router.credit:
            router.send()
        # All credit is used up, so that what is granted from here on is for what was read.
        while read < router.sent:
            next(receiver)
            read += 1
        while router.credit < (credit + 1) // 2:
            router.hear("credit")
        assert router.credit <= credit
    assert router.sent >= 3 * credit


def test_no_credit_is_granted_while_nothing_is_consumed(router, registered):
    receiver = registered(credit=3, heartbeat_s=4.0)
    for _ in range(3):
        router.send()
    for _ in range(2):
        assert router.hear("heartbeat", "credit").type == "heartbeat"
        router.say(Heartbeat())
    assert router.credit == 0
    next(receiver), next(receiver)
    assert router.hear("credit").credit == 2


def test_hearts_beat_while_the_user_is_busy(router, registered):
    receiver = registered(heartbeat_s=3.0)
    router.send()
    for message in receiver:
        assert message.type == "event"
        for _ in range(5):  # longer than the service would wait; nothing is read meanwhile
            router.hear("heartbeat")
            router.say(Heartbeat())
        break
    router.send()
    assert next(receiver).sequence == 1


def test_heartbeats_of_the_service_keep_a_quiet_receiver_waiting(router, registered):
    receiver = registered(heartbeat_s=3.0, timeout=3.5)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            router.say(Heartbeat())

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(NoAnswer, match="the service is there, but seems to get no frames"):
        next(receiver)
    stop.set()
    heart.join()
    router.send()
    assert next(receiver).sequence == 0


def test_a_silent_service_is_taken_to_be_gone_after_what_it_sent_was_read(router, registered):
    receiver = registered(heartbeat_s=1.0, timeout=None)
    router.send()
    time.sleep(1.2)
    assert next(receiver).type == "event"
    with pytest.raises(ConnectionRefused, match=r"has been silent for .* taken to be gone"):
        next(receiver)
    with pytest.raises(ConnectionRefused):
        next(receiver)


def test_a_machine_that_stood_still_is_no_silence_of_the_service(router, registered, monkeypatch):
    receiver = registered(heartbeat_s=4.0, timeout=None)
    now = time.monotonic
    later = SimpleNamespace(monotonic=lambda: now() + 100)
    monkeypatch.setattr("prenet4d_client.lossless.time", later)
    router.hear("heartbeat")
    router.send()
    assert next(receiver).type == "event"


def test_a_receiver_that_is_dropped_is_told_why(router, registered):
    receiver = registered()
    router.send()
    router.say(Goodbye(reason="It lagged by more than 10 s."))
    assert next(receiver).type == "event"
    with pytest.raises(ConnectionRefused, match=r"go: It lagged by more than 10 s\.$"):
        next(receiver)


def test_a_receiver_that_is_refused_is_told_why(router):
    def refuse():
        router.hear("register")
        router.say(Goodbye(reason="The name is taken."))

    helper = threading.Thread(target=refuse)
    helper.start()
    with pytest.raises(ConnectionRefused, match="The name is taken"):
        LosslessReceiver(router.address, name="recorder", timeout=PATIENCE_S)
    helper.join()


def test_no_service(nobody):
    with pytest.raises(NoAnswer, match=r"No service answered at .* is it running"):
        LosslessReceiver(nobody, name="recorder", timeout=0.1)


def test_closing_says_goodbye(router, registered):
    receiver = registered()
    receiver.close()
    router.hear("goodbye")
    receiver.close()
    with pytest.raises(InvalidUse, match="is closed"):
        next(receiver)


def test_closing_from_elsewhere_ends_the_waiting(router, registered):
    receiver = registered(timeout=None)
    timer = threading.Timer(0.1, receiver.close)
    timer.start()
    with pytest.raises(InvalidUse, match="is closed"):
        next(receiver)
    timer.join()


def test_a_bad_message_is_raised_and_the_next_ones_still_come(router, registered):
    receiver = registered()
    router.bound.socket.send_multipart([router.identity, b"event", b"\xc1"])
    router.send()
    with pytest.raises(MalformedMessage):
        next(receiver)
    assert next(receiver).type == "event"


def test_a_gap_is_told(router, registered):
    receiver = registered()
    router.send(sequence=4)
    router.send(sequence=7)
    assert [next(receiver).gap for _ in range(2)] == [0, 2]
    assert receiver.missed == 2


def test_a_service_that_oversteps_its_credit_is_found_out(router, registered):
    receiver = registered(credit=2)
    router.credit = 3
    for _ in range(3):
        router.send()
    for thread in threading.enumerate():  # nothing is read, and so granted, before it is noticed
        if thread.name == "lossless recorder":
            thread.join(PATIENCE_S)
    assert [next(receiver).sequence for _ in range(2)] == [0, 1]
    with pytest.raises(ProtocolError, match="more messages than it had credit for"):
        next(receiver)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"credit": 0}, "credit is 0; it must be a whole number"),
        ({"credit": 1.5}, "credit is 1.5; it must be a whole number"),
        ({"credit": 1 << 80}, f"credit is {1 << 80}; it must be a whole number"),
        ({"credit": "7"}, "credit is '7'; it must be a whole number"),
        ({"name": None}, "cannot be: name: "),
        ({"topics": "frames"}, "no topic 'frames'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(nobody, options, what):
    with pytest.raises(InvalidUse, match=what):
        LosslessReceiver(nobody, **({"name": "recorder"} | options))


def test_it_can_be_asked_without_waiting(router, registered):
    receiver = registered(timeout=0)
    with pytest.raises(NoAnswer, match="within 0 s"):
        next(receiver)
    router.send("corrected")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            message = next(receiver)
            break
        except NoAnswer:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert message.type == "corrected"
