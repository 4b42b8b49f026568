"""Real ZeroMQ sockets on endpoints of their own, closed after each test."""

import pytest
import zmq


class Bound:
    """A bound socket that plays the service's part."""

    def __init__(self, context, kind, endpoint="tcp://127.0.0.1:*", **options):
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self.socket.rcvtimeo = self.socket.sndtimeo = 10_000
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.bind(endpoint)
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
def nobody(context):
    """An address where nobody listens."""
    socket = Bound(context, zmq.PULL)
    socket.close()
    return socket.address
