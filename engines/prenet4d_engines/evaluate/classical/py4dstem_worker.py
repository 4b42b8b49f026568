"""Runs in another environment, one that has py4DSTEM: fits ellipses to what it reads on stdin.

Once it has imported py4DSTEM it writes an empty line. Each task is a line of JSON (``kind``,
``shape``, ``center``, ``inner``, ``outer``, ``radius``) and the image as float64 bytes; each answer
is a line of JSON, ``[a, b, theta]`` as py4DSTEM has them (theta from the first axis toward the
second), or null where no fit succeeded.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rings(image: Array, task: dict[str, Any]) -> list[float] | None:
    """Fit py4DSTEM's two-sided Gaussian to a ring."""
    from py4DSTEM.process.calibration import fit_ellipse_amorphous_ring

    (_, _, a, b, theta), _ = fit_ellipse_amorphous_ring(
        image, task["center"], (task["inner"], task["outer"])
    )
    return [float(a), float(b), float(theta)]


def bragg(image: Array, task: dict[str, Any]) -> list[float] | None:
    """Find Bragg disks and fit py4DSTEM's conic to those in an annulus."""
    import py4DSTEM
    from py4DSTEM.process.calibration.ellipse import ellipse_err
    from py4DSTEM.process.utils import convert_ellipse_params
    from scipy.optimize import leastsq

    radius = max(task["radius"], 1.5)
    axes = [np.fft.fftfreq(size, 1 / size) for size in image.shape]
    away = np.hypot(axes[0][:, None], axes[1][None, :])
    disk = 1 / (1 + np.exp(np.clip((away - radius) / 0.5, -50, 50)))
    trench = ((away <= 2 * radius) & (away > radius)).astype(float)
    kernel = disk / disk.sum() - trench / max(trench.sum(), 1.0)
    cube = py4DSTEM.DataCube(data=image[None, None])
    peaks = cube.find_Bragg_disks(
        template=kernel,
        data=(0, 0),
        minRelativeIntensity=0.001,
        minAbsoluteIntensity=0,
        edgeBoundary=int(radius),
        minPeakSpacing=2 * radius,
        maxNumPeaks=100,
        subpixel="multicorr",
        upsample_factor=16,
    )
    x, y, power = (np.asarray(peaks.data[name], float) for name in ("qx", "qy", "intensity"))
    center = task["center"]
    r = np.hypot(x - center[0], y - center[1])
    chosen = (r > task["inner"]) & (r <= task["outer"])
    if chosen.sum() < 5:
        return None
    start = [*center, 1 / np.mean(r[chosen]) ** 2, 0.0, 1 / np.mean(r[chosen]) ** 2]
    fitted = leastsq(ellipse_err, start, args=(x[chosen], y[chosen], np.sqrt(power[chosen])))[0]
    a, b, theta = convert_ellipse_params(*fitted[2:])
    return [float(a), float(b), float(theta)]


def main() -> None:
    """Answer until stdin ends; whatever py4DSTEM prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    try:
        import py4DSTEM  # noqa: F401 - whether it can be
    except (ImportError, AttributeError) as error:  # the latter: it does not get on with NumPy 2
        sys.exit(f"{type(error).__name__}: {error}")

    answers.write("\n")
    answers.flush()
    for line in sys.stdin.buffer:
        task = json.loads(line)
        size = 8 * task["shape"][0] * task["shape"][1]
        image = np.frombuffer(sys.stdin.buffer.read(size)).reshape(task["shape"]).copy()
        try:
            answer = {"rings": rings, "bragg": bragg}[task["kind"]](image, task)
        except (ValueError, RuntimeError, ArithmeticError, AssertionError, IndexError):
            answer = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
