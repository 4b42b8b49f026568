"""What open pages cost the pipeline: its rate with many browsers and with none, in turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from prenet4d_server.bench import machine
from prenet4d_server.bench.stream import example_frames
from prenet4d_server.processes import Child, ChildFailed, RunningService

GOAL = 0.95
"""Of the rate that is to be left with all pages open."""
_WARM_UP_S = 5.0
_OPEN_TIMEOUT_S = 120.0


@dataclass
class Report:
    """Rates in frames per second, round by round."""

    pages: int
    about: dict[str, str | float]
    without: list[float] = field(default_factory=list)
    with_pages: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The share of the rate that is left."""
        return statistics.median(self.with_pages) / statistics.median(self.without)

    def to_json(self) -> str:
        """Everything, for keeping."""
        return json.dumps({**asdict(self), "ratio": self.ratio, "goal": GOAL}, indent=2)


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
        seconds: length of each measurement.
        rounds: how many of each kind.
        frame_shape: ``(h, w)`` in pixels.
        backend: what runs the networks, or ``identity``.
        say: told how far it is, from 0 to 1, and what is going on.

    Raises:
        ChildFailed: a process did not do its work.
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
            ),
        ):
            time.sleep(_WARM_UP_S)
            for number in range(rounds):
                say(number / rounds, "no page open")
                report.without.append(_rate(service, seconds))
                say((number + 0.5) / rounds, f"{pages} pages open")
                with _visitors(service, pages, folder / f"visitors-{number}.log"):
                    report.with_pages.append(_rate(service, seconds))
    say(1.0, "done")
    return report


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


def _rate(service: RunningService, seconds: float) -> float:
    """Frames corrected per second, by the service's own counters."""
    before, began = service.status()["counters"]["corrected"], time.monotonic()
    time.sleep(seconds)
    after, ended = service.status()["counters"]["corrected"], time.monotonic()
    return float(after - before) / (ended - began)
