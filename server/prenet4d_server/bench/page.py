"""What open pages cost the pipeline: its rate with many browsers and with none, in turns.

Each round measures without, with, with and without pages, so that a machine that slowly changes its
pace does so for both alike. A rate follows whatever else the machine does: beside it stands the
processor time of each process, which does not, and what others took of the machine meanwhile.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from prenet4d_server.bench import machine
from prenet4d_server.bench.stream import example_frames
from prenet4d_server.processes import Child, ChildFailed, RunningService

GOAL = 0.95
"""Of the rate that is to be left with all pages open."""
_SETTLE_S = 5.0
"""After the start, and after pages were opened or closed; short measurements settle shorter."""
_OPEN_TIMEOUT_S = 240.0
_TO_SIGMA = 1.4826  # of a Gaussian's median absolute deviation


@dataclass(frozen=True)
class Turn:
    """One measurement."""

    frames_per_second: float
    cores: dict[str, float]
    """Processor time a second: of the processes ``service``, ``ingest`` and ``page``, of the
    ``detector`` and the ``visitors`` that stand for cameras and browsers elsewhere, and of
    ``others`` on this machine."""

    @property
    def cost_ms(self) -> float:
        """Processor time of the service and its ingest for each frame, milliseconds."""
        return 1e3 * (self.cores["service"] + self.cores["ingest"]) / self.frames_per_second


@dataclass
class Report:
    """All turns; those of a round stand at the same place in both lists."""

    pages: int
    about: dict[str, str | float]
    without: list[tuple[Turn, Turn]] = field(default_factory=list)
    with_pages: list[tuple[Turn, Turn]] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Round by round, the share of the rate that is left."""
        return self._ratios(lambda turn: turn.frames_per_second)

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def sigma(self) -> float:
        """One sigma of the median, by the scatter of the rounds; infinite for one round."""
        return _sigma_of_median(self.ratios)

    @property
    def cost_ratio(self) -> float:
        """Processor time for each frame, with pages to without: what the service itself pays."""
        return statistics.median(self._ratios(lambda turn: turn.cost_ms))

    @property
    def verdict(self) -> str:
        """What the rates say about the goal, as far as the machine's noise lets them."""
        if self.ratio - 2 * self.sigma >= GOAL:
            return "met"
        return "missed" if self.ratio + 2 * self.sigma < GOAL else "not decided by this run"

    @property
    def conclusion(self) -> str:
        """What was found, in a sentence."""
        scatter = f" ± {self.sigma:.1%}" if math.isfinite(self.sigma) else " in the only round"
        return (
            f"Left of the rate: {self.ratio:.1%}{scatter} (goal: at least {GOAL:.0%}): "
            f"{self.verdict}."
        )

    def cores(self, name: str, *, pages: bool) -> float:
        """The median of a process' processor time a second."""
        turns = self.with_pages if pages else self.without
        return statistics.median(turn.cores[name] for pair in turns for turn in pair)

    def to_json(self) -> str:
        """Everything, for keeping."""
        sigma = self.sigma if math.isfinite(self.sigma) else None
        summary = {
            "ratio": self.ratio, "sigma": sigma, "ratios": self.ratios, "goal": GOAL,
            "verdict": self.verdict, "cost_ratio": self.cost_ratio,
        }  # fmt: skip
        return json.dumps({**asdict(self), **summary}, indent=2)

    def _ratios(self, of: Callable[[Turn], float]) -> list[float]:
        return [
            sum(map(of, loaded)) / sum(map(of, free))
            for free, loaded in zip(self.without, self.with_pages, strict=True)
        ]


def _sigma_of_median(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    middle = statistics.median(values)
    scatter = _TO_SIGMA * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * scatter / math.sqrt(len(values))  # a median's, of Gaussian errors


def run(
    *,
    pages: int,
    seconds: float,
    rounds: int,
    frame_shape: tuple[int, int],
    backend: str,
    say: Callable[[float, str], None],
) -> Report:
    """Measure in turns, with a detector that sends as fast as frames are taken.

    Args:
        pages: how many are opened.
        seconds: length of each of a round's four measurements.
        rounds: how many.
        frame_shape: ``(h, w)`` in pixels.
        backend: what runs the networks, or ``identity``.
        say: told how far it is, from 0 to 1, and what is going on.

    Raises:
        ChildFailed: a process did not do its work, or no frame came in one of the measurements.
    """
    report = Report(pages, machine.describe())
    with TemporaryDirectory(prefix="prenet4d-bench-") as name:
        folder = Path(name)
        frames = folder / "frames.npy"
        np.save(frames, example_frames(frame_shape))
        with (
            RunningService(folder, corrector={"backend": backend}) as service,
            Child.command(
                "detector",
                *("simulate-detector", "native", "--address", service.detector),
                *("--data", str(frames), "--scan", "256x256", "--repeat", "0"),
                *("--cycle", str(len(np.load(frames, mmap_mode="r")))),
                log=folder / "detector.log",
            ) as detector,
        ):
            meter, settle_s = _Meter(service, detector, seconds), min(_SETTLE_S, seconds)
            meter.wait_for_frames()
            time.sleep(settle_s)
            for number in range(rounds):
                say(number / rounds, "no page open")
                before = meter.turn()
                say((number + 0.25) / rounds, f"{pages} pages open")
                with _visitors(service, pages, folder / f"visitors-{number}.log") as visitors:
                    time.sleep(settle_s)
                    loaded = meter.turn(visitors), meter.turn(visitors)
                say((number + 0.75) / rounds, "no page open")
                time.sleep(settle_s)
                report.with_pages.append(loaded)
                report.without.append((before, meter.turn()))
    say(1.0, "done")
    return report


class _Meter:
    """Measures one turn after the other."""

    def __init__(self, service: RunningService, detector: Child, seconds: float) -> None:
        self._service, self._detector, self._seconds = service, detector, seconds

    def wait_for_frames(self) -> None:
        deadline = time.monotonic() + _OPEN_TIMEOUT_S
        while not self._service.status()["counters"]["corrected"]:
            self._detector.check()
            if time.monotonic() > deadline:
                raise ChildFailed(f"No frame was corrected within {_OPEN_TIMEOUT_S:g} s.")
            time.sleep(0.1)

    def turn(self, visitors: Child | None = None) -> Turn:
        frames, times, began = self._look(visitors)
        time.sleep(self._seconds)
        frames_then, times_then, ended = self._look(visitors)
        if frames_then == frames:
            raise ChildFailed(
                f"No frame was corrected in {self._seconds:g} s: measure for longer (--seconds)."
            )
        over = ended - began
        cores = {name: (times_then[name] - times[name]) / over for name in times}
        cores["others"] = max(0.0, 2 * cores["others"] - sum(cores.values()))
        return Turn((frames_then - frames) / over, cores)

    def _look(self, visitors: Child | None) -> tuple[int, dict[str, float], float]:
        """Frames so far, processor times so far (``others``: of all together), and when."""
        import psutil

        status = self._service.status()
        times = {process["name"]: process["cpu_s"] for process in status["processes"]}
        for name, child in (("detector", self._detector), ("visitors", visitors)):
            used = psutil.Process(child.process.pid).cpu_times() if child else None
            times[name] = used.user + used.system if used else 0.0
        everything = psutil.cpu_times()
        times["others"] = sum(everything) - everything.idle - everything.iowait
        times["others"] -= everything.guest + everything.guest_nice  # they are in user and nice
        return status["counters"]["corrected"], times, time.monotonic()


def _visitors(service: RunningService, pages: int, log: Path) -> Child:
    url = service.http.replace("tcp:", "http:")
    arguments = ("-m", "prenet4d_server.bench.visitors", url, str(pages))
    child = Child("visitors", *arguments, log=log)
    deadline = time.monotonic() + _OPEN_TIMEOUT_S
    while child.last_words() != "ready":
        child.check()
        if time.monotonic() > deadline:
            child.stop(5.0)
            raise ChildFailed(f"{pages} pages did not open within {_OPEN_TIMEOUT_S:g} s.")
        time.sleep(0.1)
    return child
