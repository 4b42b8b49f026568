"""Recordings that the operator starts and stops, in a process of the service's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from prenet4d_client import ControlClient, FrameSender
from prenet4d_client.errors import CommandRefused
from prenet4d_client.messages import Event
from prenet4d_server.config import LogSettings, RecordingSettings
from prenet4d_server.processes import RunningService
from prenet4d_server.recording.supervisor import Recordings
from prenet4d_server.service import Service
from prenet4d_server.sockets import generate_keys

from ..live import TIMEOUT_S, Listener, frames, listening, sender, settings, until

SHAPE = (16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    recording = {"directory": folder, "keep_free": "64MiB"}
    with Service(settings(recording=recording)) as running:
        yield running


@pytest.fixture
def listener(service: Service) -> Iterator[Listener]:
    with listening(service) as made:
        yield made


@pytest.fixture
def client(service: Service) -> Iterator[ControlClient]:
    with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as connected:
        yield connected


def started(client: ControlClient, name: str | None = None) -> dict[str, Any]:
    """A recording that misses nothing from now on."""
    client.start_recording(name)
    until(lambda: client.status()["recording"]["state"] == "recording")
    return client.status()["recording"]


def stopped(client: ControlClient) -> dict[str, Any]:
    client.stop_recording()
    until(lambda: client.status()["recording"]["state"] == "idle")
    return client.status()["recording"]


def scan(service: Service, listener: Listener, n: int = 6) -> None:
    before = len(listener.of("acquisition_end"))
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(n // 3, 3))
        source.send(frames(n))
        source.end()
    listener.wait_for("acquisition_end", before + 1)


def is_complete(file: Path) -> bool:
    """Whether a recording is closed, and holds its scan to the regular end."""
    try:
        with h5py.File(file) as recorded:
            return bool(recorded["prenet4d"].attrs["complete"])
    except (OSError, KeyError):  # it is not there yet, or being written
        return False


def recorders(service_pid: int) -> list[psutil.Process]:
    """The recorder processes that a service has started."""
    return [
        child
        for child in psutil.Process(service_pid).children()
        if "prenet4d_server.recording.process" in child.cmdline()
    ]


def test_a_recording_holds_every_scan_between_start_and_stop(
    service: Service, listener: Listener, client: ControlClient, folder: Path
) -> None:
    assert client.status()["recording"]["state"] == "idle"
    assert started(client, "mine")["name"] == "mine"
    until(lambda: client.status()["receivers"] == ["recorder"])
    scan(service, listener)
    scan(service, listener)
    until(lambda: client.status()["recording"]["patterns"] == 12)
    until(lambda: is_complete(folder / "mine_002.h5"))
    recording = stopped(client)
    assert recording["files"] == ["mine.h5", "mine_002.h5"]
    assert (recording["complete"], recording["reason"]) == (True, "")
    until(lambda: client.status()["receivers"] == [])
    with h5py.File(folder / "mine_002.h5") as file:
        data = file["Experiments/corrected/data"]
        np.testing.assert_array_equal(data[:].reshape(6, *SHAPE), frames(6))
        assert file["prenet4d"].attrs["complete"]
    listener.wait_for_event("recording_started")
    assert "12 patterns in 2 files." in listener.wait_for_event("recording_stopped").message


def test_a_recording_that_is_stopped_early_says_so(
    service: Service, listener: Listener, client: ControlClient, folder: Path
) -> None:
    name = started(client)["name"]
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
        source.send(frames(3))
        until(lambda: client.status()["recording"]["patterns"] == 3)
        recording = stopped(client)
        source.send(frames(3), range(3, 6))
        source.end()
    assert not recording["complete"]
    assert "stopped" in recording["reason"]
    assert recording["absent"] == 3
    told = listener.wait_for_event("recording_stopped").message
    assert told.startswith("Recording ended with 3 of 6 patterns in 1 file; incomplete: it was st")
    with h5py.File(folder / f"{name}.h5") as file:
        assert not file["prenet4d"].attrs["complete"]


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "a/b", "..", ".hidden", "", " ", "a\0b", "{n}", "x" * 500, "a\n"]
)
def test_no_name_leads_out_of_the_folder(
    client: ControlClient, folder: Path, name: str, tmp_path: Path
) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CommandRefused, match="cannot be the name"):
        client.start_recording(name)
    assert sorted(folder.parent.rglob("*")) == before
    assert client.status()["recording"]["state"] == "idle"


def test_a_name_that_is_no_text_is_refused(client: ControlClient) -> None:
    with pytest.raises(CommandRefused, match="is a text"):
        client.start_recording(["a"])  # type: ignore[arg-type]


def test_what_exists_is_not_overwritten_nor_followed(
    client: ControlClient, folder: Path, tmp_path: Path
) -> None:
    (folder / "taken.h5").write_text("mine")
    (folder / "link.h5").symlink_to(tmp_path / "elsewhere.h5")
    for name in ("taken", "taken.h5", "link"):
        with pytest.raises(CommandRefused, match="already"):
            client.start_recording(name)
    assert (folder / "taken.h5").read_text() == "mine"
    assert not (tmp_path / "elsewhere.h5").exists()


def test_one_recording_at_a_time(
    service: Service, client: ControlClient, listener: Listener
) -> None:
    with pytest.raises(CommandRefused, match="Nothing is being recorded"):
        client.stop_recording()
    started(client, "first")
    scan(service, listener)
    until(lambda: client.status()["recording"]["files"] == ["first.h5"])
    for name in ("second", "first"):  # and not: there is a file of that name
        with pytest.raises(CommandRefused, match=r"first is being recorded already\. Stop it"):
            client.start_recording(name)
    stopped(client)


def test_a_recorder_that_is_killed_is_told_of_and_another_can_be_started(
    service: Service, client: ControlClient, listener: Listener, folder: Path
) -> None:
    started(client, "doomed")
    scan(service, listener)
    until(lambda: client.status()["recording"]["files"] == ["doomed.h5"])
    until(lambda: is_complete(folder / "doomed.h5"))
    (recorder,) = recorders(os.getpid())
    os.kill(recorder.pid, signal.SIGKILL)
    told = listener.wait_for_event("recording_failed").message
    assert "died by signal 9" in told
    assert "what comes now is not recorded" in told
    assert told.endswith(" doomed.h5 is closed and holds what came before.")
    until(lambda: client.status()["recording"]["state"] == "idle")
    assert "died" in client.status()["recording"]["reason"]
    started(client, "next")
    stopped(client)


def test_of_a_recorder_that_is_killed_in_a_scan_it_is_told_how_its_file_opens(
    service: Service, client: ControlClient, listener: Listener
) -> None:
    started(client, "half")
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
        source.send(frames(3))
        until(lambda: client.status()["recording"]["patterns"] == 3)
        (recorder,) = recorders(os.getpid())
        os.kill(recorder.pid, signal.SIGKILL)
        told = listener.wait_for_event("recording_failed").message
    assert "half.h5, which opens as usual after h5clear -s" in told
    until(lambda: client.status()["recording"]["state"] == "idle")


def test_a_file_that_can_be_neither_written_nor_closed_ends_the_recording_with_a_sentence(
    service: Service, client: ControlClient, listener: Listener
) -> None:
    started(client, "broken")
    with sender(service) as source:
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(100, 100))
        source.send(frames(3))
        until(lambda: client.status()["recording"]["patterns"] == 3)
        (recorder,) = recorders(os.getpid())
        recorder.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
        source.send(frames(5000), range(3, 5003))
        told = listener.wait_for_event("recording_failed").message
    assert "a file may have 0 MB here" in told
    assert "broken.h5 could not be closed, and may lack what came last." in told
    until(lambda: client.status()["recording"]["state"] == "idle")
    assert not client.status()["recording"]["complete"]


def test_nothing_is_recorded_where_no_folder_is_configured() -> None:
    with (
        Service(settings()) as service,
        ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
    ):
        assert client.status()["recording"] is None
        with pytest.raises(CommandRefused, match=r"set recording\.directory"):
            client.start_recording()


def test_a_full_disk_or_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for recording, why in (
        ({"directory": tmp_path, "keep_free": "1000TB"}, "Make room"),
        ({"directory": tmp_path / "nowhere"}, "no folder that the service may write to"),
    ):
        with (
            Service(settings(recording=recording)) as service,
            ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
            pytest.raises(CommandRefused, match=why),
        ):
            client.start_recording()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_told_at_once_and_not_first_when_it_is_needed(tmp_path: Path) -> None:
    with Service(settings(recording={"directory": tmp_path / "nowhere"})) as service:
        until(lambda: any("nowhere" in said for said in service.status().recent_events))


def test_a_service_that_stops_closes_the_recording_with_all_that_came(tmp_path: Path) -> None:
    public, secret = generate_keys(tmp_path / "keys")
    key = next(
        line.split('"')[1]
        for line in public.read_text().splitlines()
        if line.strip().startswith("public-key")
    )
    (tmp_path / "data").mkdir()
    encrypted = settings(
        recording={"directory": tmp_path / "data", "keep_free": "64MiB"},
        security={"secret_key_file": secret},
    )
    with (
        Service(encrypted) as service,
        ControlClient(service.endpoints["control"], timeout=TIMEOUT_S, server_key=key) as client,
        sender(service, server_key=key) as source,
    ):
        started(client, "last")
        source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
        source.send(frames(6))
        source.end()
        until(lambda: client.status()["counters"]["received"] == 6)
        service.close()
    with h5py.File(tmp_path / "data" / "last.h5") as file:
        assert file["prenet4d/received"][:].all()
        assert file["prenet4d"].attrs["frames_corrected"] == 6


def test_a_service_that_stops_after_a_scan_does_not_call_its_recording_incomplete(
    tmp_path: Path,
) -> None:
    recording = {"directory": tmp_path, "keep_free": "64MiB"}
    with (
        Service(settings(recording=recording)) as service,
        listening(service) as listener,
        ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
    ):
        started(client, "whole")
        scan(service, listener)
        until(lambda: is_complete(tmp_path / "whole.h5"))
        service.close()
    told = service._publisher.recent_events[-1].message
    assert told.startswith("Recording ended with 6 patterns in 1 file. The service at ")
    assert told.endswith("has stopped.")


def test_a_service_that_is_killed_leaves_a_closed_recording(tmp_path: Path) -> None:
    with (
        RunningService(
            tmp_path,
            corrector={"backend": "identity"},
            ring={"size": "8MiB"},
            lossless={"heartbeat_s": 5.0},
            recording={"directory": str(tmp_path), "keep_free": "64MiB"},
        ) as service,
        FrameSender(service.detector, timeout=TIMEOUT_S) as source,
    ):
        with ControlClient(service.control, timeout=TIMEOUT_S) as client:
            started(client, "orphan")
            source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=(2, 3))
            source.send(frames(3))
            until(lambda: client.status()["recording"]["patterns"] == 3)
        (recorder,) = recorders(service.process.pid)
        service.process.kill()
        service.process.wait()
        psutil.wait_procs([recorder], timeout=TIMEOUT_S)
        assert not recorder.is_running()
        with h5py.File(tmp_path / "orphan.h5") as file:  # closed: it opens without more ado
            assert file["prenet4d/received"][:].sum() == 3
            assert b"connection was lost" in file["prenet4d"].attrs["reason"]
        source._hand_over(within=0.0)  # nobody will take the scan's end


def test_a_recorder_that_reads_no_more_when_it_is_stopped_is_done_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    told_to_stop = tmp_path / "stop"
    dying.write_text(
        f"#!/bin/sh\nexec 0<&-\necho deaf\nuntil [ -e {told_to_stop} ]; do sleep 0.1; done\n"
    )
    dying.chmod(0o755)
    told: list[Event] = []
    recordings = Recordings(
        RecordingSettings(directory=tmp_path),
        lossless="tcp://127.0.0.1:9",
        server_key=None,
        log=LogSettings(),
        tell=told.append,
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(dying))
        recordings.start("deaf")
    until(lambda: recordings.status.state == "recording")
    recordings.stop()
    told_to_stop.touch()
    until(lambda: recordings.status.state == "idle")
    until(lambda: told)
    assert "deaf" in told[-1].message


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="greater"):
        RecordingSettings(keep_free=0)


def test_the_commands_of_the_terminal(service: Service, client: ControlClient) -> None:
    def prenet4d(*arguments: str) -> subprocess.CompletedProcess[str]:
        from sys import executable

        command = [executable, "-m", "prenet4d_server", "recording", *arguments]
        control = ["--control", service.endpoints["control"]]
        return subprocess.run([*command, *control], capture_output=True, text=True, check=False)

    begun = prenet4d("start", "typed")
    assert begun.returncode == 0
    assert "typed" in begun.stdout
    assert client.status()["recording"]["name"] == "typed"
    assert prenet4d("start", "again").returncode == 1
    assert prenet4d("stop").returncode == 0
    until(lambda: client.status()["recording"]["state"] == "idle")
