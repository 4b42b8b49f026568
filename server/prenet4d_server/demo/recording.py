"""Reading the demo's recording back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (registers the recording's compression with HDF5)
import numpy as np

from prenet4d_server.demo.score import Array, Found
from prenet4d_server.recording.layout import COUNTERS


@dataclass(frozen=True)
class Recorded:
    """What the recorder wrote."""

    corrected: Array
    """(n, h, w) float32 counts."""
    aligned: Array
    """(n, h, w) float32 counts."""
    reference: tuple[float, float]
    """``(cy, cx)`` px where the centers lie in them."""
    found: Found


def read(path: Path, counters: dict[str, int]) -> Recorded:
    """Read a recording of both kinds of patterns.

    Args:
        path: the file.
        counters: the service's, at the end.

    Raises:
        OSError: it cannot be read.
    """
    with h5py.File(path) as file:
        ours = file["prenet4d"]
        batches = ours["batches"][:]
        last = batches[-1]
        arrived = ours["received"][:].ravel()
        tracked = ours["tracked"][:].reshape(-1, 2)
        shift = ours["shift"][:].reshape(-1, 2)
        center = ours["center"][:].reshape(-1, 2)
        reference = np.nanmedian(tracked + shift, axis=0)
        # Frames before the first beam were left where they are.
        tracked = np.where(np.isnan(tracked), reference - shift, tracked)
        corrected, aligned = (
            file[f"Experiments/{name}/data"][:].reshape(len(arrived), *shape)
            for name, shape in (
                (name, file[f"Experiments/{name}/data"].shape[-2:])
                for name in ("corrected", "aligned")
            )
        )
        dose = float(np.nanmean(ours["dose"][:]))
    duration = float(batches["time"][-1] - batches["time"][0])
    frames = int(batches["frames"][1:].sum())
    return Recorded(
        corrected=corrected,
        aligned=aligned,
        reference=(float(reference[0]), float(reference[1])),
        found=Found(
            center=center,
            tracked=tracked,
            received=arrived,
            dose=dose,
            ratio=float(last["ratio"]),
            ratio_sigma=float(last["ratio_sigma"]),
            theta=float(last["theta"]),
            counters={key: int(counters[key]) for key in COUNTERS},
            frames_per_second=frames / duration if duration else float("nan"),
            latency_p50_ms=float(np.median(batches["latency_p50_ms"])),
            latency_p99_ms=float(np.max(batches["latency_p99_ms"])),
        ),
    )
