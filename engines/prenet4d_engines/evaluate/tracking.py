"""The tracked center against the single-frame one, over drifting scans with fly-back jumps."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.classical.center import blurred_maximum_center
from prenet4d_engines.evaluate.datasets import held_out_scan
from prenet4d_engines.evaluate.metrics import lengths, within_sigma
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table
from prenet4d_engines.evaluate.run import USABLE, Run, dose_label
from prenet4d_engines.simulate import Drift, Kind
from prenet4d_engines.tracking import CenterTracker

Array = NDArray[np.float64]

KINDS: Final[tuple[Kind, ...]] = ("cbed", "rings", "spots")
DRIFTS: Final = {
    "plane": Drift(plane=4.0, walk=0.0, jump=0.0),
    "plane, walk and jumps": Drift(plane=4.0, walk=2.0, jump=0.5),
}
SINGLE: Final = f"{OURS}, single frame"
TRACKED: Final = f"{OURS}, tracked"
CLASSICAL: Final = "blurred argmax + CoM"
PLANE: Final = "blurred argmax + CoM, plane fit afterwards"
_BEAM_SCALE: Final = 1.2
_SURE: Final = 2.0
"""A difference of so many standard errors is no accident."""


def evaluate_tracking(run: Run) -> Part:
    """Compare the mean error over whole scans, at every dose and kind of drift."""
    size = run.sizes[0]
    scan_shape = run.scan_shape
    doses = run.scan_doses
    tables, checks = [], []
    steps = len(DRIFTS) * len(doses)
    for number, (title, drift) in enumerate(DRIFTS.items()):
        errors: dict[str, list[float]] = {}
        calibrated: list[float] = []
        gains: list[tuple[float, float]] = []
        for column, dose in enumerate(doses):
            run.on_progress(
                (number * len(doses) + column) / steps,
                f"tracking, drift: {title}, {dose:.0f} electrons",
            )
            at_dose: dict[str, list[Array]] = {}
            shares = []
            for which, kind in enumerate(KINDS):
                scan, radius = held_out_scan(
                    scan_shape,
                    (size, size),
                    kind,
                    dose=dose,
                    seed=run.seed,
                    number=1000 + which,
                    drift=drift,
                )
                frames = scan.frames().astype(np.float32)
                single, sigma, usable = run.networks.centers(
                    frames, np.ones(frames.shape, np.bool_)
                )
                tracked, tracked_sigma, _ = CenterTracker(scan_shape).update(
                    np.arange(len(frames)), single, sigma, usable >= USABLE
                )
                # As the corrector does before it has seen a beam.
                tracked = np.where(np.isfinite(tracked), tracked, (size - 1) / 2)
                rival = np.array(
                    [
                        blurred_maximum_center(frame, radius, _BEAM_SCALE)
                        for frame in frames.astype(np.float64)
                    ]
                )
                estimates = {
                    CLASSICAL: rival,
                    PLANE: plane_fit(rival, scan_shape),
                    SINGLE: single,
                    TRACKED: tracked,
                }
                for name, centers in estimates.items():
                    at_dose.setdefault(name, []).append(lengths(centers - scan.centers))
                shares.append(within_sigma(tracked - scan.centers, tracked_sigma))
            for name, found in at_dose.items():
                errors.setdefault(name, []).append(float(np.mean(found)))
            gains.append(paired_difference(at_dose[TRACKED], at_dose[SINGLE], scan_shape))
            calibrated.append(100 * float(np.mean(shares)))
        columns = tuple(dose_label(dose) for dose in doses)
        slug = title.split(",")[0] if number == 0 else "drift"
        tables.append(
            Table(
                f"tracking.mean.{slug}",
                f"Center over {scan_shape[0]}×{scan_shape[1]} scans, drift: {title}:"
                " mean error, px",
                "method",
                columns,
                tuple((name, tuple(values)) for name, values in errors.items()),
                doses,
                "The plane fit knows the whole scan and the beam's true radius, the tracked"
                " center only what came before.",
            )
        )
        tables.append(
            Table(
                f"tracking.gain.{slug}",
                f"Tracked minus single-frame error, drift: {title}: px",
                "mean over scans",
                columns,
                (
                    ("difference", tuple(gain for gain, _ in gains)),
                    ("its standard error, lines being independent", tuple(e for _, e in gains)),
                ),
            )
        )
        tables.append(
            Table(
                f"tracking.sigma.{slug}",
                f"Tracked center, drift: {title}: components within one sigma, %",
                "within",
                columns,
                (("1 sigma (calibrated: 68.3)", tuple(calibrated)),),
            )
        )
        checks += [
            Check(
                f"Tracked center, drift: {title}, {dose_label(dose)}: mean error no more above"
                f" single's than {_SURE:.0f} standard errors of the difference",
                gain,
                _SURE * error,
            )
            for dose, (gain, error) in zip(doses, gains, strict=True)
        ]
    return Part(tuple(tables), tuple(checks))


def paired_difference(
    one: list[Array], other: list[Array], scan_shape: tuple[int, int]
) -> tuple[float, float]:
    """Return the mean of one minus other over scans of errors (n,), and its standard error.

    Neighbouring frames share what misleads them and what the track remembers, so whole lines, not
    frames, count as independent.
    """
    lines = np.concatenate(
        [(a - b).reshape(scan_shape).mean(1) for a, b in zip(one, other, strict=True)]
    )
    return float(lines.mean()), float(lines.std(ddof=1) / np.sqrt(len(lines)))


def plane_fit(centers: Array, scan_shape: tuple[int, int]) -> Array:
    """Return centers (n, 2) replaced by a robust plane over the probe positions.

    As py4DSTEM's ``fit_origin(fitfunction="plane", robust=True)``: least squares, again without
    what lies more than two root mean squares away, until that changes no more.
    """
    row, column = np.divmod(np.arange(len(centers)), scan_shape[1])
    design = np.stack([np.ones(len(centers)), row, column], 1).astype(np.float64)
    fitted = np.empty_like(centers)
    for axis in range(2):
        kept = np.ones(len(centers), np.bool_)
        for _ in range(20):
            plane = np.linalg.lstsq(design[kept], centers[kept, axis], rcond=None)[0]
            residual = np.abs(centers[:, axis] - design @ plane)
            inside = residual <= 2 * np.sqrt(np.mean(residual[kept] ** 2)) + 1e-12
            if np.array_equal(inside, kept) or inside.sum() < 3:
                break
            kept = inside
        fitted[:, axis] = design @ plane
    return fitted
