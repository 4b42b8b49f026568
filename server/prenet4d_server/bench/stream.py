"""How much of the machine's speed reaches the user: bare sockets, then the service, step by step.

All measurements are taken in turns, round by round, in one run on one machine; medians are quoted,
and what counts are their ratios.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from prenet4d_server.bench import bare, machine, peer
from prenet4d_server.processes import Child, ChildFailed, RunningService

_IDENTITY_BATCH = 256
"""Frames in a batch where nothing is corrected: what a corrector as fast as that would be given."""
_PER_MESSAGE = 16
"""Native frames in a message, where they do not come one by one."""
_DISTINCT = 128
"""Frames that are encoded before a stream starts, and then sent in turn."""
_DOSE = 5000.0
_SILENCE_S = 120.0
"""A service that corrects nothing for so long is stuck."""
_MESSAGES = {"one frame a message": 1, f"{_PER_MESSAGE} frames a message": _PER_MESSAGE}
Say = Callable[[float, str], None]


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
        frames: Frames in each run with an identity corrector.
        seconds: Length in seconds of each run with the real corrector.
        rounds: How often everything is measured in turns.
        soak: Frames between the two readings of memory.
        frame_shape: ``(h, w)`` px of all frames, uint16.
        backend: What runs the networks.
        batch: Frames in a batch.
        peer: Python interpreter that has LiberTEM-live; found by its simulator's name otherwise.
    """

    frames: int = 32_768
    seconds: float = 10.0
    rounds: int = 3
    soak: int = 100_000
    frame_shape: tuple[int, int] = (256, 256)
    backend: str = "auto"
    batch: int = 32
    peer: Path | None = None


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and what was."""

    name: str
    reached: float
    wanted: float

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.reached >= self.wanted


@dataclass
class Report:
    """Everything that was measured."""

    machine: dict[str, str | float]
    options: dict[str, Any]
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Frames (or messages) per second, one value a round."""
    latency_ms: dict[str, float] = field(default_factory=dict)
    """``p50`` and ``p99`` from a frame's arrival to its publication at 80 % of the full rate."""
    memory_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """``before`` and ``after`` the soak: resident bytes of each process."""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, options: Options) -> Self:
        """An empty one, of this machine."""
        return cls(machine.describe(), asdict(options))

    def median(self, name: str) -> float:
        """The median rate of one measurement; ``nan`` where it was not made."""
        values = self.rates.get(name)
        return statistics.median(values) if values else float("nan")

    def goals(self) -> list[Goal]:
        """The goals, with what was reached of each that was measured."""
        dectris = self.median("identity, DECTRIS V2")
        goals = [
            *(
                Goal(
                    f"identity on native frames ÷ bare pyzmq, {name}",
                    self.median(f"identity, native, {name}") / self.median(f"bare pyzmq, {name}"),
                    0.8,
                )
                for name in _MESSAGES
            ),
            Goal("DECTRIS V2 frames/s decoded and batched", dectris, 27_000),
            Goal(
                "full service ÷ bare corrector",
                self.median("full service") / self.median("bare corrector"),
                0.95,
            ),
        ]
        if self.options["frame_shape"] == (256, 256):
            goals.append(Goal("bare corrector, frames/s", self.median("bare corrector"), 100))
        if "LiberTEM-live" in self.rates:
            theirs = self.median("LiberTEM-live")
            ratio = self.median("identity, their DECTRIS V1") / theirs
            goals.append(Goal("identity ÷ LiberTEM-live, same DECTRIS V1 stream", ratio, 1.0))
        return [goal for goal in goals if not math.isnan(goal.reached)]

    def to_json(self) -> str:
        """Everything as JSON text."""
        content = asdict(self) | {
            "medians": {name: self.median(name) for name in self.rates},
            "goals": [asdict(goal) | {"met": goal.met} for goal in self.goals()],
        }
        return json.dumps(content, indent=1, default=str)


def run(options: Options, report: Report, say: Say) -> None:
    """Measure everything.

    Args:
        options: how much.
        report: takes each figure as soon as it is there, so that a failure later costs none.
        say: told the share that is done and what is being measured.

    Raises:
        ChildFailed: one of the processes did not do its work.
        NoAnswer: a service fell silent.
    """
    with TemporaryDirectory(prefix="prenet4d-bench-") as folder:
        bench = _Bench(options, report, Path(folder))
        steps: list[tuple[str, Callable[[], None]]] = [
            ("bare pyzmq", bench.bare),
            ("identity, native", bench.native),
            ("identity, DECTRIS V2", bench.dectris),
            ("bare corrector", bench.corrector),
            ("full service", bench.service),
        ]
        python = peer.find_python(options.peer)
        if python is None:
            report.notes.append(
                "LiberTEM-live is not installed here: name an interpreter that has it."
            )
        else:
            report.machine["libertem-live"] = peer.version(python)
            steps.append(("LiberTEM-live's stream", lambda: bench.peer(python)))
        total = options.rounds * len(steps) + 2
        done = 0
        for _ in range(options.rounds):
            for name, step in steps:
                say(done / total, name)
                step()
                done += 1
        say(done / total, "latency")
        bench.latency()
        say((done + 1) / total, "memory")
        bench.memory()


class _Bench:
    """The single measurements; each adds to the report."""

    def __init__(self, options: Options, report: Report, folder: Path) -> None:
        self.options, self.report, self.folder = options, report, folder
        self._frames = example_frames(options.frame_shape)
        self._file = folder / "frames.npy"
        np.save(self._file, self._frames)

    def bare(self) -> None:
        log = self.folder / "bare.log"
        for name, together in _MESSAGES.items():
            messages = self.options.frames // together
            rate = bare.frames_per_second(self._file, together, messages, log)
            self._add(f"bare pyzmq, {name}", rate)

    def native(self) -> None:
        for name, together in _MESSAGES.items():
            with self._service("native", "identity") as service:
                more = ("--frames-per-message", str(together))
                rate = self._stream(service, "native", self.options.frames, *more)
                self._add(f"identity, native, {name}", rate)

    def dectris(self) -> None:
        with self._service("dectris2", "identity") as service:
            rate = self._stream(service, "dectris2", self.options.frames)
            self._add("identity, DECTRIS V2", rate)

    def corrector(self) -> None:
        result = self.folder / "corrector.json"
        arguments = (str(self._file), self.options.backend, str(self.options.batch))
        with Child(
            "corrector",
            *("-m", "prenet4d_server.bench.corrector", *arguments),
            *(str(self.options.seconds), str(result)),
            log=self.folder / "corrector.log",
        ) as child:
            child.wait(timeout=120 + 5 * self.options.seconds)
        self._add("bare corrector", float(json.loads(result.read_text())))

    def service(self) -> None:
        frames = self._frames_for_seconds()
        with self._service("dectris2", self.options.backend) as service:
            self._stream(service, "dectris2", 4 * self.options.batch)
            self._add("full service", self._stream(service, "dectris2", frames))

    def peer(self, python: Path) -> None:
        dump = self.folder / "frames.dump"
        side = int(self.options.frames**0.5)
        scan = (side, side)
        if not dump.exists():
            peer.write_dump(dump, self._frames, side * side)
        log = self.folder / "their-simulator.log"
        log.unlink(missing_ok=True)
        with peer.Simulator(python, dump, log) as simulator:
            address = f"tcp://127.0.0.1:{simulator.stream}"
            with self._service("dectris1", "identity", address=address) as service:
                for _ in range(2):
                    with self._timed(service, side * side) as ours:
                        simulator.arm()
        self._add("identity, their DECTRIS V1", ours[0])
        height = self.options.frame_shape[0]
        try:
            theirs = peer.frames_per_second(python, dump, scan, height, 3, self.folder)
        except ChildFailed as error:  # theirs to mend: what we measured of our own stays
            self.report.notes.append(str(error))
            return
        # Their first run starts workers and compiles.
        self._add("LiberTEM-live", statistics.median(theirs[1:]))

    def latency(self) -> None:
        rate = 0.8 * self.report.median("full service")
        with self._service("dectris2", self.options.backend) as service:
            self._stream(service, "dectris2", 4 * self.options.batch)
            frames = max(8 * self.options.batch, int(rate * self.options.seconds))
            self._stream(service, "dectris2", frames, rate=rate)
            total = service.status()["latency"]["total"]
        self.report.latency_ms = {**total, "at_frames_per_second": rate}

    def memory(self) -> None:
        with self._service("dectris2", "identity") as service:
            self._stream(service, "dectris2", max(self.options.frames, 64))
            before = service.resident_bytes()
            self._stream(service, "dectris2", self.options.soak)
            self.report.memory_bytes = {"before": before, "after": service.resident_bytes()}

    def _frames_for_seconds(self) -> int:
        rate = self.report.median("bare corrector")
        return max(4 * self.options.batch, int(rate * self.options.seconds))

    def _add(self, name: str, rate: float) -> None:
        self.report.rates.setdefault(name, []).append(rate)

    def _service(self, kind: str, backend: str, address: str | None = None) -> RunningService:
        source: dict[str, Any] = {"kind": kind}
        if address is not None:
            source["address"] = address
        return RunningService(
            self.folder,
            source=source,
            corrector={"backend": backend},
            batch={"size": _IDENTITY_BATCH if backend == "identity" else self.options.batch},
            log={"level": "warning"},
        )

    def _stream(
        self, service: RunningService, kind: str, frames: int, *options: str, rate: float = 0.0
    ) -> float:
        """Send so many frames from a simulated detector; frames per second through the service."""
        with (
            self._timed(service, frames) as result,
            Child.command(
                "detector",
                *("simulate-detector", kind, "--address", service.detector),
                *("--data", str(self._file), "--scan", f"1x{frames}"),
                *("--rate", str(rate), "--cycle", str(_DISTINCT), *options),
                log=self.folder / "detector.log",
            ) as detector,
        ):
            progress = _Progress(service)
            while detector.process.poll() is None:
                progress.check()
                with suppress(subprocess.TimeoutExpired):
                    detector.process.wait(_SILENCE_S)
            detector.check()
        return result[0]

    @contextmanager
    def _timed(self, service: RunningService, frames: int) -> Iterator[list[float]]:
        """Time one acquisition by the service's own clock, and see that nothing was lost."""
        from prenet4d_client import Subscriber
        from prenet4d_client.errors import NoAnswer

        result: list[float] = []
        progress = _Progress(service)
        # No telemetry: that of a long stream would fill the queue, and its end be lost.
        topics = ("acquisition_start", "acquisition_end")
        with Subscriber(service.stream, topics=topics, timeout=_SILENCE_S) as stream:
            time.sleep(0.2)  # subscriptions travel to the service
            yield result
            start = None
            while not result:
                try:
                    message = stream.receive()
                except NoAnswer:  # much may wait in the ring for a slow corrector
                    progress.check()
                    continue
                if message.type == "acquisition_start":
                    start = message
                elif start is not None:
                    counters = message.counters
                    if counters is None or counters.corrected != frames:
                        raise ChildFailed(
                            f"{frames} frames were sent; the service says {counters}."
                        )
                    result.append(frames / (message.time - start.time))


class _Progress:
    """Sees that a service corrects more from one check to the next, however long it has to."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self._corrected = -1

    def check(self) -> None:
        """Compare with the last time; raises ChildFailed where nothing was corrected since."""
        self._service.check()
        before, self._corrected = self._corrected, self._service.status()["counters"]["corrected"]
        if self._corrected == before:
            raise ChildFailed(
                f"The service has corrected nothing for {_SILENCE_S:g} s: "
                f"{self._service.last_words()}"
            )


def example_frames(frame_shape: tuple[int, int], count: int = _DISTINCT) -> Any:
    """Disks on a halo at a low dose: (count, h, w) uint16, the same at every call."""
    h, w = frame_shape
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:h, :w].astype(np.float32)
    frames = np.empty((count, h, w), np.uint16)
    for frame in frames:
        cy, cx = (h - 1) / 2 + rng.normal(0, 2), (w - 1) / 2 + rng.normal(0, 2)
        expected = 0.0005 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (0.25 * h) ** 2))
        expected += (y - cy) ** 2 + (x - cx) ** 2 < (0.08 * h) ** 2
        for angle in np.pi / 3 * np.arange(6) + 0.2:
            dy, dx = 0.3 * h * np.sin(angle), 0.3 * h * np.cos(angle)
            expected += 0.08 * ((y - cy - dy) ** 2 + (x - cx - dx) ** 2 < (0.08 * h) ** 2)
        frame[:] = rng.poisson(expected * (_DOSE / expected.sum()))
    return frames
