"""From what was found in each frame to where the frame goes: trust, track, flags; on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import Float32, FrameFlag
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.tracking import CenterTracker

FOUND = ("cy", "cx", "sigma_y", "sigma_x", "usable", "dose", "saturated")
"""What is found in each frame: center and sigma in pixels, the probability of a usable beam,
electrons in the valid pixels, and whether one of these is saturated. Then come three other beams
that may be the direct one, as `models.center.CenterEstimate.others`."""


@dataclass(frozen=True)
class Placed:
    """Where the ``n`` frames of a batch go.

    Attributes:
        applied: (n, 2) float64, the center that is moved to the reference, pixels.
        beam: (n,) bool, which frames show a beam that can be used.
        averaged: (n,) bool, which of them belong into the running mean.
        fields: what a `CorrectedBatch` says of it, by name.
    """

    applied: npt.NDArray[np.float64]
    beam: npt.NDArray[np.bool_]
    averaged: npt.NDArray[np.bool_]
    fields: dict[str, Any]


class Placing:
    """Knows the track of the centers so far.

    Args:
        scan_shape: ``(ny, nx)``; ``None`` where it is not known.
        config: the corrector's.
    """

    def __init__(self, scan_shape: tuple[int, int] | None, config: CorrectorConfig):
        self._config = config
        self._tracker = CenterTracker(scan_shape)

    def copy(self) -> Placing:
        """Return a twin that goes its own way."""
        twin = Placing(None, self._config)
        twin._tracker = self._tracker.copy()
        return twin

    def place(
        self, indices: npt.NDArray[np.int64], found: Float32, reference: tuple[float, float]
    ) -> Placed:
        """Take in what was found in a batch.

        Args:
            indices: (n,) each frame's number in the scan.
            found: (n, 19), see ``FOUND``.
            reference: ``(cy, cx)`` where centers are moved to, pixels.
        """
        single, sigma = found[:, :2].astype(np.float64), found[:, 2:4].astype(np.float64)
        usable, dose, saturated = (found[:, FOUND.index(name)] for name in FOUND[4:])
        others = found[:, len(FOUND) :].astype(np.float64)
        others = others.reshape(len(found), others.shape[1] // 4, 4)
        beam = (dose > 0) & (usable >= self._config.min_beam_probability)
        beam &= np.isfinite(found[:, :4]).all(axis=1)
        tracked, tracked_sigma, outlier = self._tracker.update(indices, single, sigma, beam, others)
        # Before the first beam nothing is known: the frame stays where it is.
        applied, applied_sigma = np.where(np.isnan(tracked), reference, tracked), tracked_sigma
        if self._config.center_mode == "single":
            applied = np.where(beam[:, None], single, applied)
            applied_sigma = np.where(beam[:, None], sigma, tracked_sigma)
        fields = {
            "center": np.where(beam[:, None], single, np.nan).astype(np.float32),
            "center_sigma": np.where(beam[:, None], sigma, np.inf).astype(np.float32),
            "tracked": tracked.astype(np.float32),
            "tracked_sigma": tracked_sigma.astype(np.float32),
            "shift": (np.asarray(reference) - applied).astype(np.float32),
            "shift_sigma": applied_sigma.astype(np.float32),
            "dose": dose.copy(),
            "flags": self._flags(dose, beam, outlier, saturated > 0),
            "reference_center": reference,
        }
        return Placed(applied, beam, beam & ~outlier, fields)

    def _flags(
        self,
        dose: Float32,
        beam: npt.NDArray[np.bool_],
        outlier: npt.NDArray[np.bool_],
        saturated: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.uint8]:
        flags = np.where(dose <= 0, FrameFlag.BLANK, 0)
        flags |= np.where(dose < self._config.min_dose, FrameFlag.LOW_DOSE, 0)
        flags |= np.where(beam, 0, FrameFlag.NO_BEAM)
        flags |= np.where(outlier, FrameFlag.OUTLIER, 0)
        flags |= np.where(saturated, FrameFlag.SATURATED, 0)
        return flags.astype(np.uint8)
