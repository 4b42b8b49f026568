"""The three-stage corrector: denoise, center, undistort; usable without any service.

    corrector = Corrector((256, 256), scan_shape=(64, 64))
    batch = corrector.process(frames, indices)

Denoiser and center network both read the raw frames. The single-frame centers are tracked over the
scan, one resampling takes shift and ellipse out of the denoised and of the raw pattern together.
Recentered raw patterns feed the running mean from which the ellipticity is read; what was read
applies from the next call on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prenet4d_engines.backends import Backend, select
from prenet4d_engines.batch import CorrectedBatch, Float32, FrameFlag, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.calibrator import Calibrator, Reading
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.errors import CalibrationError, FrameError
from prenet4d_engines.geometry import checked_center, reference_center
from prenet4d_engines.models import center, denoiser
from prenet4d_engines.resample import resample
from prenet4d_engines.symmetry import refine
from prenet4d_engines.tracking import CenterTracker
from prenet4d_engines.virtual import DetectorRadii, VirtualDetectors

_DTYPES = ("uint8", "uint16", "uint32", "float32")


class Corrector:
    """Corrects the frames of one acquisition; holds its center track, running mean and ellipticity.

    Instances share nothing but a backend that is handed to several of them. One thread at a time
    may use an instance.

    Args:
        frame_shape: ``(h, w)`` in pixels, at least 8 × 8.
        scan_shape: ``(ny, nx)``; frame ``i`` belongs to probe position ``(i // nx, i % nx)``.
            ``None`` where it is not known: the centers are then tracked without lines.
        pixel_mask: (h, w) bool, ``True`` where a pixel can be trusted; ``None``: all can.
        gain: counts per electron.
        saturation_value: counts at and above which a pixel is saturated.
        detector: its name, for the calibration's record.
        config: settings.
        backend: runs the networks; ``None`` makes the one that ``config`` asks for.
        calibration: one made earlier, to begin with.

    Raises:
        FrameError: shape, mask or gain make no sense.
        CalibrationError: ``calibration`` was made on frames of another shape.
        BackendError: the backend that was asked for does not run here.
    """

    def __init__(
        self,
        frame_shape: tuple[int, int],
        *,
        scan_shape: tuple[int, int] | None = None,
        pixel_mask: npt.NDArray[np.bool_] | None = None,
        gain: float = 1.0,
        saturation_value: float | None = None,
        detector: str = "unknown",
        config: CorrectorConfig | None = None,
        backend: Backend | None = None,
        calibration: Calibration | None = None,
    ):
        self.config = config or CorrectorConfig()
        self.frame_shape = (int(frame_shape[0]), int(frame_shape[1]))
        if min(self.frame_shape) < 8:
            raise FrameError(f"Frames have at least 8 × 8 pixels; {frame_shape} is less.")
        if not (np.isfinite(gain) and gain > 0):
            raise FrameError(f"The gain is a positive number of counts per electron, not {gain}.")
        self.backend = backend or select(
            self.config.backend,
            precision=self.config.precision,
            threads=self.config.threads,
            engines=self.config.engines,
        )
        self.reference_center = self._own_center = (
            self.config.reference_center
            or (calibration.reference_center if calibration else None)
            or reference_center(self.frame_shape)
        )
        self._gain, self._saturation, self._detector = gain, saturation_value, detector
        self._mask, self._valid = self._checked_mask(pixel_mask)
        self._tracker = CenterTracker(scan_shape)
        self._calibrator = Calibrator(
            self.frame_shape, self.reference_center, self._valid, self.backend, self.config
        )
        self._detectors = VirtualDetectors(self.frame_shape, self.reference_center)
        if calibration:
            self.load(calibration)

    @torch.inference_mode()
    def process(self, frames: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> CorrectedBatch:
        """Correct frames; call it in about the order in which they were taken.

        Args:
            frames: (n, h, w) counts, uint8, uint16, uint32 or float32. Values of float frames that
                are negative or no number count as zero.
            indices: (n,) each frame's number within the acquisition.

        Raises:
            FrameError: the arrays are not those of this acquisition; nothing was changed.
        """
        self._check(frames, indices)
        n, (h, w), device = len(frames), self.frame_shape, self.backend.device
        # Of each frame the denoised and the raw one, which one resampling moves together.
        both = torch.empty((n, 2, h, w), device=device)
        looks = self.backend.spread(lambda part: self._look(frames[part], both[part]), n)
        single, sigma, beam, dose, saturated = map(np.concatenate, zip(*looks, strict=True))
        tracked, tracked_sigma, outlier = self._tracker.update(indices, single, sigma, beam)
        # Before the first beam nothing is known: the frame stays where it is.
        unknown = np.isnan(tracked[:, 0])
        tracked[unknown] = self.reference_center
        applied, applied_sigma = tracked, tracked_sigma
        if self.config.center_mode == "single":
            applied = np.where(beam[:, None], single, tracked)
            applied_sigma = np.where(beam[:, None], sigma, tracked_sigma)
        shift = np.asarray(self.reference_center) - applied

        calibrator = self._calibrator
        ellipticity, reading = calibrator.ellipticity, calibrator.reading
        calibrator.see(beam.tolist())
        good = torch.from_numpy(np.flatnonzero(beam & ~outlier)).to(device)
        calibrator.add(both[:, 1], torch.from_numpy(shift).to(device), good)
        if self._detectors.searching:
            self._detectors.find(*self.mean())
        moved = torch.empty((2, n, h, w), device=device)
        centers = torch.from_numpy(applied)

        def straighten(part: slice) -> Float32:
            resample(
                *(both[part], centers[part], self.reference_center, ellipticity, self._valid),
                out=moved[:, part].transpose(0, 1),
            )
            return self._detectors.measure(moved[1, part])

        virtual = np.concatenate(self.backend.spread(straighten, n))
        corrected, aligned = moved.cpu().numpy()
        sigmas = ellipticity.sigmas(reading.sigma) if reading else (None, None)
        return CorrectedBatch(
            indices=indices,
            corrected=corrected,
            aligned=aligned,
            center=np.where(beam[:, None], single, np.nan).astype(np.float32),
            center_sigma=np.where(beam[:, None], sigma, np.inf).astype(np.float32),
            tracked=tracked.astype(np.float32),
            tracked_sigma=tracked_sigma.astype(np.float32),
            shift=shift.astype(np.float32),
            shift_sigma=applied_sigma.astype(np.float32),
            dose=dose,
            flags=self._flags(dose, beam, outlier, saturated),
            ellipticity=ellipticity,
            ratio_sigma=sigmas[0],
            theta_sigma=sigmas[1],
            state=self.state,
            patterns_averaged=calibrator.patterns,
            reference_center=self.reference_center,
            virtual=virtual,
            detectors=self._detectors.radii,
        )

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        return self._calibrator.state

    def mean(self) -> tuple[Float32, int]:
        """Return the running mean of the recentered raw patterns and their number.

        The mean is (h, w) float32 counts, before the ellipse is taken out; NaN where no source.
        """
        return self._calibrator.mean().cpu().numpy(), self._calibrator.patterns

    def freeze(self) -> None:
        """Keep the ellipticity as it is until :meth:`unfreeze`; patterns are still averaged."""
        self._calibrator.freeze()

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._calibrator.unfreeze()

    def recalibrate(self) -> None:
        """Forget the running mean and the ellipticity, and start over; this also unfreezes."""
        self._calibrator.recalibrate()

    def calibration(self) -> Calibration:
        """Return the calibration as it stands."""
        ellipticity, reading = self._calibrator.ellipticity, self._calibrator.reading
        sigmas = ellipticity.sigmas(reading.sigma) if reading else (None, None)
        return Calibration(
            ratio=ellipticity.ratio,
            theta=ellipticity.theta,
            ratio_sigma=sigmas[0],
            theta_sigma=sigmas[1],
            reference_center=self.reference_center,
            frame_shape=self.frame_shape,
            detector=self._detector,
            patterns=self._calibrator.patterns,
            how=f"ellipse network on the running mean, {self.state}",
        )

    def load(self, calibration: Calibration) -> None:
        """Take over a calibration made earlier; the running mean starts over.

        It counts as locked, and holds until this scan has averaged enough patterns of its own or
        contradicts it. The reference center stays as it is.

        Raises:
            CalibrationError: it was made on frames of another shape.
        """
        if tuple(calibration.frame_shape) != self.frame_shape:
            raise CalibrationError(
                f"The calibration was made on frames of {calibration.frame_shape} pixels and does "
                f"not fit frames of {self.frame_shape}; calibrate on this detector."
            )
        sigma = (calibration.ratio_sigma or 0.0) / calibration.ratio
        self._calibrator.load(Reading(calibration.ellipticity, sigma))

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Move centers to ``(cy, cx)``, pixels, from the next frames on.

        The running mean starts over; the ellipticity stays. ``None``: to where they were moved at
        first.

        Raises:
            FrameError: it lies outside of the frame.
        """
        center = checked_center(center or self._own_center, self.frame_shape)
        if center != self.reference_center:
            self.reference_center = center
            self._calibrator.recenter(center)
            self._detectors.recenter(center)

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Measure the next frames with these virtual detectors; ``None``: find their radii."""
        self._detectors.set(radii)

    def _look(self, frames: npt.NDArray[Any], both: Tensor) -> tuple[npt.NDArray[Any], ...]:
        """Look at some frames, each on its own.

        Args:
            frames: (m, h, w) counts.
            both: (m, 2, h, w): takes the denoised and the raw counts.

        Returns:
            Centers and sigmas (m, 2), which of them to use (m,), electrons (m,), and whether a
            pixel is saturated (m,).
        """
        raw = both[:, 1]
        raw.copy_(torch.from_numpy(frames.astype(np.float32)))
        if frames.dtype.kind == "f":
            raw.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0.0)
        electrons = raw / self._gain if self._gain != 1 else raw
        if self._valid is not None:
            electrons = torch.where(self._valid, electrons, 0.0)
        dose = electrons.sum((1, 2))
        both[:, 0] = self._denoise(electrons, dose <= 0)
        saturated = torch.zeros_like(dose, dtype=torch.bool)
        if self._saturation is not None:
            saturated = electrons.amax((1, 2)) * self._gain >= self._saturation
        return (
            *self._find_centers(electrons, dose > 0),
            dose.cpu().numpy(),
            saturated.cpu().numpy(),
        )

    def _denoise(self, electrons: Tensor, blank: Tensor) -> Tensor:
        x, context = denoiser.stabilise(electrons, self._mask)
        denoised = denoiser.restore(self.backend.denoise(x), context)
        if self._gain != 1:
            denoised = denoised * self._gain
        return denoised.masked_fill_(blank[:, None, None], 0.0)

    def _find_centers(
        self, electrons: Tensor, seen: Tensor
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return single-frame centers and sigmas (n, 2), and which of them to use (n,)."""
        x, grid = center.prepare(electrons, self._mask)
        trusted = self._mask
        if self._saturation is not None:  # a pixel that says less than it saw breaks the symmetry
            trusted = trusted & (electrons < self._saturation / self._gain)
        found = refine(electrons, trusted, center.decode(self.backend.center(x), grid))
        beam = seen & (found.usable >= self.config.min_beam_probability)
        beam &= found.center.isfinite().all(1) & found.sigma.isfinite().all(1)
        return (
            found.center.double().cpu().numpy(),
            found.sigma.double().cpu().numpy(),
            beam.cpu().numpy(),
        )

    def _flags(
        self,
        dose: Float32,
        beam: npt.NDArray[np.bool_],
        outlier: npt.NDArray[np.bool_],
        saturated: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.uint8]:
        flags = np.where(dose <= 0, FrameFlag.BLANK, 0)
        flags |= np.where(dose < self.config.min_dose, FrameFlag.LOW_DOSE, 0)
        flags |= np.where(beam, 0, FrameFlag.NO_BEAM)
        flags |= np.where(outlier, FrameFlag.OUTLIER, 0)
        flags |= np.where(saturated, FrameFlag.SATURATED, 0)
        return flags.astype(np.uint8)

    def _checked_mask(self, mask: npt.NDArray[np.bool_] | None) -> tuple[Tensor, Tensor | None]:
        """Return the mask for the networks, and for the resampling where it masks anything."""
        if mask is None or (mask.shape == self.frame_shape and mask.all()):
            return torch.ones(self.frame_shape, dtype=torch.bool, device=self.backend.device), None
        if mask.shape != self.frame_shape:
            raise FrameError(
                f"The pixel mask is {mask.shape} and the frames are {self.frame_shape}."
            )
        if not mask.any():
            raise FrameError("The pixel mask leaves no valid pixel; True marks the valid ones.")
        valid = torch.tensor(mask, dtype=torch.bool, device=self.backend.device)
        return valid, valid

    def _check(self, frames: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> None:
        if frames.ndim != 3 or frames.shape[1:] != self.frame_shape:
            raise FrameError(
                f"Frames come as (n, {self.frame_shape[0]}, {self.frame_shape[1]}), "
                f"not {frames.shape}."
            )
        if frames.dtype.name not in _DTYPES:
            raise FrameError(f"Frames come as {', '.join(_DTYPES)}, not {frames.dtype}.")
        if indices.shape != frames.shape[:1] or indices.dtype.kind not in "iu":
            raise FrameError(
                f"Each of the {len(frames)} frames needs one integer index; "
                f"{indices.dtype} {indices.shape} came."
            )
