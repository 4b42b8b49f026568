"""Denoising of whole scans: PCA knows all frames at once, the network each one alone."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.metrics import squared_error, squared_root_error
from prenet4d_engines.evaluate.report import OURS, Check, Part, Table, most_of_the_best
from prenet4d_engines.evaluate.run import Run, dose_label
from prenet4d_engines.evaluate.scans import held_out_scan
from prenet4d_engines.simulate import Drift

Array = NDArray[np.float64]

PCA: Final = "PCA over the scan, best rank"
_RANKS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_SCAN_SHAPE: Final = (16, 16)
DRIFTS: Final = {
    "still": ("no descan", Drift(plane=0.0, walk=0.0, jump=0.0)),
    "descan": ("±1 px descan", Drift(plane=2.0, walk=0.0, jump=0.0)),
}
"""What moves the patterns, with its title, by the end of the tables' names."""


def evaluate_scan_denoising(run: Run) -> Part:
    """Compare on convergent-beam scans of 256 positions, still and moving by a pixel."""
    shape = (run.sizes[0],) * 2
    tables = []
    for slug, (title, drift) in DRIFTS.items():
        errors: dict[str, dict[str, list[float]]] = {"linear": {}, "sqrt": {}}
        for dose in run.doses:
            scan, _ = held_out_scan(
                _SCAN_SHAPE, shape, "cbed", dose=dose, seed=run.seed, number=2000, drift=drift
            )
            frames = scan.frames().astype(np.float64)
            # PCA needs all frames; a part of them, spread over the scan, is enough to compare on.
            kept = min(len(scan), max(6, run.patterns // 2))
            seen = np.linspace(0, len(scan) - 1, kept, dtype=np.int64)
            clean = np.stack([scan.expectation(int(i)) for i in seen]).astype(np.float64)
            masks = np.ones(clean.shape, np.bool_)
            found: dict[str, Array | NDArray[np.float32]] = {
                PCA: principal_components(frames, _RANKS, seen),
                OURS: run.networks.denoise(frames[seen].astype(np.float32), masks)[None],
            }
            for name, results in found.items():
                for measure, error in (("linear", squared_error), ("sqrt", squared_root_error)):
                    best = min(error(result.astype(np.float64), clean) for result in results)
                    errors[measure].setdefault(name, []).append(best)
        tables += [
            Table(
                name=f"denoise.scan.{measure}.{slug}",
                title=f"Denoising a scan of 256 positions, {title}: mean squared error, {unit}",
                heading="method",
                columns=tuple(dose_label(dose) for dose in run.doses),
                rows=tuple((name, tuple(values)) for name, values in errors[measure].items()),
                doses=run.doses,
                note="PCA sees the whole scan, Poisson-weighted, its rank chosen on the truth.",
            )
            for measure, unit in (("linear", "counts²"), ("sqrt", "counts (of √counts)"))
        ]
    checks = (
        Check(f"{table.title}: share of PCA's, at the worst dose", share, 1.0)
        for table in tables
        if table.name.endswith(".descan")
        for share in (most_of_the_best(table, OURS, [PCA]),)
    )
    return Part(tuple(tables), tuple(checks))


def principal_components(frames: Array, ranks: tuple[int, ...], wanted: NDArray[np.int64]) -> Array:
    """Return frames (r, k, h, w) rebuilt from the scan's first principal components, for each rank.

    Weighted for Poisson noise by the mean frame and the mean image (M. Keenan and P. Kotula,
    Surf. Interface Anal. 36 (2004) 203); negative counts are set to zero.

    Args:
        frames: The scan, (n, h, w) counts.
        ranks: How many components to keep.
        wanted: (k,) indices of the frames to rebuild.
    """
    n, h, w = frames.shape
    matrix = frames.reshape(n, -1)
    rows = np.sqrt(np.maximum(matrix.mean(1), 1e-9))[:, None]
    columns = np.sqrt(np.maximum(matrix.mean(0), matrix.mean() * 1e-3))[None, :]
    scaled = matrix / rows / columns
    # The scan has far fewer frames than pixels: their n x n products are cheap to diagonalise.
    _, vectors = np.linalg.eigh(scaled @ scaled.T)
    vectors = vectors[:, : -max(ranks) - 1 : -1]
    projected = vectors.T @ scaled
    rebuilt = [
        np.maximum((vectors[wanted, :rank] @ projected[:rank]) * rows[wanted] * columns, 0.0)
        for rank in ranks
    ]
    return np.stack(rebuilt).reshape(len(ranks), len(wanted), h, w)
