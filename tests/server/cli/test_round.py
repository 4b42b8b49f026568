"""The commands together, as separate processes over real sockets: a whole scan and its record."""

import json
import subprocess
import sys

import h5py
import hdf5plugin  # noqa: F401 # lets h5py read what is compressed
import numpy as np
import pytest

from prenet4d_client import FrameSender
from prenet4d_server.processes import Child, RunningService

from ..live import TIMEOUT_S, until
from ..recording.test_recordings import is_complete

SCAN = (6, 8)


@pytest.fixture
def frames(tmp_path):
    file = tmp_path / "frames.npy"
    rng = np.random.default_rng(1)
    np.save(file, rng.poisson(3.0, (SCAN[0] * SCAN[1], 32, 32)).astype(np.uint16))
    return file


@pytest.fixture
def service(tmp_path, request):
    kind = request.param
    source = {"kind": kind, "scan_shape": SCAN}
    with RunningService(
        tmp_path,
        source=source,
        corrector={"backend": "identity"},
        lossless={"heartbeat_s": TIMEOUT_S},
    ) as running:
        yield running


def prenet4d(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "prenet4d_server", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def recorder(service, file, *more):
    arguments = ("record", str(file), "--lossless", service.lossless, "--content", "aligned", *more)
    return Child.command("recorder", *arguments, log=file.with_suffix(".log"))


@pytest.mark.parametrize("service", ["dectris2", "dectris1", "native"], indirect=True)
def test_scan_goes_through_and_is_recorded(service, frames, tmp_path, request):
    kind = request.node.callspec.params["service"]
    file = tmp_path / "scan.h5"
    with recorder(service, file, "--acquisitions", "1") as recording:
        service.wait_for_receivers(1)
        sent = prenet4d(
            *("simulate-detector", kind, "--address", service.detector, "--data", frames),
            *("--scan", f"{SCAN[0]}x{SCAN[1]}"),
        )
        assert sent.returncode == 0, sent.stderr
        recording.wait(timeout=TIMEOUT_S)
    with h5py.File(file) as recorded:
        stored = recorded["Experiments/aligned/data"][:]
    np.testing.assert_array_equal(stored.reshape(-1, 32, 32), np.load(frames))

    asked = ("status", "--control", service.control, "--timeout", TIMEOUT_S)
    told = prenet4d(*asked, "--json")
    counters = json.loads(told.stdout)["counters"]
    assert counters["received"] == counters["corrected"] == len(stored.reshape(-1, 32, 32))
    shown = prenet4d(*asked)
    assert shown.returncode == 0
    assert "corrected" in shown.stdout
    assert "theta degrees" in shown.stdout
    assert "…" not in shown.stdout  # nothing is cut off
    began, ended = (
        line for line in shown.stdout.splitlines() if "began:" in line or " ended;" in line
    )
    assert "ended" not in began
    assert "began" not in ended

    service.stop(TIMEOUT_S)
    assert service.process.returncode == 0


@pytest.mark.parametrize("service", ["native"], indirect=True)
def test_a_scan_that_ended_early_is_recorded_as_such(service, tmp_path):
    file = tmp_path / "scan.h5"
    with recorder(service, file, "--acquisitions", "1") as recording:
        service.wait_for_receivers(1)
        with FrameSender(service.detector, timeout=TIMEOUT_S) as source:
            source.start(frame_shape=(32, 32), dtype="uint16", scan_shape=SCAN)
            source.send(np.ones((12, 32, 32), np.uint16))
            source.end()
        recording.wait(timeout=TIMEOUT_S)
        assert recording.process.returncode == 0
    said = file.with_suffix(".log").read_text().splitlines()
    assert said[-1] == "Recorded 12 of 48 patterns: the scan ended without the others"
    with h5py.File(file) as recorded:
        ours = recorded["prenet4d"]
        assert ours.attrs["complete"]
        assert ours.attrs["frames_received"] == 12
        assert ours["acquisition"].attrs["expected_frames"] == 48
        told = [(event["code"], event["message"].decode()) for event in ours["events"][:]]
    assert told[-1][0] == b"acquisition_ended"
    assert "36 of 48 expected frames never came." in told[-1][1]


@pytest.mark.parametrize("service", ["native"], indirect=True)
@pytest.mark.parametrize(("first", "status"), [("beam dump", 1), ("", 0)])
def test_a_stop_in_mid_scan_hides_no_scan_that_was_incomplete_before(
    service, tmp_path, first, status
):
    file = tmp_path / "scan.h5"
    with recorder(service, file) as recording:
        service.wait_for_receivers(1)
        with FrameSender(service.detector, timeout=TIMEOUT_S) as source:
            for scan in ("first", "second"):
                source.start(frame_shape=(32, 32), dtype="uint16", scan_shape=SCAN)
                source.send(np.ones((12, 32, 32), np.uint16))
                if scan == "first":
                    source.end(aborted=first)
            until((tmp_path / "scan_002.h5").exists)
            recording.stop(TIMEOUT_S)
    assert recording.process.returncode == status
    aborted = f"the acquisition was aborted: {first}"
    reason = aborted if first else "it was stopped before the acquisition's end"
    assert f"incomplete: {reason}" in recording.last_words()


@pytest.mark.parametrize("service", ["native"], indirect=True)
def test_a_service_that_stops_after_a_scan_leaves_a_recording_that_is_not_called_incomplete(
    service, tmp_path
):
    file = tmp_path / "scan.h5"
    with recorder(service, file) as recording:
        service.wait_for_receivers(1)
        with FrameSender(service.detector, timeout=TIMEOUT_S) as source:
            source.start(frame_shape=(32, 32), dtype="uint16", scan_shape=SCAN)
            source.send(np.ones((SCAN[0] * SCAN[1], 32, 32), np.uint16))
            source.end()
        until(lambda: is_complete(file))
        service.stop(TIMEOUT_S)
        assert recording.process.wait(TIMEOUT_S) == 1
    *_, recorded, lost = file.with_suffix(".log").read_text().splitlines()
    assert recorded == "Recorded 48 patterns"
    assert lost.startswith("The recording ended because the service was lost: ")


@pytest.mark.parametrize("service", ["native"], indirect=True)
def test_replay_is_watched_and_the_recorder_closes_its_file_when_interrupted(
    service, frames, tmp_path
):
    file = tmp_path / "scan.h5"
    log = tmp_path / "watch.log"
    watching = Child.command(
        "watcher", "watch", "--plain", "--every", "0.1", "--stream", service.stream, log=log
    )
    once = Child.command(
        "once", "watch", "--once", "--stream", service.stream, "--timeout", str(TIMEOUT_S),
        log=tmp_path / "once",
    )  # fmt: skip
    with watching, once:
        with FrameSender(service.detector, timeout=TIMEOUT_S) as source:
            scans = []

            def both_watch():
                """Whoever listens has been shown a scan; who came too late sees the next one."""
                scans.append(source.start(frame_shape=(32, 32), dtype="uint16", scan_shape=SCAN))
                source.send(np.load(frames)[:1])
                source.end()
                return once.process.poll() == 0 and "acquisition ended" in log.read_text()

            until(both_watch)
        # None of them is left over for the recorder.
        until(lambda: service.status()["counters"]["corrected"] == len(scans))
        until(lambda: service.status()["acquisition"] is None)
        with recorder(service, file) as recording:
            service.wait_for_receivers(1)
            replay = ("replay", frames, "--to", service.detector, "--scan", "6x8", "--rate", "40")
            sent = prenet4d(*replay)
            assert sent.returncode == 0, sent.stderr
            until(lambda: is_complete(file))
            recording.stop(TIMEOUT_S)
            assert recording.process.returncode == 0
        until(lambda: "48/48 frames" in log.read_text())
        watching.stop()
    lines = log.read_text().splitlines()
    assert "Mind that" not in sent.stderr
    again = prenet4d("replay", file, "--to", service.detector)
    assert again.returncode == 0, again.stderr
    assert "was recorded by prenet4d: its patterns are corrected once more" in again.stderr
    assert once.log.read_text().count("/48 frames") == 1
    assert any("info: The acquisition ended" in line for line in lines)


@pytest.mark.parametrize("service", ["native"], indirect=True)
def test_operator_commands_reach_the_service(service, frames, tmp_path):
    refused = prenet4d("freeze", "--control", service.control)
    assert refused.returncode == 1
    assert "No acquisition has begun yet" in refused.stderr
    assert prenet4d("replay", frames, "--to", service.detector).returncode == 0
    until(lambda: service.status()["counters"]["corrected"] == SCAN[0] * SCAN[1])
    for command in ("freeze", "unfreeze", "recalibrate"):
        assert prenet4d(command, "--control", service.control).returncode == 0
    file = tmp_path / "today.json"
    assert prenet4d("calibration", "save", file, "--control", service.control).returncode == 0
    again = prenet4d("calibration", "save", file, "--control", service.control)
    assert again.returncode == 1
    loaded = prenet4d("calibration", "load", file, "--control", service.control)
    assert loaded.returncode == 0, loaded.stderr
    assert "ratio 1.0000" in loaded.stdout
