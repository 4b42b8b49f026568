"""LiberTEM-live beside us, on the same detector stream, in the same run.

It lives in an environment of its own; this package runs ``peer_script.py`` there and talks to its
DECTRIS simulator's REST interface to start the same stream for our service.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from prenet4d_server.processes import Child, ChildFailed
from prenet4d_server.sources.compression import compress

SIMULATOR = "libertem-live-dectris-sim"
_SCRIPT = Path(__file__).with_name("peer_script.py")
_SERIES = 1


def find_python(wanted: Path | None) -> Path | None:
    """The interpreter that has LiberTEM-live: the one named, or the one beside its simulator."""
    if wanted is not None:
        return wanted
    simulator = shutil.which(SIMULATOR)
    if simulator is None:
        return None
    python = Path(simulator).with_name("python")
    return python if python.exists() else None


def version(python: Path) -> str:
    """LiberTEM-live's version in that environment.

    Raises:
        ChildFailed: it is not installed there.
    """
    command = "import importlib.metadata as m; print(m.version('libertem-live'))"
    try:
        answer = subprocess.run(
            [python, "-c", command], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        raise ChildFailed(
            f"{python} has no LiberTEM-live: pip install 'libertem-live[sim]'."
        ) from None
    return answer.stdout.strip()


def write_dump(path: Path, frames: np.ndarray[Any, Any], count: int) -> None:
    """Write a Stream V1 series as LiberTEM's simulator replays it: [int64 length][message] ….

    Args:
        path: the file to write.
        frames: (k, h, w) uint16, sent in turn.
        count: how many frames to send in all; the scan is square where it can be.
    """
    k, h, w = frames.shape
    blobs = [compress(frame, "bslz4") for frame in frames]
    digests = [hashlib.md5(blob, usedforsecurity=False).hexdigest() for blob in blobs]
    configuration = {
        "auto_summation": True,
        "beam_center_x": 0.0,
        "beam_center_y": 0.0,
        "bit_depth_image": 16,
        "bit_depth_readout": 16,
        "compression": "bslz4",
        "count_time": 1e-4,
        "frame_time": 1e-4,
        "description": "prenet4d bench",
        "nimages": 1,
        "ntrigger": count,
        "trigger_mode": "exte",
        "x_pixels_in_detector": w,
        "y_pixels_in_detector": h,
        "software_version": "1.8.0",
        "threshold_energy": 4020.5,
        "sensor_material": "Si",
    }
    with path.open("wb") as file:

        def put(message: bytes | dict[str, Any]) -> None:
            raw = message if isinstance(message, bytes) else json.dumps(message).encode()
            file.write(struct.pack("<q", len(raw)) + raw)

        put({"header_detail": "basic", "htype": "dheader-1.0", "series": _SERIES})
        put(configuration)
        for index in range(count):
            blob = blobs[index % k]
            digest = digests[index % k]
            put({"frame": index, "hash": digest, "htype": "dimage-1.0", "series": _SERIES})
            put(
                {
                    "encoding": "bs16-lz4<",
                    "htype": "dimage_d-1.0",
                    "shape": [w, h],
                    "size": len(blob),
                    "type": "uint16",
                }
            )
            put(blob)
            start = index * 100_000
            times = {"real_time": 100_000, "start_time": start, "stop_time": start + 100_000}
            put({"htype": "dconfig-1.0", **times})
        put({"htype": "dseries_end-1.0", "series": _SERIES})


class Simulator(Child):
    """LiberTEM-live's DECTRIS simulator: a detector that none of us wrote."""

    def __init__(self, python: Path, dump: Path, log: Path) -> None:
        """Start it, and wait until it says where it listens.

        Raises:
            ChildFailed: it does not.
        """
        program = str(python.with_name(SIMULATOR))
        ports = ("--port", "0", "--zmqport", "0")
        super().__init__(
            "LiberTEM-live simulator", program, str(dump), *ports, log=log, python=python
        )
        self.stream, self.rest = self._ports(timeout=60.0)

    def _ports(self, timeout: float) -> tuple[int, int]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            said = self.log.read_text(errors="replace")
            stream = re.search(r"listening on tcp://[^:]+:(\d+)", said)
            rest = re.search(r"API server listening on \('[^']+', (\d+)\)", said)
            if stream and rest:
                return int(stream[1]), int(rest[1])
            time.sleep(0.1)
        raise ChildFailed(f"The {self.name} did not start: {self.last_words()}")

    def arm(self) -> None:
        """Tell it over REST to stream the series once.

        Raises:
            OSError: it does not answer.
        """
        for path, value in (
            ("stream/api/1.8.0/config/mode", "enabled"),
            ("stream/api/1.8.0/config/header_detail", "basic"),
            ("detector/api/1.8.0/command/arm", None),
        ):
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.rest}/{path}",
                data=b"" if value is None else json.dumps({"value": value}).encode(),
                method="PUT",
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read()


def frames_per_second(
    python: Path, dump: Path, scan: tuple[int, int], size: int, runs: int, folder: Path
) -> list[float]:
    """LiberTEM-live's center of mass on that series, on its own simulator: one rate a run.

    Raises:
        ChildFailed: it did not run through.
    """
    result = folder / "peer.json"
    with Simulator(python, dump, folder / "peer-simulator.log") as simulator:
        numbers = (simulator.rest, simulator.stream, *scan, size, runs)
        # Isolated: modules beside the script must not stand in for those of their names.
        arguments = ("-I", str(_SCRIPT), *(str(number) for number in numbers), str(result))
        with Child("LiberTEM-live", *arguments, log=folder / "peer.log", python=python) as child:
            child.wait(timeout=120)
    rates: list[float] = json.loads(result.read_text())
    return rates
