"""The demo's course: four processes, one scan, then the reckoning.

The detector's process and this one draw the same scan from the same seed; what passes between them
passes through the service alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prenet4d_server.demo.picture import Scene, draw
from prenet4d_server.demo.recording import read
from prenet4d_server.demo.score import (
    CENTER_OF_MASS,
    TRACKED,
    Array,
    Deviation,
    Score,
    Truth,
    deviation,
)
from prenet4d_server.errors import FileError
from prenet4d_server.feeds import Drawing, read_expectations
from prenet4d_server.processes import Child, RunningService

if TYPE_CHECKING:
    from prenet4d_engines.geometry import Ellipticity
    from prenet4d_engines.simulate import Scan

RECORDING, PICTURE = "scan.h5", "demo.png"
_PROCESSES = ("service", "watcher", "recorder", "detector")
_MOST_PIXELS = 110_000_000
"""In the whole scan: what the picture is made from has to fit in memory."""
_LEAST_SIDE, _MOST_SIDE = 20, 48
"""Of the scan: enough patterns to calibrate on, and no more than a picture needs."""
_SHARE_OF_RATE = 0.6
"""The detector's rate, as a share of what the corrector can do alone: others need the cores too."""
_STREAM_S = 45.0
"""The scan is made smaller where it would take longer than this."""
_LOW_DOSE = 1000 / 128**2
"""Electrons a pixel."""
_DRIFT = 5 / 128
"""Over the scan, as a share of the frame."""
_HIGH_DOSE = 1e6
_INTRINSIC_PATTERNS = 64
Say = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """What to show.

    Attributes:
        folder: Takes the recording, the picture and the logs; those of an earlier demo go.
        drawing: The scan; sizes that it leaves open are chosen to end within two minutes.
        data: Measured patterns to draw the scan from; ``None`` simulates a sample.
        rate: Frames per second; ``None`` measures what suits this machine.
    """

    folder: Path
    drawing: Drawing
    data: Path | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What the demo leaves behind."""

    score: Score
    picture: Path
    recording: Path
    intrinsic: Ellipticity | None
    """Measured patterns' own ellipticity, estimated at a high dose; it is part of the truth."""


def run(demo: Demo, say: Say) -> Outcome:
    """Run the demo; takes about a minute.

    Args:
        demo: what to show.
        say: told in a sentence what happens.

    Raises:
        ChildFailed: a process did not do its work.
        FileError: the data cannot be read, or files would be lost that no demo has made.
        EngineError: no scan can be drawn like that.
    """
    measured = None if demo.data is None else read_expectations(demo.data)
    _clear(demo.folder, demo.data)
    intrinsic = None
    if measured is not None:
        say("Estimating the measured patterns' own ellipticity, once, at a high dose.")
        intrinsic = own_ellipticity(measured)
    demo = replace(demo, drawing=_with_defaults(demo.drawing, measured))
    rate = demo.rate or _fitting_rate(demo.drawing, measured, say)
    drawing = _sized(demo.drawing, measured, rate)
    scan = drawing.draw(measured)
    ny, nx = scan.scan_shape
    say(f"Streaming {ny} × {nx} frames of {scan.frame_shape[0]} × {scan.frame_shape[1]} pixels.")
    counters = _stream(demo, drawing, scan, rate)
    say("Holding what was found against what is true.")
    return _reckon(demo, scan, intrinsic, counters)


def _clear(folder: Path, data: Path | None) -> None:
    """Make room for what the demo leaves behind, where nothing but an earlier demo's is lost.

    Raises:
        FileError: something else is in the way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{process}.log" for process in _PROCESSES]
    files = [file for file in (folder / RECORDING, folder / PICTURE, *logs) if file.exists()]
    if data is not None and any(file.samefile(data) for file in files):
        raise FileError(f"{data} would be lost to the demo's own files: name another --out.")
    if files and not logs[0].exists():
        raise FileError(
            f"{files[0]} is in the way, and is none of an earlier demo's: name another --out."
        )
    for file in files:
        file.unlink()


def _stream(demo: Demo, drawing: Drawing, scan: Scan, rate: float) -> dict[str, int]:
    """Run the four processes until the recorder has the scan; return the service's counters."""
    folder, frames = demo.folder, len(scan)
    source = {"kind": "dectris2", "scan_shape": list(scan.scan_shape)}
    with RunningService(folder, source=source) as service:
        watcher = Child.command(
            "watcher", "watch", "--plain", "--stream", service.stream,
            log=folder / "watcher.log", show=True,
        )  # fmt: skip
        recorder = Child.command(
            "recorder", "record", str(folder / RECORDING), "--lossless", service.lossless,
            "--content", "both", "--acquisitions", "1", "--fill", "nan",
            log=folder / "recorder.log",
        )  # fmt: skip
        with watcher, recorder:
            service.wait_for_receivers(1)
            with Child.command(
                "detector",
                *("simulate-detector", "dectris2", "--address", service.detector),
                *("--rate", str(rate), *_flags(demo.data, drawing)),
                log=folder / "detector.log",
            ) as detector:
                detector.wait(timeout=60 + 3 * frames / rate)
            recorder.wait(timeout=60 + 3 * frames / rate)
            time.sleep(0.2)  # the watcher's last line
            return dict(service.status()["counters"])


def _flags(data: Path | None, drawing: Drawing) -> list[str]:
    """The drawing as ``simulate-detector`` is told it."""
    ratio, theta = drawing.ellipticity or (1.0, 0.0)
    scan_shape, frame_shape = drawing.scan_shape, drawing.frame_shape
    simulated = {
        "--frame": frame_shape and f"{frame_shape[0]}x{frame_shape[1]}",
        "--content": drawing.kind,
    }
    said: dict[str, object] = {
        "--data": data,
        "--scan": scan_shape and f"{scan_shape[0]}x{scan_shape[1]}",
        **(simulated if data is None else {}),
        "--dose": drawing.dose,
        "--ellipticity": f"{ratio!r},{math.degrees(theta)!r}",
        "--drift": drawing.drift,
        "--seed": drawing.seed,
    }
    return [
        str(part) for flag, value in said.items() if value is not None for part in (flag, value)
    ]


def _fitting_rate(drawing: Drawing, measured: Array | None, say: Say) -> float:
    """Measure what the corrector can do here, and leave room for the other processes."""
    from prenet4d_server.bench.corrector import batch_seconds

    frames = replace(drawing, scan_shape=(4, 4)).draw(measured).frames()
    # The best of them: what else runs on the machine comes and goes.
    alone = len(frames) / min(batch_seconds(frames, "auto", len(frames), seconds=2.0))
    rate = max(1.0, _SHARE_OF_RATE * alone)
    say(
        f"The corrector alone manages {alone:,.0f} frames/s here; "
        f"the detector will send {rate:,.0f} frames/s."
    )
    return rate


def _with_defaults(drawing: Drawing, measured: Array | None) -> Drawing:
    """A low dose and a visible drift for frames of any size, where nobody asks for others."""
    h, w = _frame_shape(drawing, measured)
    return replace(
        drawing,
        dose=round(_LOW_DOSE * h * w) if drawing.dose is None else drawing.dose,
        drift=_DRIFT * min(h, w) if drawing.drift is None else drawing.drift,
    )


def _frame_shape(drawing: Drawing, measured: Array | None) -> tuple[int, int]:
    h, w = measured.shape[1:] if measured is not None else drawing.frame_shape or (128, 128)
    return h, w


def _sized(drawing: Drawing, measured: Array | None, rate: float) -> Drawing:
    """Choose the scan's size where it is left open."""
    if drawing.scan_shape is not None:
        return drawing
    h, w = _frame_shape(drawing, measured)
    most = min(_MOST_PIXELS / (h * w), rate * _STREAM_S)
    side = int(np.clip(4 * (most**0.5 // 4), _LEAST_SIDE, _MOST_SIDE))
    return replace(drawing, scan_shape=(side, side))


def own_ellipticity(measured: Array) -> Ellipticity:
    """The ellipticity that measured patterns have of themselves.

    Args:
        measured: (k, h, w) patterns of many counts.

    Returns:
        What the corrector finds in a still scan of them at 10⁶ electrons a pattern.
    """
    from prenet4d_engines.config import CorrectorConfig
    from prenet4d_engines.corrector import Corrector

    n = _INTRINSIC_PATTERNS
    still = Drawing(scan_shape=(1, n), dose=_HIGH_DOSE, drift=0.0).draw(measured)
    config = CorrectorConfig(ellipse_every=n // 4, patterns_to_lock=n)
    corrector = Corrector(still.frame_shape, config=config)
    for start in range(0, n, 16):
        corrector.process(still.frames(start, start + 16), np.arange(start, start + 16))
    return corrector.calibration().ellipticity


def _reckon(
    demo: Demo, scan: Scan, intrinsic: Ellipticity | None, counters: dict[str, int]
) -> Outcome:
    from prenet4d_engines.geometry import Ellipticity

    recording = read(demo.folder / RECORDING, counters)
    drawn = Ellipticity(*scan.ellipticity)
    total = drawn if intrinsic is None else drawn.compose(intrinsic)
    truth = Truth(
        scan_shape=scan.scan_shape,
        centers=scan.centers,
        groups=None if intrinsic is None else scan.grains,
        ratio=total.ratio,
        theta=total.theta,
        dose=float(np.mean([scan.expectation(i).sum() for i in range(0, len(scan), 7)])),
    )
    raw = scan.frames(threads=2)
    score = Score(
        frames=len(scan),
        most_px=min(scan.frame_shape) / 128,
        truth=truth,
        found=recording.found,
        centers={
            TRACKED: deviation(recording.found.tracked, truth),
            "center, each frame alone": deviation(recording.found.center, truth),
            **_rivals(raw, truth),
        },
    )
    picture = demo.folder / PICTURE
    scene = Scene(
        raw=raw,
        aligned=recording.aligned,
        corrected=recording.corrected,
        reference=recording.reference,
        subtitle=_subtitle(demo, truth),
    )
    draw(scene, score, picture)
    return Outcome(score, picture, demo.folder / RECORDING, intrinsic)


def _rivals(raw: Array, truth: Truth) -> dict[str, Deviation]:
    """Centers of mass of the same frames."""
    from prenet4d_engines.evaluate.classical.center import center_of_mass, threshold_center

    counts: Any = raw.astype(np.float64)
    plain = np.array([center_of_mass(frame) for frame in counts])
    bright = np.array([threshold_center(frame, 0.0, 0.5, 1.0) for frame in counts])
    return {
        CENTER_OF_MASS: deviation(plain, truth),
        "center of mass above half": deviation(bright, truth),
    }


def _subtitle(demo: Demo, truth: Truth) -> str:
    what = "simulated sample" if demo.data is None else f"drawn from {demo.data.name}"
    drift = np.ptp(truth.centers, axis=0).max()
    return (
        f"{what}: {truth.dose:,.0f} electrons a pattern, center drifting by {drift:.0f} px, "
        f"ellipticity {truth.ratio:.3f}"
    )
