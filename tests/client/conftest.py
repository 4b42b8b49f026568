"""Real ZeroMQ sockets on endpoints of their own, closed after each test."""

import socket
import time

import pytest
import zmq

PATIENCE_S = 60.0
"""For what comes at once, unless the machine stands still."""


class Bound:
    """A bound socket that plays the service's part."""

    def __init__(self, context, kind, endpoint="tcp://127.0.0.1:*", **options):
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self.socket.rcvtimeo = self.socket.sndtimeo = int(1000 * PATIENCE_S)
        for name, value in options.items():
            setattr(self.socket, name, value)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.socket.bind(endpoint)
                break
            except zmq.ZMQError as error:
                # A socket just closed gives its port back a little later.
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.address = self.socket.last_endpoint.decode()

    def close(self):
        self.socket.close()


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def bind(context):
    bound = []

    def bind(kind, *args, **options):
        bound.append(Bound(context, kind, *args, **options))
        return bound[-1]

    yield bind
    for each in bound:
        each.close()


@pytest.fixture
def nobody():
    """An address where nobody listens: the port is taken, and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"
