"""The whole service over real sockets: bad input, overload, death and shutdown."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import zmq

from prenet4d_client import ControlClient, FrameSender, LosslessReceiver
from prenet4d_client.errors import ConnectionRefused, NoAnswer
from prenet4d_client.messages import AcquisitionEnd, AcquisitionStart, FrameFlag, Frames
from prenet4d_client.wire import encode
from prenet4d_engines.batch import FrameFlag as EngineFrameFlag
from prenet4d_server import restarts
from prenet4d_server.errors import BindError, FileError, IngestDied
from prenet4d_server.ingest.notices import Ended
from prenet4d_server.service import Service
from prenet4d_server.sockets import generate_keys, load_keys

from .live import (
    TIMEOUT_S,
    balanced,
    frames,
    listening,
    sender,
    settings,
    subscriber,
    until,
)
from .recording.test_recorder import patterns_of, whole_scan, write

SHAPE = (16, 24)
START = AcquisitionStart(
    acquisition_id="scan", frame_shape=SHAPE, dtype="uint16", scan_shape=(4, 5)
)
END = AcquisitionEnd(acquisition_id="scan")


def some(first, last, shape=SHAPE, dtype="uint16", **header):
    pixels = frames(last, shape, dtype)[first:]
    arrays = {"indices": np.arange(first, last, dtype=np.int64), "frames": pixels}
    return encode(Frames(**({"acquisition_id": "scan"} | header)), arrays)


@contextmanager
def raw_sender(service):
    """A socket that says anything to the service's native source."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 5000
        socket.connect(service.endpoints["ingest"])
        yield socket.send_multipart


def scan(service, listener, n=20, shape=SHAPE, dtype="uint16"):
    """Send a good scan and check that all of it comes out."""
    with sender(service) as source:
        name = source.start(frame_shape=shape, dtype=dtype, expected_frames=n)
        source.send(frames(n, shape, dtype))
        source.end()
    until(lambda: any(end.acquisition_id == name for end in listener.of("acquisition_end")))
    (end,) = (end for end in listener.of("acquisition_end") if end.acquisition_id == name)
    assert not end.aborted
    assert (end.counters.received, end.counters.corrected) == (n, n)
    indices = [
        int(i)
        for one in listener.of("telemetry")
        if one.acquisition_id == name
        for i in one.indices
    ]
    assert indices == list(range(n))


def settled(service):
    """The counters once nothing is in flight."""
    until(lambda: service.status().counters.in_flight == 0 and service.status().backlog == 0)
    counters = service.status().counters
    assert balanced(counters)
    return counters


@pytest.fixture(scope="module")
def service():
    with Service(settings()) as running:
        yield running


@pytest.fixture
def listener(service):
    with listening(service) as made:
        yield made


def test_flags_mean_the_same_on_the_wire_and_in_the_engines():
    wire = {flag.name: flag.value for flag in FrameFlag}
    assert wire == {flag.name: flag.value for flag in EngineFrameFlag}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("shape", [(16, 24), (33, 9)])
def test_every_frame_comes_out_once_with_its_own_pixels(service, shape, dtype):
    with subscriber(service, "aligned") as stream:
        with sender(service) as source:
            name = source.start(frame_shape=shape, dtype=dtype, scan_shape=(7, 11))
            pixels = frames(77, shape, dtype)
            for i in range(0, 77, 13):
                source.send(pixels[i : i + 13])
            source.end()
        seen = {}
        while len(seen) < 77:
            batch = stream.receive()
            assert batch.acquisition_id == name
            assert batch.scan_shape == (7, 11)
            for index, pattern in zip(batch.indices, batch.patterns, strict=True):
                assert int(index) not in seen
                seen[int(index)] = pattern
        assert stream.missed == 0
    for index, pattern in seen.items():
        assert (pattern == index).all()


@pytest.mark.parametrize(
    ("said", "code", "rejected"),
    [
        pytest.param([[b"\x00\xff"]], "bad_message", 0, id="not our protocol"),
        pytest.param([[b"frames", b"\x80"]], "corrupt", 1, id="no header"),
        pytest.param([encode(START)[:1]], "bad_message", 0, id="truncated start"),
        pytest.param([some(0, 3)], "no_acquisition", 3, id="frames without start"),
        pytest.param([encode(END)], "out_of_sequence", 0, id="end without start"),
        pytest.param([encode(START), encode(START), encode(END)], "out_of_sequence", 0,
                     id="start twice"),
        pytest.param([encode(START), some(18, 22), encode(END)], "index_outside_scan", 2,
                     id="index outside the scan"),
        pytest.param([encode(START), some(0, 3), some(2, 4), encode(END)], "duplicate_index", 1,
                     id="duplicate index"),
        pytest.param([encode(START), encode(END), some(0, 3)], "no_acquisition", 3,
                     id="frames after the end"),
        pytest.param([encode(START), some(0, 2, (24, 16)), encode(END)], "wrong_shape_or_dtype", 2,
                     id="wrong shape"),
        pytest.param([encode(START), some(0, 2, dtype="uint32"), encode(END)],
                     "wrong_shape_or_dtype", 2, id="wrong dtype"),
        pytest.param([encode(START), [*some(0, 2)[:3], b"short"], encode(END)], "corrupt", 2,
                     id="wrong length"),
        pytest.param([encode(START), some(0, 2), encode(END.model_copy(update={
            "acquisition_id": "other"})), encode(END)], "out_of_sequence", 0,
                     id="end of another acquisition"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name_and_the_service_goes_on(
    service, listener, said, code, rejected
):
    before = settled(service)
    with raw_sender(service) as send:
        for parts in said:
            send(parts)
        event = listener.wait_for_event(code)
        assert event.level == "warning"
        assert event.message.endswith((".", ")"))
        scan(service, listener)
    after = settled(service)
    assert after.rejected - before.rejected == rejected
    reason = after.rejected_by_reason.get(code, 0) - before.rejected_by_reason.get(code, 0)
    assert reason == rejected


def test_another_version_of_the_protocol_is_refused(service, listener):
    import msgpack

    topic, header = encode(START)
    fields = msgpack.unpackb(header) | {"version": 2}
    with raw_sender(service) as send:
        send([topic, msgpack.packb(fields)])
        assert "version 2" in listener.wait_for_event("bad_start").message
        scan(service, listener)


def test_counts_that_are_no_counts_are_refused_and_the_others_kept(service, listener):
    pixels = frames(6, dtype="float32")
    pixels[1, 3, 3], pixels[2, 0, 0], pixels[4, 5, 5] = np.nan, -1, np.inf
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="float32", scan_shape=(2, 3))
        source.send(pixels)
        listener.wait_for_event("bad_counts")
        source.send(np.ones((1, *SHAPE), np.float32), [4])  # the frame comes again, whole
        source.end()
    counters = listener.wait_for("acquisition_end").counters
    assert (counters.received, counters.corrected) == (7, 4)
    assert counters.rejected_by_reason == {"bad_counts": 3}
    assert listener.indices() == [0, 3, 5, 4]


def test_an_acquisition_of_which_nothing_could_be_corrected_ends_with_a_warning(service, listener):
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="float32")
        source.send(np.full((1, *SHAPE), np.nan, np.float32))
        source.end()
    told = listener.wait_for_event("acquisition_ended")
    assert told.level == "warning"
    assert told.message == (
        "The acquisition ended; 1 frame received, 0 corrected, 1 rejected (most often: bad "
        "counts), 0 shed. None of its frames was corrected."
    )
    listener.wait_for("acquisition_end")  # which comes last, and would be the next test's first


def test_a_status_that_counts_frames_has_what_they_told(monkeypatch):
    with Service(settings()) as service, sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
        until(lambda: service.status().acquisition is not None)

        def slowly(_):  # while the status is being put together
            source.send(frames(3))
            until(lambda: service._pipeline.total.snapshot().corrected == 3)
            return "1.0"

        monkeypatch.setattr("prenet4d_server.service.version", slowly)
        status = service.status()
        assert status.ellipticity is not None or status.counters.corrected == 0
        assert status.ellipticity is not None or status.acquisition.counters.corrected == 0


@pytest.mark.parametrize("which", ["control", "lossless", "stream"])
def test_who_sends_endlessly_much_is_cut_off_and_the_others_are_served(service, which):
    kind = zmq.XSUB if which == "stream" else zmq.DEALER
    with zmq.Context() as context, context.socket(kind) as endless:
        endless.linger = 0
        with endless.get_monitor_socket(zmq.EVENT_DISCONNECTED) as cut:
            endless.connect(service.endpoints[which])
            endless.send(b"\x02" * (16 << 20))
            assert cut.poll(TIMEOUT_S * 1000)
            endless.disable_monitor()
    assert service.status().healthy
    with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
        assert client.status()["ready"]


def test_a_detector_restarted_in_mid_scan_aborts_the_old_acquisition(service, listener):
    with raw_sender(service) as send:
        send(encode(START))
        send(some(0, 5))
        send(encode(START.model_copy(update={"acquisition_id": "again"})))
        send(some(0, 5, acquisition_id="again"))
        send(encode(END.model_copy(update={"acquisition_id": "again"})))
        listener.wait_for("acquisition_end", 2)
    first, second = listener.of("acquisition_end")
    assert (first.acquisition_id, first.aborted) == ("scan", True)
    assert "restarted" in first.reason
    assert (second.acquisition_id, second.aborted) == ("again", False)
    assert first.counters.corrected == second.counters.corrected == 5


def test_a_sender_that_fails_says_why_its_acquisition_ended(service, listener):
    def fail():
        with sender(service) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
            source.send(frames(2))
            raise KeyError("broken")

    with pytest.raises(KeyError):
        fail()
    end = listener.wait_for("acquisition_end")
    assert end.aborted
    assert "broken" in end.reason
    assert end.counters.corrected == 2


def test_no_detector_is_no_reason_not_to_be_ready():
    nowhere = {"kind": "dectris2", "address": "tcp://127.0.0.1:9"}
    with Service(settings(source=nowhere)) as waiting:
        assert waiting.status().ready


@pytest.mark.parametrize("which", ["source", "stream", "lossless", "control"])
def test_a_port_in_use_is_named_and_nothing_is_left_running(service, which):
    taken = service.endpoints[{"source": "ingest"}.get(which, which)]
    children = psutil.Process().children()
    with pytest.raises(BindError, match=taken), Service(settings(**{which: {"address": taken}})):
        pass
    assert psutil.Process().children() == children
    assert service.status().healthy


def test_a_service_may_listen_on_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    here = {"address": "tcp://[::1]:*"}
    names = ("source", "stream", "lossless", "control")
    with Service(settings(**dict.fromkeys(names, here))) as service:
        with listening(service) as listener:
            scan(service, listener)
        with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
            assert client.status()["counters"]["corrected"] == 20


def test_an_unreadable_file_is_named(tmp_path):
    file = tmp_path / "broken.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00rubbish")
    with (
        pytest.raises(FileError, match=r"broken\.npy"),
        Service(settings(source={"kind": "replay", "path": file})),
    ):
        pass


def test_a_file_is_replayed(tmp_path):
    np.save(tmp_path / "scan.npy", frames(30).reshape(5, 6, *SHAPE))
    source = {"kind": "replay", "path": tmp_path / "scan.npy", "rate": 100, "repeat": 1000}
    with Service(settings(source=source)) as replaying, listening(replaying) as listener:
        end = listener.wait_for("acquisition_end", 2)
        assert end.counters.corrected == 30


def test_a_replayed_recording_is_told_of_once_because_its_patterns_are_corrected(tmp_path):
    file = tmp_path / "scan.h5"
    write(file, whole_scan(patterns_of(20)))
    source = {"kind": "replay", "path": file, "repeat": 2}
    with Service(settings(source=source)) as replaying:
        until(lambda: replaying.status().counters.corrected == 40)
        told = [said for said in replaying.status().recent_events if "Mind that" in said]
    assert len(told) == 1
    assert f"{file} was recorded by prenet4d: its patterns are corrected once more." in told[0]


def test_full_ring_with_block_holds_the_sender_back_and_loses_nothing():
    held = settings(
        ring={"size": 1 << 20, "policy": "block"}, batch={"size": 8}, lossless={"max_lag_s": 100}
    )
    n = 6000  # some times what the ring and the sockets hold
    with Service(held) as small, listening(small) as listener:
        receiver = LosslessReceiver(
            small.endpoints["lossless"], name="slow", topics="telemetry", credit=2,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        with receiver, sender(small) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=n)
            sending = threading.Thread(
                target=lambda: [source.send(frames(20), range(i, i + 20)) for i in range(0, n, 20)]
            )
            sending.start()
            listener.wait_for_event("receiver_behind")
            listener.wait_for_event("ring_full")
            seen = []
            while len(seen) < n:
                seen += receiver.receive().indices.tolist()
            sending.join()
            source.end()
            assert seen == list(range(n))
        counters = listener.wait_for("acquisition_end").counters
        assert (counters.received, counters.corrected) == (n, n)


def waits_for_the_publisher(service):
    """Whether the pipeline looks after the ingest process, as it does while it is held back."""
    publisher, waits = service._publisher, threading.Event()
    update = publisher.while_held
    publisher.while_held = lambda: (waits.set(), update())
    try:
        return waits.wait(1)
    finally:
        publisher.while_held = update


@contextmanager
def held_back():
    """A service in the middle of a scan of 1000 frames whose receiver takes nothing for now.

    What follows is the scan's sender, who has sent 900, the receiver, and who hears everything.
    """
    patient = settings(batch={"size": 4}, lossless={"max_lag_s": 100})
    with Service(patient) as service, listening(service) as listener:
        receiver = LosslessReceiver(
            service.endpoints["lossless"], name="slow", topics=("telemetry", "acquisition_end"),
            credit=1, timeout=TIMEOUT_S,
        )  # fmt: skip
        with receiver, sender(service) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=1000)
            source.send(frames(900))
            until(lambda: service.status().backlog > 500)
            until(lambda: service.status().receivers_behind_s.get("slow", 0) > 1)
            until(lambda: waits_for_the_publisher(service))
            yield service, source, receiver, listener


def take_all(receiver):
    """The frames that the receiver gets until the acquisition ends, and what became of all."""
    seen = []
    while (message := receiver.receive()).type == "telemetry":
        seen += message.indices.tolist()
    return seen, message.counters


def test_what_the_ingest_process_says_is_heard_while_a_receiver_holds_the_pipeline_back():
    with held_back() as (service, source, receiver, listener):
        backlog = service.status().backlog
        with raw_sender(service) as send:
            send([b"\x00\xff"])
            listener.wait_for_event("bad_message")
        source.send(frames(1), [17])  # again
        event = listener.wait_for_event("duplicate_index")
        assert event.acquisition_id == service.acquisition_id
        assert service.status().backlog == backlog
        assert service.status().counters.rejected == 1
        assert balanced(service.status().counters)
        source.send(frames(100), range(900, 1000))
        source.end()
        seen, counters = take_all(receiver)
        assert seen == list(range(1000))
        assert (counters.received, counters.corrected, counters.rejected) == (1001, 1000, 1)


def test_an_ingest_process_that_dies_is_replaced_while_a_receiver_holds_the_pipeline_back():
    with held_back() as (service, source, receiver, listener):
        first, backlog = service.acquisition_id, service.status().backlog
        os.kill(service._inlet.pid, signal.SIGKILL)
        assert "goes on" in listener.wait_for_event("ingest_died").message
        until(lambda: service.status().source.ready and service.status().source.restarts == 1)
        assert service.status().backlog == backlog
        source.send(frames(90), range(910, 1000))
        until(lambda: service.status().backlog == backlog + 90)
        source.end()
        with sender(service) as following:
            second = following.start(frame_shape=SHAPE, dtype="uint16", expected_frames=5)
            following.send(frames(5))
            following.end()
            seen, counters = take_all(receiver)
            assert seen == [*range(900), *range(910, 1000)]
            assert counters.received == counters.corrected == 990
            assert take_all(receiver)[0] == list(range(5))
        listener.wait_for("acquisition_end", 2)
    told = [(one.type, one.acquisition_id) for one in listener.messages if one.type != "event"]
    kinds = ("acquisition_start", "telemetry", "acquisition_end")
    assert list(dict.fromkeys(told)) == [(kind, scan) for scan in (first, second) for kind in kinds]


def test_full_ring_with_shed_drops_whole_frames_counts_and_says_them():
    shedding = settings(
        ring={"size": 1 << 20, "policy": "shed"}, batch={"size": 8}, lossless={"max_lag_s": 100}
    )
    n = 4000
    with Service(shedding) as small, listening(small) as listener:
        receiver = LosslessReceiver(
            small.endpoints["lossless"], name="slow", topics=("telemetry", "acquisition_end"),
            credit=1, timeout=TIMEOUT_S,
        )  # fmt: skip
        with receiver, sender(small) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=n)
            for i in range(0, n, 100):
                source.send(frames(100), range(i, i + 100))
            source.end()
            listener.wait_for_event("receiver_behind")
            listener.wait_for_event("frames_shed")
            seen = []
            while (message := receiver.receive()).type == "telemetry":
                seen += message.indices.tolist()
        listener.wait_for("acquisition_end")  # all events before it have come, too
        counters = message.counters
        assert balanced(counters)
        assert counters.received == n
        assert counters.in_flight == counters.rejected == 0
        assert 0 < counters.shed < n
        assert len(seen) == len(set(seen)) == counters.corrected
        told = [event for event in listener.of("event") if event.code == "frames_shed"]
        assert sum(event.details["shed"] for event in told) == counters.shed
        scan(small, listener, 10)


def test_a_killed_ingest_process_is_replaced_and_its_scan_goes_on():
    with Service(settings()) as service, listening(service) as listener:
        with sender(service) as source:
            mask = np.ones(SHAPE, np.bool_)
            mask[3, 4] = False
            source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(10, 10), pixel_mask=mask)
            source.send(frames(30))
            until(lambda: service.status().counters.corrected == 30)
            os.kill(service._inlet.pid, signal.SIGKILL)
            event = listener.wait_for_event("ingest_died")
            assert event.level == "error"
            assert "goes on" in event.message
            until(lambda: service.status().source.ready)
            assert service.status().source.restarts == 1
            source.send(frames(60), range(40, 100))  # ten were lost
            source.send(frames(1), [100])  # and there are no more than a hundred
        end = listener.wait_for("acquisition_end")
        assert not end.aborted
        assert end.counters.corrected == 90
        assert end.counters.rejected == 1
        told = listener.wait_for_event("acquisition_ended")
        assert told.level == "warning"
        assert "10 of 100 expected frames never came." in told.message
        scan(service, listener)
        assert balanced(settled(service))


def test_frames_that_were_sent_and_never_came_are_missed_without_a_scan_shape_too():
    identity = {"publisher": "a" * 32, "acquisition_id": "x"}
    start = AcquisitionStart(**identity, frame_shape=SHAPE, dtype="uint16")
    block = {"indices": np.arange(5), "frames": frames(5)}
    with (
        Service(settings()) as service,
        listening(service) as listener,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as detector,
    ):
        detector.connect(service.endpoints["ingest"])
        detector.send_multipart(encode(start, {}))
        detector.send_multipart(encode(Frames(**identity), block))
        detector.send_multipart(encode(AcquisitionEnd(**identity, frames=1000), {}))
        end = listener.wait_for("acquisition_end")
        told = listener.wait_for_event("acquisition_ended")
    assert (end.header.frames, end.counters.received) == (1000, 5)
    assert told.level == "warning"
    assert "995 of 1,000 sent frames never came." in told.message


def test_an_ingest_process_that_dies_again_and_again_is_started_ever_more_slowly(monkeypatch):
    monkeypatch.setattr(restarts, "SOUND_S", TIMEOUT_S)  # none of them lives for long
    with Service(settings()) as service, listening(service) as listener:
        killed = []

        def kill_the_next():
            pid = service._inlet.pid
            if pid is None or pid in killed:
                return False
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return True

        for _ in range(3):
            until(kill_the_next)
        until(lambda: listener.codes().count("ingest_died") == 3)
        told = [event.message for event in listener.of("event") if event.code == "ingest_died"]
        assert "started again." in told[0]
        assert "started again in 2 s." in told[2]
        until(lambda: service.status().source.restarts == 3 and service.status().source.ready)
        scan(service, listener)


def test_a_file_whose_ingest_process_was_killed_is_played_anew(tmp_path):
    np.save(tmp_path / "scan.npy", frames(30))
    np.save(tmp_path / "longer.npy", frames(31))
    source = {"kind": "replay", "path": tmp_path / "scan.npy", "rate": 100, "repeat": 1000}
    with Service(settings(source=source)) as replaying, listening(replaying) as listener:
        listener.wait_for("telemetry")
        # The process that dies has opened the file; the next one finds this in its place.
        (tmp_path / "longer.npy").rename(tmp_path / "scan.npy")
        os.kill(replaying._inlet.pid, signal.SIGKILL)
        listener.wait_for_event("ingest_died")
        until(lambda: replaying.status().source.ready)
        assert replaying.status().source.restarts == 1
        until(lambda: any(end.counters.corrected == 31 for end in listener.of("acquisition_end")))


def test_an_acquisition_whose_ingest_process_died_ends_with_the_service():
    with Service(settings()) as service, listening(service) as listener:
        with raw_sender(service) as send:
            send(encode(START))
            send(some(0, 15))
            until(lambda: service.status().counters.corrected == 15)
        os.kill(service._inlet.pid, signal.SIGKILL)
        listener.wait_for_event("ingest_died")
        service.close()
        end = listener.wait_for("acquisition_end")
        assert end.aborted
        assert end.counters.corrected == 15


def test_a_killed_ingest_process_ends_the_service_where_it_is_not_to_be_restarted():
    with Service(settings(ring={"restart_ingest": False})) as service:
        os.kill(service._inlet.pid, signal.SIGKILL)
        with pytest.raises(IngestDied):
            service.run(threading.Event())
        assert not service.status().healthy


SERVE = """
import sys
from prenet4d_server.config import Settings
from prenet4d_server.service import serve
sys.exit(serve(Settings.model_validate_json(sys.stdin.read())))
"""


@contextmanager
def served(**sections):
    """A service in a process of its own, whose log tells where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # As in a terminal, though the tests may run under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    process.stdin.write(settings(**sections).model_dump_json())
    process.stdin.close()
    try:
        said = ""
        for line in process.stderr:
            said += line
            if "Ready." in line:
                break
        else:
            pytest.fail(f"it ended: {said}")
        control = re.search(r"control (tcp://[\d.:]+)", said)[1]
        with ControlClient(control, timeout=TIMEOUT_S) as client:
            yield process, client.status()["endpoints"]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_says_goodbye_and_exits_with_0(number):
    with served(batch={"size": 7}) as (process, endpoints):
        receiver = LosslessReceiver(
            endpoints["lossless"], name="last", credit=1000, timeout=TIMEOUT_S,
            topics=("telemetry", "acquisition_end"),
        )  # fmt: skip
        with receiver, FrameSender(endpoints["ingest"], timeout=TIMEOUT_S) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=1000)
            source.send(frames(500))
            seen = receiver.receive().indices.tolist()
            os.kill(process.pid, number)
            while (end := receiver.receive()).type == "telemetry":
                seen += end.indices.tolist()
            with pytest.raises(ConnectionRefused, match="stopped"):
                receiver.receive()
            assert end.aborted
            assert end.reason == "the service was stopped"
            assert balanced(end.counters)
            assert end.counters.in_flight == 0
            assert seen == list(range(end.counters.corrected))
            assert end.counters.corrected == end.counters.received
            assert process.wait(TIMEOUT_S) == 0
            source._start = None  # there is nobody to tell of the end
        assert process.wait(TIMEOUT_S) == 0
        told = process.stderr.read()
        assert f"Stopping on {number.name}: " in told
        assert "Traceback" not in told


def test_a_second_ctrl_c_ends_the_draining_and_all_frames_are_accounted_for():
    stuck = {"drain_s": 1000, "batch": {"size": 4}, "lossless": {"max_lag_s": 1000}}
    topics = ("acquisition_end", "event")
    with served(**stuck) as (process, endpoints):
        receivers = [
            LosslessReceiver(
                endpoints["lossless"], name=name, topics=wanted, credit=credit, timeout=TIMEOUT_S
            )
            for name, wanted, credit in (("stuck", "telemetry", 1), ("last", topics, 1000))
        ]
        ingest = FrameSender(endpoints["ingest"], timeout=TIMEOUT_S)
        with receivers[0], receivers[1], ingest as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=1000)
            source.send(frames(1000))
            with ControlClient(endpoints["control"], timeout=TIMEOUT_S) as client:
                until(lambda: client.status()["receivers_behind_s"].get("stuck", 0) > 0)
                until(lambda: client.status()["counters"]["received"] == 1000)
            os.kill(process.pid, signal.SIGINT)
            told = ""
            while "Stopping on SIGINT" not in told:
                told = process.stderr.readline()
            assert "for at most 1000 s; a further Ctrl-C gives up the rest." in told
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0
            source._start = None  # there is nobody to tell of the end
            while (end := receivers[1].receive()).type != "acquisition_end":
                pass
        assert balanced(end.counters)
        assert (end.counters.received, end.counters.in_flight) == (1000, 0)
        assert 0 < end.counters.shed < 1000
        told = process.stderr.read()
        assert f"stopped before {end.counters.shed} received frames could be corrected" in told
        assert "Traceback" not in told


def test_draining_is_bounded_and_what_is_given_up_is_counted():
    stuck = settings(drain_s=0.5, batch={"size": 4}, lossless={"max_lag_s": 100})
    with Service(stuck) as service, listening(service) as listener:
        receiver = LosslessReceiver(
            service.endpoints["lossless"], name="stuck", topics="telemetry", credit=1,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        with receiver, sender(service) as source:
            source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=1000)
            source.send(frames(1000))
            until(lambda: service.status().backlog > 500)
            service.close()
            source._start = None  # there is nobody to tell of the end
        counters = service._pipeline.total.snapshot()
        assert balanced(counters)
        assert counters.received == 1000
        assert counters.in_flight == 0
        assert "receiver_dropped" in [e.code for e in service._publisher.recent_events]
        assert listener


def has_told_its_end(inlet, name):
    """Whether the ingest process has told the acquisition's end, read by now or not."""
    with (
        socket.socket(fileno=os.dup(inlet._pipe.fileno())) as pipe,
        contextlib.suppress(BlockingIOError),
    ):
        _, ended, after = pipe.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT).rpartition(
            b"Ended"
        )
        if ended and name.encode() in after:
            return True
    return any(isinstance(mark, Ended) and mark.acquisition_id == name for mark in inlet.marks)


def test_an_acquisition_that_is_given_up_before_it_was_begun_is_told_of_from_start_to_end():
    stuck = settings(drain_s=0.2, batch={"size": 4}, lossless={"max_lag_s": 100})
    names = []
    with Service(stuck) as service, listening(service) as listener:
        receiver = LosslessReceiver(
            service.endpoints["lossless"], name="stuck", topics="telemetry", credit=1,
            timeout=TIMEOUT_S,
        )  # fmt: skip
        with receiver, sender(service) as source:
            for n in (1000, 40):
                names.append(source.start(frame_shape=SHAPE, dtype="uint16", expected_frames=n))
                source.send(frames(n))
                source.end()
            until(lambda: has_told_its_end(service._inlet, names[1]))
            service.close()
        listener.wait_for("acquisition_end", 2)
        ends = listener.of("acquisition_end")
    assert [start.acquisition_id for start in listener.of("acquisition_start")] == names
    assert [end.acquisition_id for end in ends] == names
    assert [end.counters.received for end in ends] == [1000, 40]
    assert all(balanced(end.counters) and end.counters.in_flight == 0 for end in ends)


def test_the_ingest_process_ends_with_a_main_process_that_is_killed():
    with served() as (process, _):
        (child,) = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_with_keys_only_who_knows_the_public_one_gets_in(tmp_path):
    _, secret = generate_keys(tmp_path)
    public, _ = load_keys(secret)
    with Service(settings(security={"secret_key_file": secret})) as service:
        stranger = ControlClient(service.endpoints["control"], timeout=0.5)
        with stranger, pytest.raises(NoAnswer):
            stranger.status()
        control = service.endpoints["control"]
        with ControlClient(control, timeout=TIMEOUT_S, server_key=public) as client:
            assert client.status()["ready"]
        with subscriber(service, "telemetry", server_key=public) as stream:
            with sender(service, server_key=public) as source:
                source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(1, 3))
                source.send(frames(3))
                source.end()
            assert len(stream.receive().indices) == 3


def test_a_secret_that_everybody_may_read_is_told_of(tmp_path, caplog):
    _, secret = generate_keys(tmp_path)
    token = tmp_path / "token"
    kept = settings(
        security={"secret_key_file": secret}, http={"enabled": True, "operator_token_file": token}
    )
    with Service(kept):
        assert "may read" not in caplog.text
    secret.chmod(0o644)
    token.chmod(0o644)
    with Service(kept):
        assert f"Everybody may read the secret key: chmod o= {secret}" in caplog.text
        assert f"Everybody may read the operator's token: chmod o= {token}" in caplog.text


def test_memory_stays_flat():
    with Service(settings(ring={"size": 4 << 20})) as service, listening(service) as listener:
        processes = [psutil.Process(), psutil.Process(service._inlet.pid)]

        def run_scans(count):
            for _ in range(count):
                with sender(service) as source:
                    source.start(frame_shape=(32, 32), dtype="uint16", expected_frames=2000)
                    for i in range(0, 2000, 50):
                        source.send(frames(50, (32, 32)), range(i, i + 50))
                    source.end()
                listener.wait_for("acquisition_end")
                listener.messages.clear()

        run_scans(3)
        before = [process.memory_info().rss for process in processes]
        run_scans(8)
        after = [process.memory_info().rss for process in processes]
        assert settled(service).corrected == 11 * 2000
        for grown in np.subtract(after, before):
            assert grown < 12 << 20
