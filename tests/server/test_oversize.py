"""What is too large to be passed on is left out and told; the service and the next scan go on."""

from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import zmq

from prenet4d_client import CommandRefused, ControlClient, LosslessReceiver
from prenet4d_client.messages import AcquisitionEnd, AcquisitionStart, Frames
from prenet4d_client.wire import MAX_HEADER_BYTES, MAX_METADATA_BYTES, encode
from prenet4d_server.files import open_scan
from prenet4d_server.service import Service

from .live import TIMEOUT_S, frames, listening, sender, settings, until

LONG = "x" * (MAX_HEADER_BYTES - 2000)


@pytest.fixture(scope="module")
def service():
    with Service(settings()) as running:
        yield running


@pytest.fixture
def listener(service):
    with listening(service) as made:
        yield made


@pytest.fixture
def client(service):
    with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as made:
        yield made


@contextmanager
def raw_sender(service):
    """A socket that says anything to the service's native source."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = int(1000 * TIMEOUT_S)
        socket.connect(service.endpoints["ingest"])
        yield lambda *message: socket.send_multipart(encode(*message))


def a_scan_comes_through(service, listener, **said):
    with sender(service) as source:
        name = source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3), **said)
        source.send(frames(6))
    until(lambda: name in [end.acquisition_id for end in listener.of("acquisition_end")])
    assert listener.of("acquisition_end")[-1].counters.corrected == 6
    return listener.of("acquisition_start")[-1]


def test_metadata_as_large_as_may_be_come_through(service, listener, client):
    said = {"log": "x" * (MAX_METADATA_BYTES - 10)}
    start = a_scan_comes_through(service, listener, metadata=said)
    assert start.metadata.items() >= said.items()
    assert client.status()["state"]


def test_of_a_long_text_in_a_file_the_beginning_comes_through(service, listener, tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["frames"] = frames(6)
        file["frames"].attrs["notes"] = "x" * (MAX_METADATA_BYTES + 1)
    with open_scan(tmp_path / "scan.h5") as scan:
        start = a_scan_comes_through(service, listener, metadata=scan.metadata)
    assert start.metadata["notes"] == "x" * 10_000


def test_larger_metadata_are_left_out_and_told(service, listener, client):
    start = AcquisitionStart(
        acquisition_id="much", frame_shape=(16, 24), dtype="uint16", metadata={"log": LONG}
    )
    with raw_sender(service) as send:
        send(start)
        told = listener.wait_for_event("bad_message")
        with LosslessReceiver(
            service.endpoints["lossless"], name="late", timeout=TIMEOUT_S
        ) as late:
            begun = late.receive()
        assert client.status()["acquisition"]["metadata"] == {}
        send(AcquisitionEnd(acquisition_id="much"))
    assert "The metadata of series much are left out. These metadata take" in told.message
    assert (begun.type, begun.metadata) == ("acquisition_start", {"series": "much"})
    a_scan_comes_through(service, listener)


def test_an_acquisition_of_too_long_a_name_is_refused_and_its_frames_are_counted(
    service, listener, client
):
    before = client.status()["counters"]["rejected"]
    arrays = {"indices": np.arange(3), "frames": frames(3)}
    start = AcquisitionStart(acquisition_id=LONG, frame_shape=(16, 24), dtype="uint16")
    with raw_sender(service) as send:
        send(start)
        send(Frames(acquisition_id=LONG), arrays)
        send(AcquisitionEnd(acquisition_id=LONG))
    a_scan_comes_through(service, listener)
    assert listener.wait_for_event("corrupt").message.startswith("An acquisition's id has 1046576")
    assert client.status()["counters"]["rejected"] == before + 3


def test_a_reason_that_is_too_large_is_cut(service, listener):
    start = AcquisitionStart(acquisition_id="cut", frame_shape=(16, 24), dtype="uint16")
    end = AcquisitionEnd(acquisition_id="cut", aborted=True, reason=LONG)
    with raw_sender(service) as send:
        send(start)
        send(end)
    assert listener.wait_for("acquisition_end").reason == LONG[:1000]


def test_an_answer_that_is_too_large_is_refused(client):
    with pytest.raises(CommandRefused, match="The answer cannot be sent: The header of this"):
        client._ask("x" * (MAX_HEADER_BYTES - 200))
    assert client.status()["ready"]
