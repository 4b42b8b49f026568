"""Every example of the README runs, as a program of its own, against a service on real sockets."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zmq

from prenet4d_client import decode, encode
from prenet4d_client.messages import AcquisitionEnd, ControlReply, Registered

from .conftest import PATIENCE_S
from .examples import EXAMPLES

README = (Path(__file__).parents[2] / "client" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# What each example prints, and whether it ends by itself.
EXPECTED = {
    'topics="corrected"': ("[4 5 9] (3, 8, 9)", False),
    '("telemetry", "event")': ("warning Frame 3 has NaN counts.", False),
    "asyncio": ("812.5 12", False),
    "ScanMaps": ("11 (4, 6)", False),
    "FrameSender": ("", True),
    "LosslessReceiver": ("[4 5 9] (3, 8, 9)", True),
    "ControlClient": ("{'state': 'locked'}", True),
}


class SmallService:
    """Publishes the examples again and again, takes frames, registers receivers, obeys commands."""

    def __init__(self, bind):
        self.ingest, self.stream = bind(zmq.PULL), bind(zmq.XPUB)
        self.lossless, self.control = bind(zmq.ROUTER), bind(zmq.ROUTER)
        self.frames = 0
        self.all_came = threading.Event()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def addresses(self):
        ports = {
            5560: self.ingest, 5561: self.stream, 5562: self.lossless, 5563: self.control,
        }  # fmt: skip
        return {f"tcp://127.0.0.1:{port}": bound.address for port, bound in ports.items()}

    def _run(self):
        while not self.stopping.wait(0.02):
            for kind in ("telemetry", "corrected", "event"):
                self.stream.socket.send_multipart(encode(*EXAMPLES[kind]))
            while self.ingest.socket.poll(0):
                message = decode(self.ingest.socket.recv_multipart())
                if message.type == "frames":
                    self.frames += len(message.indices)
                elif message.type == "acquisition_end" and message.header.frames == self.frames:
                    self.all_came.set()
            while self.control.socket.poll(0):
                self._answer(self.control.socket, ControlReply(ok=True, result={"state": "locked"}))
            while self.lossless.socket.poll(0):
                self._answer(self.lossless.socket, Registered(heartbeat_s=PATIENCE_S))

    def _answer(self, socket, header):
        identity, *parts = socket.recv_multipart()
        request = decode(parts)
        if request.type == "control_request":
            arrays = {}
            if request.command == "maps":
                whole = EXAMPLES["maps"][0].model_copy(update={"region": (0, 0, 4, 6)})
                header = ControlReply(ok=True, result=whole.model_dump())
                arrays = {"values": np.zeros((2, 4, 6), np.float32)}
            header = header.model_copy(update={"sequence": request.sequence})
            socket.send_multipart([identity, *encode(header, arrays)])
        elif request.type == "register":
            for answer in ((header,), EXAMPLES["corrected"], (AcquisitionEnd(),)):
                socket.send_multipart([identity, *encode(*answer)])

    def close(self):
        self.stopping.set()
        self.thread.join()


@pytest.fixture
def service(bind):
    service = SmallService(bind)
    yield service
    service.close()


def test_every_example_is_known():
    assert len(BLOCKS) == len(EXPECTED)
    assert all(sum(key in block for block in BLOCKS) >= 1 for key in EXPECTED)


@pytest.mark.parametrize("key", ['topics="corrected"', "ScanMaps"])
def test_it_takes_five_lines(key):
    code = next(block for block in BLOCKS if key in block)
    assert len([line for line in code.splitlines() if line]) <= 5


@pytest.mark.parametrize("key", EXPECTED)
def test_example(service, key, tmp_path):
    says, ends = EXPECTED[key]
    code = next(block for block in BLOCKS if key in block)
    # An address that the example leaves to its default is a port that may be in use here.
    code = code.replace("Subscriber(topics", 'Subscriber("tcp://127.0.0.1:5561", topics')
    for default, address in service.addresses().items():
        code = code.replace(default, address)
    program = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    with program:
        if ends:
            printed, _ = program.communicate()
            assert program.returncode == 0
            assert says in printed
        else:
            assert any(line.strip() == says for line in program.stdout)
            program.terminate()
    if key == "FrameSender":
        assert service.all_came.wait(PATIENCE_S)
    if key == "ControlClient":
        assert (tmp_path / "calibration.json").read_text() == '{"state": "locked"}'
