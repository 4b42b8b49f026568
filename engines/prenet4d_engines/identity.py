"""A corrector that corrects nothing and needs no torch: it measures the pipeline around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import CorrectedBatch, Float32
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.geometry import Ellipticity, reference_center


class IdentityCorrector:
    """Hands frames on as they came, in their own dtype; its state is always ``frozen``.

    Nothing is computed: centers are the reference center with infinite sigma, doses are NaN (not
    measured), no frame is flagged.

    Args:
        frame_shape: ``(h, w)`` in pixels.
        scan_shape, pixel_mask, …: everything else that a corrector takes is accepted and ignored.
    """

    def __init__(self, frame_shape: tuple[int, int], **_ignored: object):
        self.frame_shape = frame_shape
        self.reference_center = reference_center(frame_shape)

    def process(self, frames: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> CorrectedBatch:
        """Return the frames (n, h, w) as they are."""
        n = len(indices)
        center = np.full((n, 2), self.reference_center, dtype=np.float32)
        unknown = np.full((n, 2), np.inf, dtype=np.float32)
        return CorrectedBatch(
            indices=indices,
            corrected=frames,
            aligned=frames,
            center=center,
            center_sigma=unknown,
            tracked=center,
            tracked_sigma=unknown,
            shift=np.zeros((n, 2), dtype=np.float32),
            dose=np.full(n, np.nan, dtype=np.float32),
            flags=np.zeros(n, dtype=np.uint8),
            ellipticity=Ellipticity(),
            ratio_sigma=None,
            theta_sigma=None,
            state="frozen",
            patterns_averaged=0,
            reference_center=self.reference_center,
        )

    def mean(self) -> tuple[Float32, int]:
        """Return NaN (h, w): no patterns are averaged."""
        return np.full(self.frame_shape, np.nan, dtype=np.float32), 0

    def freeze(self) -> None:
        """Do nothing: the ellipticity never changes."""

    def unfreeze(self) -> None:
        """Do nothing: the ellipticity never changes."""

    def recalibrate(self) -> None:
        """Do nothing: there is no calibration to forget."""

    def calibration(self) -> Calibration:
        """Return the circle."""
        return Calibration(
            ratio=1.0,
            theta=0.0,
            reference_center=self.reference_center,
            frame_shape=self.frame_shape,
            how="identity: nothing is measured",
        )

    def load(self, calibration: Calibration) -> None:
        """Ignore the calibration: nothing is corrected."""
