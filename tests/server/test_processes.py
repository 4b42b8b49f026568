"""Processes that are started are also ended, and say what went wrong."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from prenet4d_server.processes import Child, ChildFailed, free_addresses

from .live import until


def test_failure_is_told_with_the_last_words(tmp_path):
    script = "import sys; print('first', file=sys.stderr); sys.exit('no camera')"
    with (
        Child("detector", "-c", script, log=tmp_path / "log") as child,
        pytest.raises(ChildFailed, match="The detector ended with status 1: no camera"),
    ):
        child.wait(timeout=20)


def test_a_child_that_does_not_end_is_ended(tmp_path):
    stubborn = tmp_path / "stubborn"
    script = "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    script += "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
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
        "sleep = 'import time; time.sleep(60)'\n"
        "child = Child('sleeper', '-c', sleep, log=Path(sys.argv[1]))\n"
        "print(child.process.pid, flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_addresses_are_all_different():
    addresses = free_addresses(5)
    assert len(set(addresses)) == 5
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
