"""The whole evaluation: which sets, which parts, one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from prenet4d_engines import processor
from prenet4d_engines.backends import Backend, select
from prenet4d_engines.errors import SimulationError
from prenet4d_engines.evaluate.center import evaluate_centers
from prenet4d_engines.evaluate.classical import (
    CENTER_METHODS,
    DENOISE_METHODS,
    ELLIPSE_METHODS,
    Method,
)
from prenet4d_engines.evaluate.classical.py4dstem import start_py4dstem
from prenet4d_engines.evaluate.datasets import (
    ODD_SHAPE,
    PatternSet,
    computed_patterns,
    difficult_patterns,
    held_out_patterns,
    measured_patterns,
    mixed_kinds,
    wide_patterns,
)
from prenet4d_engines.evaluate.denoise import evaluate_denoising
from prenet4d_engines.evaluate.ellipse import evaluate_ellipses
from prenet4d_engines.evaluate.networks import Networks
from prenet4d_engines.evaluate.report import Part, Report
from prenet4d_engines.evaluate.run import Progress, Run, within
from prenet4d_engines.evaluate.strain import evaluate_strain
from prenet4d_engines.evaluate.tracking import CLASSICAL, evaluate_tracking

Subject = Literal["denoise", "center", "ellipse", "tracking", "strain"]
SUBJECTS: Final[tuple[Subject, ...]] = get_args(Subject)
_MORE_CENTERS: Final = 4
"""Times as many patterns to find centers in: their mean error hangs on the few wrong beams."""
_Measured = Mapping[str, NDArray[np.float32]]


def evaluate(
    what: Sequence[Subject] = SUBJECTS,
    *,
    quick: bool = False,
    patterns: int | None = None,
    seed: int = 0,
    data: Mapping[str, NDArray[np.generic]] | None = None,
    backend: Backend | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Measure the shipped networks against the truth and against the classical methods.

    Everything comes from held-out materials and seeds that training never uses; the same ``seed``
    gives the same figures (times aside) on the same backend.

    Args:
        what: Parts to evaluate.
        quick: Fewer patterns, 128² frames and two doses: two minutes on one core, not twenty.
        patterns: Patterns per set and dose at 128², four times as many for centers; 256² frames
            get a third. Unset: 96, or 24 when quick.
        seed: 0 is the standard evaluation, whose figures are quoted.
        data: Measured patterns (k, h, w) of many counts by name, to draw semi-real sets from.
        backend: Runs the networks; None takes the best that works here, on one core of a CPU, as
            the classical methods use one.
        on_progress: Told the share done (0 to 1) and what is being done.

    Raises:
        ValueError: ``what`` names no part, or ``patterns`` is less than 6.
        SimulationError: ``data`` cannot serve as an expectation.
        BackendError: No backend runs here.
        EvaluationError: The Python that is named for py4DSTEM does not run it.
    """
    unknown = [subject for subject in what if subject not in SUBJECTS]
    if unknown or not what:
        wrong = f"{', '.join(unknown)} is none" if unknown else "nothing was asked for"
        raise ValueError(f"Evaluate any of {', '.join(SUBJECTS)}; {wrong}.")
    if patterns is None:
        patterns = 24 if quick else 96
    if patterns < 6:
        raise ValueError(f"There must be at least 6 patterns, one of each kind, not {patterns}.")
    start = time.perf_counter()
    parts = list(dict.fromkeys(what))
    if "ellipse" in parts:
        start_py4dstem()
    tell = on_progress or (lambda _share, _what: None)
    networks = Networks(backend or select(threads=1))
    run = Run(
        networks=networks,
        patterns=patterns,
        doses=(1e3, 1e4) if quick else (1e2, 1e3, 1e4, 1e5, 1e6),
        seed=seed,
        sizes=(128,) if quick else (128, 256),
        scans=1 if quick else 6,
        scan_doses=(1e3, 1e4) if quick else (1e2, 1e3, 1e4),
        scan_shape=(12, 16) if quick else (16, 24),
        on_progress=tell,
    )
    measured = {name: _checked(name, patterns) for name, patterns in (data or {}).items()}
    done: dict[str, Part] = {}
    with _one_thread():
        for number, subject in enumerate(parts):
            of_part = within(run, number / len(parts), 1 / len(parts))
            done[subject] = _EVALUATE[subject](of_part, measured)
    tell(1.0, "done")

    methods = list(dict.fromkeys(method for subject in parts for method in _METHODS[subject]))
    return Report(
        parts=done,
        missing=tuple(method.missing for method in methods if not method.installed),
        sources={method.name: method.source for method in methods},
        about={
            "prenet4d": version("prenet4d"),
            "torch": version("torch"),
            "seed": seed,
            "patterns": patterns,
            "processor": processor.name(),
            "backend": networks.backend.description,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


_EVALUATE: Final[dict[Subject, Callable[[Run, _Measured], Part]]] = {
    "denoise": lambda run, measured: evaluate_denoising(run, _sets(run, measured, run.patterns)),
    "center": lambda run, measured: evaluate_centers(
        run,
        [
            *_sets(run, measured, _MORE_CENTERS * run.patterns),
            _odd_frames(run, _MORE_CENTERS * run.patterns // 3),
        ],
    ),
    "ellipse": lambda run, _measured: evaluate_ellipses(run),
    "tracking": lambda run, _measured: evaluate_tracking(run),
    "strain": lambda run, _measured: evaluate_strain(run),
}

_METHODS: Final[dict[Subject, tuple[Method[Any], ...]]] = {
    "denoise": DENOISE_METHODS,
    "center": CENTER_METHODS,
    "ellipse": ELLIPSE_METHODS,
    "tracking": tuple(method for method in CENTER_METHODS if method.name == CLASSICAL),
    "strain": DENOISE_METHODS,
}
"""Whom each part compares with, of those that may be missing and whose sources are told."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: the classical methods use one core too, and times are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _odd_frames(run: Run, n: int) -> PatternSet:
    """Draw patterns on frames that fill no whole number of the networks' cells."""
    h, w = ODD_SHAPE
    title = f"{h} × {w} px frames"
    return held_out_patterns("odd", title, ODD_SHAPE, mixed_kinds(max(6, n)), seed=run.seed)


def _sets(run: Run, measured: _Measured, most: int) -> list[PatternSet]:
    """Draw the sets of single patterns, at most so many in each; the first one has the goals."""
    sets = [
        held_out_patterns(
            str(size),
            f"{size}² frames",
            (size, size),
            mixed_kinds(max(6, most if size == 128 else most // 3)),
            seed=run.seed,
        )
        for size in run.sizes
    ]
    half = max(6, most // 2)
    sets += [
        held_out_patterns(
            "faulty",
            "128² frames of faulty cameras",
            (128, 128),
            mixed_kinds(half),
            seed=run.seed,
            faulty=True,
        ),
        difficult_patterns(
            "difficult",
            "128² frames with the beam stopped, cut, outshone or far off",
            (128, 128),
            half,
            seed=run.seed,
        ),
        wide_patterns(
            "wide",
            "128² frames that a disk fills for the most part",
            (128, 128),
            half,
            seed=run.seed,
        ),
        held_out_patterns(
            "speckle",
            "128² frames of disordered films, with speckle",
            (128, 128),
            mixed_kinds(half),
            seed=run.seed,
            film=True,
        ),
        computed_patterns(
            "multislice",
            "128² frames computed by multislice",
            (128, 128),
            half,
            seed=run.seed,
        ),
    ]
    for name, patterns in measured.items():
        # As many pixels as a set of 128² frames has, at most.
        area = patterns.shape[1] * patterns.shape[2]
        count = int(np.clip(most * 128**2 / area, min(24, most), most))
        title = f"measured content ({name})"
        # The prefix keeps a file called 128 or faulty apart from the set of that name.
        own = f"measured.{name}"
        sets.append(measured_patterns(patterns, count, seed=run.seed, name=own, title=title))
    return sets


def _checked(name: str, data: NDArray[np.generic]) -> NDArray[np.float32]:
    patterns = np.asarray(data)
    if patterns.ndim < 2 or not patterns.size or patterns.dtype.kind not in "uif":
        raise SimulationError(
            f"Measured patterns are numbers (k, h, w); {name} is {patterns.dtype} {patterns.shape}."
        )
    if min(patterns.shape[-2:]) < 16:
        raise SimulationError(
            f"Measured patterns need 16 × 16 pixels at least; those of {name} have "
            f"{patterns.shape[-2]} × {patterns.shape[-1]}."
        )
    return patterns.reshape(-1, *patterns.shape[-2:]).astype(np.float32)
