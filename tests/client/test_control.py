"""``ControlClient`` against a real ROUTER socket that answers in a thread."""

import threading

import numpy as np
import pytest
import zmq

from prenet4d_client import (
    CommandRefused,
    ControlClient,
    InvalidUse,
    NoAnswer,
    ProtocolError,
    decode,
    encode,
)
from prenet4d_client.messages import ControlReply, Heartbeat

from .conftest import PATIENCE_S
from .examples import EXAMPLES


class Service:
    """Answers each request with what ``script`` makes of it, until it is closed."""

    def __init__(self, bind, script):
        self.bound = bind(zmq.ROUTER)
        self.address = self.bound.address
        self.script = script
        self.requests = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        while not self.stopping.is_set():
            if self.bound.socket.poll(20):
                identity, *parts = self.bound.socket.recv_multipart()
                request = decode(parts)
                self.requests.append((request.command, request.arguments))
                for answer in self.script(request):
                    self.bound.socket.send_multipart([identity, *answer])

    def close(self):
        self.stopping.set()
        self.thread.join()


@pytest.fixture
def serve(bind):
    services = []

    def start(script):
        services.append(Service(bind, script))
        return services[-1]

    yield start
    for service in services:
        service.close()


def reply(request, *, ok=True, arrays=None, **fields):
    return encode(ControlReply(sequence=request.sequence, ok=ok, **fields), arrays)


def test_every_command_reaches_the_service_and_its_result_the_caller(serve):
    calibration = {"version": 1, "ratio": 1.03, "theta": 0.5}
    results = {
        "status": {"state": "locked"},
        "config": {"batch": 64},
        "save_calibration": calibration,
    }
    service = serve(lambda r: [reply(r, result=results.get(r.command, {}))])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        assert control.status() == {"state": "locked"}
        assert control.config() == {"batch": 64}
        assert control.save_calibration() == calibration
        for command in (control.freeze, control.unfreeze, control.recalibrate):
            assert command() is None
        assert control.load_calibration(calibration) is None
        assert control.set_reference_center(31.5, 30) is None
        assert control.clear_reference_center() is None
        assert control.set_detectors(8, annular_inner=10, annular_outer=25.5) is None
        assert control.clear_detectors() is None
    assert service.requests == [
        ("status", {}),
        ("config", {}),
        ("save_calibration", {}),
        ("freeze", {}),
        ("unfreeze", {}),
        ("recalibrate", {}),
        ("load_calibration", {"calibration": calibration}),
        ("set_reference_center", {"center": [31.5, 30]}),
        ("clear_reference_center", {}),
        (
            "set_detectors",
            {"bright_field_radius": 8, "annular_inner": 10, "annular_outer": 25.5},
        ),
        ("clear_detectors", {}),
    ]


def whole_maps(**changes):
    header, _ = EXAMPLES["maps"]
    return header.model_copy(update={"region": (0, 0, 4, 6)} | changes)


def test_the_whole_maps_come_with_their_description(serve):
    values = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    service = serve(
        lambda r: [reply(r, arrays={"values": values}, result=whole_maps().model_dump())]
    )
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        header, got = control.maps()
        control.maps(newer_than=header)
    assert (header.names, header.scan_shape, header.sequence) == (
        ("bright_field", "com_y"),
        (4, 6),
        3,
    )
    np.testing.assert_array_equal(got, values)
    assert service.requests == [
        ("maps", {"newer_than": None}),
        ("maps", {"newer_than": ["p1", 3]}),
    ]


def test_unchanged_maps_come_without_values(serve):
    service = serve(lambda r: [reply(r, result=whole_maps().model_dump())])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        assert control.maps(newer_than=whole_maps()) is None


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({}, "wrong scan_shape"),
        (whole_maps(region=(0, 0, 9, 9)).model_dump(), "outside of the scan"),
        (whole_maps(names=("a", "b", "c")).model_dump(), "3 maps of .* an array of"),
    ],
)
def test_maps_that_do_not_fit_their_description_are_refused(serve, result, why):
    values = np.zeros((2, 4, 6), np.float32)
    service = serve(lambda r: [reply(r, arrays={"values": values}, result=result)])
    with (
        ControlClient(service.address, timeout=PATIENCE_S) as control,
        pytest.raises(ProtocolError, match=why),
    ):
        control.maps()


def test_snapshot_brings_the_mean_pattern(serve):
    mean = np.arange(72, dtype=np.float32).reshape(8, 9)
    service = serve(lambda r: [reply(r, arrays={"mean": mean}, result={"patterns": 64})])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        snapshot = control.snapshot()
    assert snapshot.result == {"patterns": 64}
    np.testing.assert_array_equal(snapshot.mean, mean)


def test_snapshot_before_there_is_a_mean(serve):
    service = serve(lambda r: [reply(r)])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        assert "mean" not in control.snapshot().arrays


def test_a_refusal_is_raised_with_the_services_sentence(serve):
    service = serve(lambda r: [reply(r, ok=False, error="Nothing is calibrated yet.")])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        with pytest.raises(CommandRefused, match=r"^Nothing is calibrated yet\.$"):
            control.save_calibration()
        with pytest.raises(CommandRefused):
            control.freeze()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda service: service.set_reference_center("a", 2), "cy is 'a'; it must be a number"),
        (lambda service: service.set_reference_center(1, None), "cx is None; it must be a number"),
        (lambda service: service.set_detectors(3, [4], 5), r"annular_inner is \[4\]; it must be"),
    ],
)
def test_an_argument_that_is_no_number_is_refused(nobody, call, what):
    with ControlClient(nobody) as control, pytest.raises(InvalidUse, match=what):
        call(control)


def test_nobody_answers(nobody):
    with (
        ControlClient(nobody, timeout=0.1) as control,
        pytest.raises(NoAnswer, match=r"No service answered 'status'.*is it running"),
    ):
        control.status()


def test_after_a_timeout_the_client_goes_on_and_late_answers_find_nobody(serve):
    held = []

    def script(request):
        if request.command == "recalibrate":
            held.append(reply(request, result={"late": True}))
            return []
        return [*held, reply(request, result={"fresh": True})]

    service = serve(script)
    with ControlClient(service.address, timeout=1) as control:
        with pytest.raises(NoAnswer):
            control.recalibrate()
        control._timeout = PATIENCE_S
        assert control.status() == {"fresh": True}


@pytest.mark.parametrize(
    "answer", [[b"control_reply", b"\xc1"], encode(Heartbeat()), [b"x"]], ids=["bad", "other", "x"]
)
def test_an_answer_that_breaks_the_protocol_is_told_and_the_client_goes_on(serve, answer):
    answers = [answer]
    service = serve(lambda r: [answers.pop() if answers else reply(r)])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        with pytest.raises(ProtocolError):
            control.status()
        assert control.status() == {}


def test_an_argument_that_cannot_be_sent_is_refused(serve):
    service = serve(lambda r: [reply(r)])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        with pytest.raises(InvalidUse, match="cannot be sent"):
            control.load_calibration({"date": object()})
        assert control.status() == {}


def test_an_argument_that_is_too_large_is_refused(serve):
    service = serve(lambda r: [reply(r)])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        with pytest.raises(InvalidUse, match="header of this control_request message has"):
            control.load_calibration({"notes": "x" * (1 << 20)})
        assert control.status() == {}


@pytest.mark.parametrize("calibration", ["lens.toml", None, [("ratio", 1.03)]])
def test_a_calibration_that_is_no_map_is_refused(nobody, calibration):
    with (
        ControlClient(nobody) as control,
        pytest.raises(InvalidUse, match=r"is a map as save_calibration\(\) returns it, and no "),
    ):
        control.load_calibration(calibration)


def test_numbers_may_be_numpys_own(serve):
    service = serve(lambda r: [reply(r)])
    with ControlClient(service.address, timeout=PATIENCE_S) as control:
        control.set_reference_center(*np.array([31.5, 30], np.float32))
        control.set_detectors(*np.array([8, 10, 25]))
    assert service.requests == [
        ("set_reference_center", {"center": [31.5, 30]}),
        ("set_detectors", {"bright_field_radius": 8, "annular_inner": 10, "annular_outer": 25}),
    ]


def test_a_closed_client_says_so(nobody):
    control = ControlClient(nobody)
    control.close()
    control.close()
    with pytest.raises(InvalidUse, match="is closed"):
        control.status()
