"""CURVE: every client reaches a service that has the key, and no other."""

import threading

import numpy as np
import pytest
import zmq

from prenet4d_client import (
    ControlClient,
    FrameSender,
    InvalidUse,
    LosslessReceiver,
    NoAnswer,
    Subscriber,
    _sockets,
    decode,
    encode,
)
from prenet4d_client.messages import ControlReply, Registered

from .conftest import PATIENCE_S
from .examples import EXAMPLES

pytestmark = pytest.mark.skipif(not zmq.has("curve"), reason="this pyzmq was built without CURVE")


@pytest.fixture
def keys():
    return zmq.curve_keypair()


@pytest.fixture
def server_key(keys):
    return keys[0]


@pytest.fixture
def secure(bind, keys):
    """Binds a socket that talks only to those who have its public key."""
    return lambda kind: bind(kind, curve_server=True, curve_secretkey=keys[1])


@pytest.mark.parametrize("as_text", [True, False])
def test_sender(secure, server_key, as_text):
    pull = secure(zmq.PULL)
    key = server_key.decode() if as_text else server_key
    with FrameSender(pull.address, timeout=PATIENCE_S, server_key=key) as sender:
        sender.start(frame_shape=(8, 8), dtype="uint8")
        sender.send(np.zeros((8, 8), np.uint8))
    kinds = [decode(pull.socket.recv_multipart()).type for _ in range(3)]
    assert kinds == ["acquisition_start", "frames", "acquisition_end"]


def test_subscriber(secure, server_key):
    publisher = secure(zmq.XPUB)
    with Subscriber(
        publisher.address, "event", timeout=PATIENCE_S, server_key=server_key
    ) as stream:
        assert publisher.socket.recv() == b"\x01event"
        publisher.socket.send_multipart(encode(*EXAMPLES["event"]))
        assert next(stream).code == "frame_rejected"


def test_control_and_lossless(secure, server_key):
    router = secure(zmq.ROUTER)

    def answer():
        for make in (lambda r: ControlReply(ok=True), lambda r: Registered(heartbeat_s=PATIENCE_S)):
            identity, *parts = router.socket.recv_multipart()
            router.socket.send_multipart([identity, *encode(make(decode(parts)))])

    service = threading.Thread(target=answer)
    service.start()
    with ControlClient(router.address, timeout=PATIENCE_S, server_key=server_key) as control:
        assert control.status() == {}
    with LosslessReceiver(router.address, name="r", timeout=PATIENCE_S, server_key=server_key):
        service.join()


@pytest.mark.parametrize("encrypted", [False, True])
def test_without_the_services_key_there_is_no_answer(secure, encrypted):
    key = zmq.curve_keypair()[0] if encrypted else None  # another service's
    pull = secure(zmq.PULL)
    with (
        FrameSender(pull.address, timeout=0.3, server_key=key) as sender,
        pytest.raises(NoAnswer),
    ):
        sender.start(frame_shape=(8, 8), dtype="uint8")
    assert not pull.socket.poll(0)


def test_a_client_with_a_key_does_not_talk_to_a_service_without(bind, server_key):
    pull = bind(zmq.PULL)
    with (
        FrameSender(pull.address, timeout=0.3, server_key=server_key) as sender,
        pytest.raises(NoAnswer),
    ):
        sender.start(frame_shape=(8, 8), dtype="uint8")


@pytest.mark.parametrize(
    "key",
    ["", "short", "x" * 39 + "ü", b"~" * 40, "0" * 45, "#" * 40, "\udcff", 5],
)
@pytest.mark.parametrize("client", [FrameSender, Subscriber, ControlClient])
def test_a_key_that_is_none_is_refused(nobody, client, key):
    open_before = len(_sockets._contexts)
    with pytest.raises(InvalidUse, match="40 characters in Z85"):
        client(nobody, server_key=key)
    assert len(_sockets._contexts) == open_before


@pytest.mark.parametrize("number", [0, 1, 3])
def test_keys_that_are_no_pair_are_refused(nobody, keys, server_key, number):
    with pytest.raises(InvalidUse, match="keys must be a pair"):
        ControlClient(nobody, server_key=server_key, keys=keys[:1] * number)


def test_keys_of_which_one_is_none_are_refused(nobody, keys, server_key):
    with pytest.raises(InvalidUse, match="40 characters in Z85"):
        ControlClient(nobody, server_key=server_key, keys=(keys[0], 5))
