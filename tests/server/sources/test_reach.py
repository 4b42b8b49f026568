"""A detector that is not where it was said to be: ZeroMQ would wait for it in silence."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
import zmq

from prenet4d_server.errors import NotReached
from prenet4d_server.sources.base import Fault
from prenet4d_server.sources.dectris_v1 import DectrisV1Source
from prenet4d_server.sources.reach import Reach
from prenet4d_server.sources.zmq_source import connect

from .detector import WAIT_S, of, poll_until, push_socket


@pytest.fixture
def pull():
    with zmq.Context() as context, context.socket(zmq.PULL) as made:
        made.linger = 0
        yield made


def test_a_detector_that_does_not_answer_is_told_once_and_waited_for():
    with socket.socket() as ours:  # a port that is taken, and refuses connections
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", 0))
        attach_late(f"tcp://127.0.0.1:{ours.getsockname()[1]}")


def attach_late(address):
    with DectrisV1Source(address) as source:
        (fault,) = poll_until(source, lambda events: len(events) == 1)
        assert isinstance(fault, Fault)
        assert isinstance(fault.error, NotReached)
        assert fault.frames == 0
        assert f"Nothing answers at {address}: is the detector on" in str(fault.error)
        assert not source.poll(0.1)
        with zmq.Context() as context, context.socket(zmq.PUSH) as late:
            late.linger = 0
            late.bind(address)
            late.send(b"not a header")
            assert of(Fault, poll_until(source, bool))


def test_a_host_that_nobody_knows_is_named(pull):
    address = "tcp://detector.invalid:31001"
    reach = Reach(pull, address, patience_s=0)
    connect(pull, address)
    assert "knows no host 'detector.invalid'" in str(reach.trouble())
    assert reach.trouble() is None


def test_another_program_on_that_port_is_no_detector(pull):
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        reach = Reach(pull, address, patience_s=0)
        connect(pull, address)
        with closing(other.accept()[0]):
            assert "Nothing answers" in str(reach.trouble())


def test_of_a_detector_that_was_reached_nothing_is_said(pull):
    with push_socket() as detector:
        reach = Reach(pull, detector.address, patience_s=0)
        connect(pull, detector.address)
        detector.send(b"here")
        assert pull.poll(WAIT_S * 1000)
        assert reach.trouble() is None
