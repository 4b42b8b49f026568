"""The control socket: commands are carried out or refused with a sentence."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import zmq

from prenet4d_client import ControlClient
from prenet4d_client.errors import CommandRefused
from prenet4d_client.messages import ControlRequest, Heartbeat
from prenet4d_client.wire import decode, encode
from prenet4d_server.control.socket import Control, Later
from prenet4d_server.errors import CommandFailed
from prenet4d_server.service import Service

from ..live import FREE, TIMEOUT_S, frames, listening, sender, settings, until


@pytest.fixture(scope="module")
def service():
    with Service(settings()) as running:
        yield running


@pytest.fixture
def client(service):
    with connected(service) as made:
        yield made


def connected(service):
    return ControlClient(service.endpoints["control"], timeout=TIMEOUT_S)


def exchange(service, parts):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(service.endpoints["control"])
        socket.send_multipart(parts)
        assert socket.poll(TIMEOUT_S * 1000)
        return decode(socket.recv_multipart()).header


def test_status_and_configuration_are_told(service, client):
    status = client.status()
    assert status["ready"]
    assert status["endpoints"] == service.endpoints
    assert client.config()["batch"]["size"] == service.settings.batch.size


def test_an_unknown_command_is_refused_with_those_there_are(service):
    reply = exchange(service, encode(ControlRequest(command="dance", sequence=3)))
    assert (reply.ok, reply.sequence) == (False, 3)
    assert "'dance'" in reply.error
    assert "freeze, unfreeze" in reply.error


@pytest.mark.parametrize("parts", [[b""], [b"control_request", b"\xc1"], encode(Heartbeat())])
def test_nonsense_is_answered_and_harms_nothing(service, client, parts):
    assert not exchange(service, parts).ok
    assert client.status()["healthy"]


def test_what_needs_an_acquisition_is_refused_before_the_first():
    with Service(settings()) as fresh, connected(fresh) as client:
        for command in (client.freeze, client.unfreeze, client.recalibrate):
            with pytest.raises(CommandRefused, match="No acquisition has begun"):
                command()
        assert client.snapshot().arrays == {}


def test_a_calibration_can_be_loaded_before_the_first_acquisition_and_a_bad_one_is_refused():
    calibration = {
        "ratio": 1.05, "theta": 0.3, "frame_shape": [16, 24], "reference_center": [7.5, 11.5],
    }  # fmt: skip
    with Service(settings()) as fresh, connected(fresh) as client:
        client.load_calibration(calibration)
        said = " ".join(fresh.status().recent_events)
        assert "loaded: ratio 1.0500, long axis at 17.2°" in said
        assert client.save_calibration()["ratio"] == 1.05
        with pytest.raises(CommandRefused, match="ratio"):
            client.load_calibration(calibration | {"ratio": 0.5})
        assert client.save_calibration()["ratio"] == 1.05


def test_commands_are_carried_out_between_batches(service, client):
    with listening(service) as listener, sender(service) as source:
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(20, 20))
        source.send(frames(10))
        listener.wait_for("telemetry")
        for command in (client.freeze, client.unfreeze, client.recalibrate):
            command()
        listener.wait_for_event("recalibrating")
        assert client.snapshot().header.result["acquisition"]["scan_shape"] == [20, 20]
        until(lambda: client.status()["counters"]["in_flight"] == 0)
        source.send(frames(10), np.arange(10, 20))
        listener.wait_for("telemetry", 2)
        source.end()
        listener.wait_for("acquisition_end")


def test_a_fault_in_one_command_is_told_and_the_others_go_on(caplog):
    def broken(_=None):
        raise ValueError("a fault in the program")

    done: Future[None] = Future()
    done.set_result(None)
    commands = {
        "freeze": broken,
        "unfreeze": lambda _: Later(done, broken),
        "status": lambda _: ({"what": "goes on"}, {}),
    }
    with zmq.Context() as context:
        control = Control(FREE, publisher="life", context=context)
        control.start(commands)
        with ControlClient(control.address, timeout=TIMEOUT_S) as client:
            for command in (client.freeze, client.unfreeze):
                with pytest.raises(CommandRefused, match="its log says why"):
                    command()
            assert client.status() == {"what": "goes on"}
        control.close()
    assert caplog.text.count("ValueError: a fault in the program") == 2


def test_others_are_answered_while_a_command_takes_its_time():
    begun: Future[None] = Future()
    failing: Future[None] = Future()
    never: Future[None] = Future()
    commands = {
        "slow": lambda _: Later(begun, lambda: ({"what": "slow"}, {})),
        "failing": lambda _: Later(failing, lambda: ({}, {})),
        "never": lambda _: Later(never, lambda: ({}, {})),
        "status": lambda _: ({"what": "quick"}, {}),
    }
    with zmq.Context() as context:
        control = Control(FREE, publisher="life", context=context)
        control.start(commands)
        asking = ControlClient(control.address, timeout=TIMEOUT_S)
        with context.socket(zmq.DEALER) as patient, asking as client:
            patient.linger = 0
            patient.connect(control.address)
            for number, command in enumerate(("slow", "failing", "never")):
                request = ControlRequest(command=command, sequence=number)
                patient.send_multipart(encode(request))
            assert client.status() == {"what": "quick"}
            failing.set_exception(CommandFailed("It did not start."))
            begun.set_result(None)
            replies = {}
            while len(replies) < 2:
                assert patient.poll(TIMEOUT_S * 1000)
                reply = decode(patient.recv_multipart()).header
                replies[reply.sequence] = reply
            assert (replies[0].ok, replies[0].result) == (True, {"what": "slow"})
            assert (replies[1].ok, replies[1].error) == (False, "It did not start.")
        control.close()
        never.set_result(None)  # nobody is there any more


def test_what_has_not_begun_in_time_is_given_up_and_what_has_is_answered_in_the_end():
    waiting: Future[None] = Future()
    running: Future[None] = Future()
    running.set_running_or_notify_cancel()
    commands = {
        "waiting": lambda _: Later(waiting, lambda: ({}, {}), 0.01),
        "running": lambda _: Later(running, lambda: ({"what": "done"}, {}), 0.01),
    }
    with zmq.Context() as context:
        control = Control(FREE, publisher="life", context=context)
        control.start(commands)
        with context.socket(zmq.DEALER) as asking:
            asking.linger = 0
            asking.connect(control.address)
            for number, command in enumerate(commands):
                asking.send_multipart(encode(ControlRequest(command=command, sequence=number)))
            assert asking.poll(TIMEOUT_S * 1000)
            given_up = decode(asking.recv_multipart()).header
            assert (given_up.sequence, given_up.ok) == (0, False)
            assert "The pipeline is busy" in given_up.error
            assert waiting.cancelled()
            running.set_result(None)
            assert asking.poll(TIMEOUT_S * 1000)
            done = decode(asking.recv_multipart()).header
            assert (done.sequence, done.result) == (1, {"what": "done"})
        control.close()


def test_a_batch_that_takes_long_keeps_nobody_from_looking(service, client):
    over = threading.Event()
    with sender(service) as source, ThreadPoolExecutor() as pool:
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 5))
        source.send(frames(10))
        until(lambda: (now := service.status().acquisition) and now.counters.corrected == 10)
        held = service._pipeline.call(over.wait)  # as in a batch
        until(held.running)
        with connected(service) as operator:
            freezing = pool.submit(operator.freeze)
            try:
                assert client.status()["healthy"]
                header, values = client.maps()
                assert header.frames == 10
                assert np.isfinite(values).any()
                assert not freezing.done()
            finally:
                over.set()
            freezing.result(TIMEOUT_S)
        source.end()
