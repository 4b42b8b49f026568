"""The tracked center against the single-frame one, over drifting scans with fly-back jumps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.classical.center import blurred_maximum_center
from prenet4d_engines.evaluate.metrics import beam_limits, lengths, within_sigma, wrong_beams
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table
from prenet4d_engines.evaluate.run import Run, dose_label, within
from prenet4d_engines.evaluate.scans import dynamical_scan, held_out_scan
from prenet4d_engines.geometry import reference_center
from prenet4d_engines.simulate import Drift, Kind, Scan

Array = NDArray[np.float64]

KINDS: Final[tuple[Kind, ...]] = ("cbed", "rings", "spots")
DRIFTS: Final = {
    "plane": ("plane", Drift(plane=4.0, walk=0.0, jump=0.0)),
    "drift": ("plane, walk and jumps", Drift(plane=4.0, walk=2.0, jump=0.5)),
}
"""What moves the center, with its title, by the end of the tables' names."""
SINGLE: Final = f"{OURS}, single frame"
TRACKED: Final = f"{OURS}, tracked"
CLASSICAL: Final = "blurred argmax + CoM"
PLANE: Final = "blurred argmax + CoM, plane fit afterwards"
_BEAM_SCALE: Final = 1.2
_MOST: Final = 0.5
"""Of the wrong beams the track should leave less than this share."""
_NOTE: Final = (
    "The plane fit knows the whole scan and the beam's true radius, the tracked center only what"
    " came before."
)


@dataclass(frozen=True)
class _Followed:
    """The center over one scan.

    Attributes:
        errors: By estimate, each frame's distance from the truth in px, (n,).
        limits: The errors beyond which another beam was taken for the direct one, (n,).
        within: Share of the tracked components within one sigma.
    """

    errors: dict[str, Array]
    limits: Array
    within: float


def evaluate_tracking(run: Run) -> Part:
    """Compare over whole scans, at every dose and kind of drift, and near zone axes."""
    parts = []
    steps = len(DRIFTS) + 1
    for number, slug in enumerate(DRIFTS):
        parts.append(_under_drift(within(run, number / steps, 1 / steps), slug))
    parts.append(_near_zone_axes(within(run, len(DRIFTS) / steps, 1 / steps)))
    return Part(
        tuple(table for part in parts for table in part.tables),
        tuple(check for part in parts for check in part.checks),
    )


def _under_drift(run: Run, slug: str) -> Part:
    """Compare on simulated scans of several kinds of pattern under one kind of drift."""
    title, drift = DRIFTS[slug]
    frame_shape = (run.sizes[0],) * 2
    followed: list[list[_Followed]] = []
    for column, dose in enumerate(run.scan_doses):
        run.on_progress(
            column / len(run.scan_doses), f"tracking, drift: {title}, {dose:.0f} electrons"
        )
        at_dose = []
        for which, kind in enumerate(KINDS):
            scan, radius = held_out_scan(
                run.scan_shape,
                frame_shape,
                kind,
                dose=dose,
                seed=run.seed,
                number=1000 + which,
                drift=drift,
            )
            at_dose.append(_follow(run, scan, np.full(len(scan), radius)))
        followed.append(at_dose)
    gains = [
        paired_difference(
            [f.errors[TRACKED] for f in at_dose],
            [f.errors[SINGLE] for f in at_dose],
            run.scan_shape,
        )
        for at_dose in followed
    ]
    columns = tuple(dose_label(dose) for dose in run.scan_doses)
    tables = (
        _mean_table(run, slug, f"drift: {title}", followed),
        Table(
            f"tracking.gain.{slug}",
            f"Tracked minus single-frame error, drift: {title}: px",
            "mean over scans",
            columns,
            (
                ("difference", tuple(gain for gain, _ in gains)),
                ("its standard error, lines being independent", tuple(e for _, e in gains)),
            ),
        ),
        _wrong_beam_table(run, slug, f"drift: {title}", followed),
        Table(
            f"tracking.sigma.{slug}",
            f"Tracked center, drift: {title}: components within one sigma, %",
            "within",
            columns,
            (
                (
                    "1 sigma (calibrated: 68.3)",
                    tuple(100 * float(np.mean([f.within for f in each])) for each in followed),
                ),
            ),
        ),
    )
    checks = (
        Check(
            f"Tracked center, drift: {title}, {dose_label(dose)}: mean error less single's, px",
            gain,
            0.0,
        )
        for dose, (gain, _) in zip(run.scan_doses, gains, strict=True)
    )
    return Part(tables, tuple(checks))


def _near_zone_axes(run: Run) -> Part:
    """Compare where dynamical diffraction makes single frames take another beam for the direct."""
    title, drift = DRIFTS["drift"]
    title = f"near zone axes, drift: {title}"
    followed = []
    for column, dose in enumerate(run.scan_doses):
        run.on_progress(column / len(run.scan_doses), f"tracking, {title}, {dose:.0f} electrons")
        scans = (
            dynamical_scan(
                run.scan_shape,
                (run.sizes[0],) * 2,
                dose=dose,
                seed=run.seed,
                number=number,
                drift=drift,
            )
            for number in range(max(1, run.scans // 2))
        )
        followed.append([_follow(run, scan, radii) for scan, radii in scans])
    wrong = _wrong_beam_table(run, "dynamical", title, followed)
    return Part((_mean_table(run, "dynamical", title, followed), wrong), tuple(wrong_checks(wrong)))


def _follow(run: Run, scan: Scan, radii: Array) -> _Followed:
    """Find the center of every frame, track it, and let the classical method do its own."""
    frames = scan.frames().astype(np.float32)
    track = run.networks.track(frames, scan.scan_shape)
    # As the corrector does before it has seen a beam; it claims no sigma there.
    known = np.asarray(np.isfinite(track.tracked).all(1))
    tracked = np.where(known[:, None], track.tracked, reference_center(scan.frame_shape))
    classical = np.array(
        [
            blurred_maximum_center(frame, radius, _BEAM_SCALE)
            for frame, radius in zip(frames.astype(np.float64), radii, strict=True)
        ]
    )
    estimates = {
        CLASSICAL: classical,
        PLANE: plane_fit(classical, scan.scan_shape),
        TRACKED: tracked,
        SINGLE: track.single,
    }
    return _Followed(
        {name: lengths(centers - scan.centers) for name, centers in estimates.items()},
        beam_limits(radii, scan.frame_shape),
        within_sigma((tracked - scan.centers)[known], track.sigma[known]),
    )


def _mean_table(run: Run, slug: str, title: str, followed: list[list[_Followed]]) -> Table:
    ny, nx = run.scan_shape
    return Table(
        f"tracking.mean.{slug}",
        f"Center over {ny}×{nx} scans, {title}: mean error, px",
        "method",
        tuple(dose_label(dose) for dose in run.scan_doses),
        tuple(
            (name, tuple(float(np.mean([f.errors[name] for f in each])) for each in followed))
            for name in followed[0][0].errors
        ),
        run.scan_doses,
        _NOTE,
    )


def _wrong_beam_table(run: Run, slug: str, title: str, followed: list[list[_Followed]]) -> Table:
    ny, nx = run.scan_shape

    def share(name: str, each: list[_Followed]) -> float:
        return 100 * float(np.mean([wrong_beams(f.errors[name], f.limits) for f in each]))

    return Table(
        f"tracking.wrong.{slug}",
        f"Center over {ny}×{nx} scans, {title}: another beam taken for the direct one, %",
        "method",
        tuple(dose_label(dose) for dose in run.scan_doses),
        tuple(
            (name, tuple(share(name, each) for each in followed)) for name in followed[0][0].errors
        ),
        run.scan_doses,
        f"{_NOTE} Wrong: further from the truth than the beam's radius, and than 3 px on 128²"
        " frames (others in proportion).",
    )


def wrong_checks(table: Table) -> Iterator[Check]:
    """Of the single frames' wrong beams, where there are any, the track must remove most."""
    for column, single, tracked in zip(
        table.columns, table.row(SINGLE), table.row(TRACKED), strict=True
    ):
        if single is not None and tracked is not None:
            goal = f"Wrong beams near zone axes that the track leaves at {column}"
            if single:
                yield Check(f"{goal}, share of single's", tracked / single, _MOST)
            else:
                yield Check(f"{goal}, %; single frames take none", tracked, 1e-9)


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
