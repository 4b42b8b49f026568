"""py4DSTEM's own ellipse fits, run in an environment of its own.

py4DSTEM needs NumPy 1, so it cannot be installed beside us. Name the Python of an environment that
has it in the environment variable `PYTHON_VARIABLE`, and its fits take part.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.errors import EvaluationError

Array = NDArray[np.float64]

PYTHON_VARIABLE: Final = "PY4DSTEM_PYTHON"
_WORKER: Final = Path(__file__).with_name("py4dstem_worker.py")


def start_py4dstem() -> None:
    """Start the other Python, if one is named, so that a fault is told before hours of work.

    Raises:
        EvaluationError: It does not.
    """
    if python := os.environ.get(PYTHON_VARIABLE):
        _worker(python)


def fit_by_py4dstem(
    kind: Literal["rings", "bragg"],
    mean: Array,
    center: tuple[float, float],
    radius: float,
    annulus: tuple[float, float],
) -> Array:
    """Return the distortion that py4DSTEM reads off a mean pattern, as in `ellipse`.

    Args:
        kind: A two-sided Gaussian on a ring, or a conic through Bragg disks.
        mean: (h, w), 0 where nothing was measured.
        center: The true (cy, cx) in px.
        radius: The direct beam's radius in px.
        annulus: Inner and outer radius in px of what is fitted.

    Raises:
        EvaluationError: The other Python does not run py4DSTEM.
    """
    task = {
        "kind": kind,
        "shape": mean.shape,
        "center": center,
        "inner": annulus[0],
        "outer": annulus[1],
        "radius": radius,
    }
    python = os.environ[PYTHON_VARIABLE]
    worker = _worker(python)
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(task).encode() + b"\n" + mean.astype(np.float64).tobytes())
        worker.stdin.flush()
    except BrokenPipeError:
        line = b""
    else:
        line = _line_of(worker)
    if not line:
        _stop(worker)
        _worker.cache_clear()
        raise EvaluationError(
            f"{python} ({PYTHON_VARIABLE}) died in py4DSTEM; what it said stands above."
        )
    answer = json.loads(line)
    if answer is None or not np.isfinite(answer).all() or min(answer[:2]) <= 0:
        return np.zeros(2)
    a, b, theta = answer
    # Theirs turns from rows toward columns, ours from columns toward rows.
    angle = 0.5 * np.pi - theta
    return float(np.log(a / b)) * np.array([np.cos(2 * angle), np.sin(2 * angle)])


@lru_cache(maxsize=1)
def _worker(python: str) -> subprocess.Popen[bytes]:
    """Start the other Python, once, and wait the seconds until it has imported py4DSTEM."""
    try:
        worker = subprocess.Popen(
            [python, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
        )
    except OSError as error:
        raise EvaluationError(
            f"{python} ({PYTHON_VARIABLE}) cannot be started: {error.strerror}."
        ) from error
    if not _line_of(worker):
        _stop(worker)
        raise EvaluationError(
            f"{python} ({PYTHON_VARIABLE}) could not run py4DSTEM; what it said stands above."
        )
    atexit.register(_stop, worker)
    return worker


def _line_of(worker: subprocess.Popen[bytes]) -> bytes:
    assert worker.stdout is not None
    return worker.stdout.readline()


def _stop(worker: subprocess.Popen[bytes]) -> None:
    atexit.unregister(_stop)
    worker.kill()
    with suppress(BrokenPipeError):
        worker.communicate()
