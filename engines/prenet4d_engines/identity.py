"""A corrector that corrects nothing and needs no torch: it measures the pipeline around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import CorrectedBatch, Float32, Outcome, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.checks import check_frames, checked_frame_shape, checked_mask
from prenet4d_engines.geometry import Ellipticity, checked_center, reference_center
from prenet4d_engines.virtual import DetectorRadii, VirtualDetectors


class IdentityCorrector:
    """Hands frames on as they came, in their own dtype; its state is always ``frozen``.

    Centers are the reference center with infinite sigma, doses are NaN (not measured), no frame is
    flagged. The virtual detectors look at the frames as they are; as this takes as long as all the
    rest, it is left out unless it is asked for.

    Args:
        frame_shape: ``(h, w)`` in pixels.
        pixel_mask: (h, w) bool, ``True`` where a pixel can be trusted; ``None``: all can.
        wants_virtual: tells, before each batch, whether to look at it with the virtual detectors.

    Raises:
        FrameError: shape or mask make no sense.
    """

    state: State = "frozen"
    stands = False

    def __init__(
        self,
        frame_shape: tuple[int, int],
        *,
        pixel_mask: npt.ArrayLike | None = None,
        wants_virtual: Callable[[], bool] = lambda: True,
    ):
        self.frame_shape = checked_frame_shape(frame_shape)
        self.reference_center = reference_center(self.frame_shape)
        self._valid = checked_mask(pixel_mask, self.frame_shape)
        self._wants_virtual = wants_virtual
        self._detectors = VirtualDetectors(self.frame_shape, self.reference_center)
        self._looked_at = 0

    def process(self, frames: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> CorrectedBatch:
        """Return the frames (n, h, w) as they are.

        Raises:
            FrameError: the arrays are not those of this acquisition.
        """
        check_frames(frames, indices, self.frame_shape)
        n = len(indices)
        virtual = self._look(frames) if n and self._wants_virtual() else None
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
            shift_sigma=unknown,
            dose=np.full(n, np.nan, dtype=np.float32),
            flags=np.zeros(n, dtype=np.uint8),
            ellipticity=Ellipticity(),
            ratio_sigma=None,
            theta_sigma=None,
            state=self.state,
            patterns_averaged=0,
            reference_center=self.reference_center,
            virtual=virtual,
            detectors=self._detectors.radii if virtual is not None else None,
        )

    def submit(self, frames: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> list[Outcome]:
        """Return the frames (n, h, w) as they are, at once."""
        return [self.process(frames, indices)]

    def finish(self) -> list[Outcome]:
        """Return nothing: no batch is ever on its way."""
        return []

    def _look(self, frames: npt.NDArray[Any]) -> Float32:
        if self._detectors.searching:
            self._looked_at += len(frames)
            mean = frames.mean(axis=0, dtype=np.float32)
            if self._valid is not None:
                mean[~self._valid] = np.nan
            self._detectors.find(mean, self._looked_at)
        return self._detectors.measure_frames(frames, self._valid)

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

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Measure centers of mass from ``(cy, cx)``; ``None``: from the middle of the frame."""
        center = reference_center(self.frame_shape) if center is None else center
        self.reference_center = checked_center(center, self.frame_shape)
        self._detectors.recenter(self.reference_center)

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Look at the next frames with these virtual detectors; ``None``: find their radii."""
        self._detectors.set(radii)
