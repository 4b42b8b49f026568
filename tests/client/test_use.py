"""Uses that no client allows: waits that cannot be, sockets after a fork. Each is told."""

import gc
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import zmq

from prenet4d_client import (
    ControlClient,
    FrameSender,
    InvalidUse,
    LosslessReceiver,
    ScanMaps,
    Subscriber,
    decode,
    encode,
)
from prenet4d_client.messages import Registered

CLIENTS = [
    ControlClient,
    FrameSender,
    partial(LosslessReceiver, name="mine"),
    lambda address, **options: ScanMaps(address, address, **options),
    Subscriber,
]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("timeout", [-1, float("nan"), "5"])
def test_a_timeout_that_is_no_time_is_refused(nobody, client, timeout):
    with pytest.raises(InvalidUse, match="it must be a number of seconds from 0"):
        client(nobody, timeout=timeout)


def test_a_sender_and_an_answer_are_not_waited_for_without_end(nobody):
    for client in (ControlClient, FrameSender):
        with pytest.raises(InvalidUse, match="timeout is None"):
            client(nobody, timeout=None)


def test_an_answer_that_may_take_no_time_is_refused(nobody):
    with pytest.raises(InvalidUse, match="timeout is 0, and no answer comes at once"):
        ControlClient(nobody, timeout=0)


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_a_timeout_may_be_longer_than_zeromq_can_count(bind, timeout):
    pull = bind(zmq.PULL)
    with FrameSender(pull.address, timeout=timeout) as sender:
        sender.start(frame_shape=(8, 9), dtype="uint8")
    assert decode(pull.socket.recv_multipart()).type == "acquisition_start"


@pytest.mark.skipif(sys.platform != "linux", reason="where open files can be counted")
@pytest.mark.parametrize("client", [ControlClient, CLIENTS[3], Subscriber])
def test_who_forgets_to_close_has_nothing_left_open(nobody, client):
    gc.collect()
    open_files = Path("/proc/self/fd")
    before = len([*open_files.iterdir()])
    for _ in range(3):
        client(nobody)
    gc.collect()
    assert len([*open_files.iterdir()]) <= before


FORK = """
import os, sys
from prenet4d_client import *

nobody, router = sys.argv[1:]
receiver = LosslessReceiver(router, name="forked")
stream, control, sender = (each(nobody) for each in (Subscriber, ControlClient, FrameSender))
pid = os.fork()
if pid == 0:
    for call in (
        receiver.receive,
        stream.receive,
        control.status,
        lambda: sender.start(frame_shape=(8, 9), dtype="uint8"),
    ):
        try:
            call()
        except InvalidUse as error:
            print(error, flush=True)
    for each in (receiver, stream, control, sender):
        each.close()
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
receiver.close()
print("closed", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_told_to_make_its_own(bind, nobody):
    router = bind(zmq.ROUTER)
    came = []

    def let_in():
        while "goodbye" not in came:
            identity, *parts = router.socket.recv_multipart()
            came.append(decode(parts).type)
            if came[-1] == "register":
                router.socket.send_multipart([identity, *encode(Registered(heartbeat_s=60))])

    router.socket.rcvtimeo = 60_000
    service = threading.Thread(target=let_in)
    service.start()
    run = subprocess.run(
        [sys.executable, "-c", FORK, nobody, router.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    service.join()
    assert run.returncode == 0, run.stderr
    *told, last = run.stdout.splitlines()
    names = ["LosslessReceiver", "Subscriber", "ControlClient", "FrameSender"]
    assert told == [
        f"This {name} was made before this process was forked from another: make one here."
        for name in names
    ]
    assert last == "closed"  # by the process that made it, which the other did not disturb
    assert came.count("goodbye") == 1
