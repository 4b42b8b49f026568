"""Stream V1 from a detector simulator that is not ours: LiberTEM-live's.

Runs where its command is on PATH (``pip install "libertem-live[sim]"``, an environment of its own
is fine), and is skipped elsewhere: it is a large installation that nothing else here needs.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import lz4.block
import numpy as np
import pytest

from prenet4d_server.sources.dectris_v1 import DectrisV1Source

from .detector import WAIT_S, bslz4, poll_to_end, read

COMMAND = shutil.which("libertem-live-dectris-sim")
SHAPE = (48, 80)
FRAMES = 200

pytestmark = pytest.mark.skipif(
    COMMAND is None, reason="libertem-live-dectris-sim (LiberTEM-live's simulator) is not on PATH"
)


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(2, SHAPE).astype(np.uint16)


def messages(encoding: str) -> Iterator[bytes]:
    """What the simulator replays: every message of a series, one after the other."""
    yield json.dumps({"htype": "dheader-1.0", "header_detail": "basic", "series": 34}).encode()
    config = {
        "auto_summation": True,
        "bit_depth_image": 16,
        "bit_depth_readout": 16,
        "count_time": 1e-4,
        "description": "foreign",
        "frame_time": 1e-4,
        "nimages": 1,
        "ntrigger": FRAMES,
        "trigger_mode": "exte",
        "x_pixels_in_detector": SHAPE[1],
        "y_pixels_in_detector": SHAPE[0],
    }
    yield json.dumps(config).encode()
    for number in range(FRAMES):
        pixels = frame(number)
        blob = {
            "bs16-lz4<": lambda pixels=pixels: bslz4(pixels),
            "lz4<": lambda pixels=pixels: lz4.block.compress(pixels.tobytes(), store_size=False),
        }[encoding]()
        head = {"htype": "dimage-1.0", "series": 34, "frame": number, "hash": ""}
        description = {
            "htype": "dimage_d-1.0",
            "shape": [SHAPE[1], SHAPE[0]],
            "type": "uint16",
            "encoding": encoding,
            "size": len(blob),
        }
        times = {"htype": "dconfig-1.0", "start_time": 0, "stop_time": 1, "real_time": 1}
        yield from (json.dumps(head).encode(), json.dumps(description).encode(), blob)
        yield json.dumps(times).encode()
    yield json.dumps({"htype": "dseries_end-1.0", "series": 34}).encode()


def put(port: int, path: str, value: str) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}",
        data=json.dumps({"value": value}).encode(),
        method="PUT",
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=WAIT_S).close()


@pytest.fixture
def simulator(request, tmp_path: Path) -> Iterator[tuple[str, int]]:
    dump, log = tmp_path / "dump", tmp_path / "log"
    with dump.open("wb") as file:
        for message in messages(request.param):
            file.write(struct.pack("<q", len(message)) + message)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(COMMAND), str(dump), "--port", "0", "--zmqport", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            said = log.read_text()
            stream = re.search(r"listening on (tcp://\S+)", said)
            server = re.search(r"API server listening on \('[^']+', (\d+)\)", said)
            if stream and server:
                break
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield stream[1], int(server[1])
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize("simulator", ["bs16-lz4<", "lz4<"], indirect=True)
def test_every_frame_of_a_foreign_detector_arrives(simulator):
    address, port = simulator
    with DectrisV1Source(address) as source:
        put(port, "stream/api/1.8.0/config/mode", "enabled")
        put(port, "stream/api/1.8.0/config/header_detail", "basic")
        put(port, "detector/api/1.8.0/command/arm", "")
        series = read(poll_to_end(source))
    assert series.start.frame_shape == SHAPE
    assert series.start.expected_frames == FRAMES
    assert series.start.detector == "foreign"
    assert not series.faults
    assert not series.failures
    assert sorted(series.frames) == list(range(FRAMES))
    for number, pixels in series.frames.items():
        np.testing.assert_array_equal(pixels, frame(number))
