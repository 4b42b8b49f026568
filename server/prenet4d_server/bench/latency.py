"""How long a frame takes through the whole service, at several shares of its full rate.

A simulated DECTRIS V2 detector streams to a service, first as fast as it is taken, then at a steady
rate. The service itself tells, for each frame, the time from its arrival to its publication.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from prenet4d_client import Subscriber
from prenet4d_server.bench import machine
from prenet4d_server.bench.stream import example_frames
from prenet4d_server.monitoring.meters import WINDOW
from prenet4d_server.processes import Child, ChildFailed, RunningService

LOADS = (0.5, 0.8, 0.95)
_SILENCE_S = 120.0
_QUEUE = 1 << 16
"""Messages that may wait for us: none is to be missed."""
Say = Callable[[float, str], None]


@dataclass(frozen=True)
class Measured:
    """One steady stream.

    Attributes:
        load: Share of the full rate that was sent.
        sent: Frames per second that were sent.
        arrived: Frames per second from the start of the acquisition to its end.
        p50: Milliseconds from a frame's arrival to its publication; the median.
        p99: The same for the 99th percentile: the median over the stream's windows.
        worst_p99: The same for the worst window.
    """

    load: float
    sent: float
    arrived: float
    p50: float
    p99: float
    worst_p99: float


@dataclass
class Report:
    """Everything that was measured."""

    machine: dict[str, str | float]
    engine: str
    """What corrected, in the service's words."""
    frame_shape: tuple[int, int]
    batch: int
    full_rate: float = 0.0
    """Frames per second, sent as fast as they are taken."""
    loads: list[Measured] = field(default_factory=list)

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(asdict(self), indent=1)


def run(
    *,
    backend: str,
    frame_shape: tuple[int, int],
    batch: int,
    max_delay_ms: float,
    seconds: float,
    loads: Sequence[float] = LOADS,
    say: Say,
) -> Report:
    """Measure the full rate, then the latency at shares of it.

    Args:
        backend: what runs the networks.
        frame_shape: ``(h, w)`` px, uint16.
        batch: frames in a full batch.
        max_delay_ms: how long a batch may wait to be full.
        seconds: length of each stream.
        loads: shares of the full rate.
        say: told the share that is done and what is being measured.

    Raises:
        ChildFailed: a process did not do its work, or a frame was lost.
    """
    with TemporaryDirectory(prefix="prenet4d-bench-") as name:
        folder = Path(name)
        np.save(folder / "frames.npy", example_frames(frame_shape))
        with RunningService(
            folder,
            source={"kind": "dectris2"},
            corrector={"backend": backend},
            batch={"size": batch, "max_delay_ms": max_delay_ms},
            stream={"high_water": _QUEUE},
            log={"level": "warning"},
        ) as service:
            engine = str(service.status()["engine"])
            report = Report(machine.describe(), engine, frame_shape, batch)
            topics = ("acquisition_start", "acquisition_end", "telemetry")
            with Subscriber(service.stream, topics, timeout=_SILENCE_S, queue=_QUEUE) as listener:
                stream = _Stream(service, listener, folder)
                say(0.0, "the full rate")
                stream.send(8 * batch)
                guess, _ = stream.send(8 * batch)
                # batches that are not full: on a GPU, each size is set up when it first comes
                stream.send(max(8 * batch, int(guess * min(seconds, 5.0) / 2)), guess / 2)
                report.full_rate, _ = stream.send(max(8 * batch, int(guess * seconds)))
                for number, load in enumerate(loads):
                    rate = load * report.full_rate
                    say((number + 1) / (len(loads) + 1), f"{load:.0%} of {report.full_rate:,.0f}/s")
                    # The service looks back so many frames: those of the stream before are to go.
                    arrived, windows = stream.send(WINDOW + max(batch, int(rate * seconds)), rate)
                    p50, p99 = np.median(windows, axis=0).tolist()
                    worst = float(windows[:, 1].max())
                    report.loads.append(Measured(load, rate, arrived, p50, p99, worst))
    return report


class _Stream:
    """A detector that sends one acquisition after the other, and who listens to the service."""

    def __init__(self, service: RunningService, listener: Subscriber, folder: Path) -> None:
        self._service, self._listener, self._folder = service, listener, folder

    def send(self, frames: int, rate: float = 0.0) -> tuple[float, npt.NDArray[np.float64]]:
        """Send one acquisition; 0 frames per second: as fast as they are taken.

        Returns:
            Frames per second that came through, and (k, 2) what the service said of its latencies
            while it looked back at frames of this acquisition alone: p50 and p99, milliseconds.
        """
        with Child.command(
            "detector",
            *("simulate-detector", "dectris2", "--address", self._service.detector),
            *("--data", str(self._folder / "frames.npy"), "--scan", f"1x{frames}"),
            *("--rate", str(rate), "--cycle", "128"),
            log=self._folder / "detector.log",
        ):
            return self._listen(frames)

    def _listen(self, frames: int) -> tuple[float, npt.NDArray[np.float64]]:
        started, seen = math.nan, 0
        windows: list[tuple[float, float]] = []
        for message in self._listener:
            if message.type == "acquisition_start":
                started = message.time
            elif message.type == "telemetry":
                seen += len(message.indices)
                if seen > WINDOW:
                    total = message.latency.total
                    windows.append((total.p50, total.p99))
            else:
                if message.counters.corrected != frames:
                    raise ChildFailed(
                        f"{frames} frames were sent; the service says {message.counters}."
                    )
                return frames / (message.time - started), np.array(windows)
        raise ChildFailed("The service's stream ended.")
