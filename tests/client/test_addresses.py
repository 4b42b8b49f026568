"""What is no address is told, with the port that was meant."""

from functools import partial

import pytest

from prenet4d_client import ControlClient, FrameSender, InvalidUse, LosslessReceiver, Subscriber


@pytest.mark.parametrize(
    ("client", "port"),
    [
        (FrameSender, 5560),
        (Subscriber, 5561),
        (partial(LosslessReceiver, name="x"), 5562),
        (ControlClient, 5563),
    ],
)
@pytest.mark.parametrize("address", ["telemetry", "127.0.0.1", "tcp://127.0.0.1", 5560])
def test_an_example_shows_the_port_that_is_usual_there(client, port, address):
    with pytest.raises(InvalidUse, match=f"write for example tcp://127.0.0.1:{port}"):
        client(address)
