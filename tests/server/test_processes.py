"""Processes that are started are also ended, and say what went wrong."""

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import zmq

from prenet4d_server.processes import Child, ChildFailed, RunningService, reserved_addresses
from prenet4d_server.sockets import bind

from .live import TIMEOUT_S, until


def test_failure_is_told_with_the_last_words(tmp_path):
    script = "import sys; print('first', file=sys.stderr); sys.exit('no camera')"
    with (
        Child("detector", "-c", script, log=tmp_path / "log") as child,
        pytest.raises(ChildFailed, match="The detector ended with status 1: no camera"),
    ):
        child.wait(timeout=TIMEOUT_S)


def test_a_child_that_does_not_end_is_ended(tmp_path):
    stubborn = tmp_path / "stubborn"
    script = "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    script += "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    with Child("stubborn", "-c", script, str(stubborn), log=tmp_path / "log") as child:
        until(stubborn.exists)
        with pytest.raises(ChildFailed, match=r"did not end within 0.5 s: it said nothing"):
            child.wait(timeout=0.5)
        child.stop(timeout=0.2)
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_children_end_when_their_parent_is_killed(tmp_path, handler):
    script = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from prenet4d_server.processes import Child\n"
        f"signal.signal(signal.SIGINT, signal.{handler})  # ignored: a shell's background\n"
        "sleep = 'import time; time.sleep(600)'\n"
        "child = Child('sleeper', '-c', sleep, log=Path(sys.argv[1]))\n"
        "print(child.process.pid, flush=True)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_reserved_addresses_are_for_who_is_told_of_them_and_nobody_else():
    with reserved_addresses(5) as addresses:
        assert len(set(addresses)) == 5
        for address in addresses:
            assert address.startswith("tcp://127.0.0.1:")
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        for _ in range(2):  # who listened there may do so again
            with zmq.Context() as context, context.socket(zmq.PULL) as ours:
                bind(ours, addresses[0], "address")
                with context.socket(zmq.PUSH) as sender:
                    sender.connect(addresses[0])
                    sender.send(b"frame")
                    assert ours.recv() == b"frame"


def test_a_service_of_ones_own_is_not_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PRENET4D_BATCH__SIZE", "7")
    monkeypatch.setenv("PRENET4D_SOURCE__ADDRESS", "tcp://127.0.0.1:9")
    own = {"corrector": {"backend": "identity"}, "source": {"kind": "dectris2"}}
    with RunningService(tmp_path, **own) as service:
        assert service.status()["source"]["address"] == service.detector


def test_a_service_keeps_its_ports_until_it_is_stopped(tmp_path):
    with RunningService(
        tmp_path, corrector={"backend": "identity"}, source={"kind": "dectris2"}
    ) as service:
        for address in (service.detector, service.http):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", int(address.rpartition(":")[2])))
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(service.detector.rpartition(":")[2])))
