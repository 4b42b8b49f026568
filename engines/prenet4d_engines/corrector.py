"""The three-stage corrector: denoise, center, undistort; usable without any service.

    corrector = Corrector((256, 256), scan_shape=(64, 64))
    batch = corrector.process(frames, indices)

Denoiser and center network both read the raw frames. The single-frame centers are tracked over the
scan, one resampling takes shift and ellipse out of the denoised and of the raw pattern together.
Recentered raw patterns feed the running mean from which the ellipticity is read; what was read
applies from the next batch on.

A GPU works on one batch while another one crosses the bus and the host tracks the centers of a
third: `Corrector.submit` takes batches and returns those that are finished. The results are the
same, whichever way frames go in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from prenet4d_engines.backends import Backend, select
from prenet4d_engines.batch import CorrectedBatch, Float32, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.calibrator import Calibrator, Standing
from prenet4d_engines.checks import (
    check_frames,
    checked_frame_shape,
    checked_mask,
    checked_scan_shape,
)
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.errors import CalibrationError, FrameError
from prenet4d_engines.geometry import checked_center, reference_center
from prenet4d_engines.lanes import Fetched
from prenet4d_engines.placing import Placing
from prenet4d_engines.reading import Reading
from prenet4d_engines.stages import Camera, Slot, Station
from prenet4d_engines.virtual import DetectorRadii, VirtualDetectors, figures

Indices = npt.NDArray[np.int64]


class Memory(NamedTuple):
    """What a corrector knew of the scan, without the mean pattern: all on the host."""

    placing: Placing
    standing: Standing


@dataclass
class _Flight:
    """A batch on its way; what is ``None`` is not known yet."""

    indices: Indices
    slots: list[Slot]
    """Its frames lie in these, one after the other."""
    sizes: list[int]
    """How many are in each."""
    looks: list[Fetched]
    before: Memory | None = None
    """What was known before this batch."""
    result: dict[str, Any] | None = None
    """What is known of its result before its patterns have come: fields of `CorrectedBatch`."""
    patterns: list[tuple[Fetched, Fetched, Fetched]] | None = None
    """Of each slot: corrected, aligned, and the sums of the virtual detectors."""
    after: tuple[State, int] | None = None
    """State and number of patterns after this batch."""


class Corrector:
    """Corrects the frames of one acquisition; holds its center track, running mean and ellipticity.

    Instances share nothing but a backend that is handed to several of them; TensorRT's, whose
    engines have one memory, serves one instance, or several on the same station, one after the
    other. One thread at a time may use an instance.

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
        stations: in place of ``backend``, one or several devices, which take turns; their slots are
            ready for the next acquisition with this detector.
        calibration: one made earlier, to begin with.

    Raises:
        FrameError: shapes, mask, gain, settings or reference center make no sense.
        CalibrationError: ``calibration`` was made on frames of another shape.
        BackendError: the backend that was asked for does not run here.
    """

    def __init__(
        self,
        frame_shape: tuple[int, int],
        *,
        scan_shape: tuple[int, int] | None = None,
        pixel_mask: npt.ArrayLike | None = None,
        gain: float = 1.0,
        saturation_value: float | None = None,
        detector: str = "unknown",
        config: CorrectorConfig | None = None,
        backend: Backend | None = None,
        stations: Sequence[Station] = (),
        calibration: Calibration | None = None,
    ):
        self.config = CorrectorConfig() if config is None else config
        if not isinstance(self.config, CorrectorConfig):
            raise FrameError(
                f"The settings are a CorrectorConfig, not {type(config).__name__}: "
                "CorrectorConfig(min_dose=50) makes one."
            )
        self.frame_shape = checked_frame_shape(frame_shape)
        gain, mask = _checked_gain(gain), checked_mask(pixel_mask, self.frame_shape)
        backend = backend or (stations[0].backend if stations else self._selected())
        self.backend = backend
        """Runs the networks; the first one's, where there are several devices."""
        self._stations = list(stations) or [Station(backend)]
        self._turn = 0
        # On a GPU, one batch for each is looked at and one straightened at a time.
        self._ahead = sum(station.lanes.keeps for station in self._stations)
        self._looked: deque[_Flight] = deque()
        self._straightened: deque[_Flight] = deque()
        if calibration:
            self._check_shape(calibration)
        self.reference_center = self._own_center = checked_center(
            self.config.reference_center
            or (calibration.reference_center if calibration else None)
            or reference_center(self.frame_shape),
            self.frame_shape,
        )
        self._detector = detector
        trusted = None if mask is None else mask.tobytes()
        self._camera = Camera(self.frame_shape, trusted, gain, saturation_value)
        known = None if scan_shape is None else checked_scan_shape(scan_shape)
        self._placing = Placing(known, self.config)
        home = self._stations[0]
        self._calibrator = Calibrator(
            *(self.frame_shape, self.reference_center, home.reader(self.frame_shape)),
            *(home.lanes, self.config),
        )
        self._detectors = VirtualDetectors(self.frame_shape, self.reference_center)
        if calibration:
            self.load(calibration)

    def process(self, frames: npt.NDArray[Any], indices: Indices) -> CorrectedBatch:
        """Correct frames; call it in about the order in which they were taken.

        Args:
            frames: (n, h, w) counts, uint8, uint16, uint32 or float32. Values of float frames that
                are negative or no number count as zero.
            indices: (n,) each frame's number within the acquisition.

        Raises:
            FrameError: the arrays are not those of this acquisition; nothing was changed.
        """
        return [*self.submit(frames, indices), *self.finish()][-1]

    @torch.inference_mode()
    def submit(self, frames: npt.NDArray[Any], indices: Indices) -> list[CorrectedBatch]:
        """Take a batch, as `process` does, and return those that are finished, in their order.

        Args:
            frames: as for `process`; they must not change until their batch is returned.
            indices: as for `process`.

        Raises:
            FrameError: the arrays are not those of this acquisition; nothing was changed.
        """
        self.check(frames, indices)
        # A copy: the caller may count on in the same array.
        self._looked.append(self._look(frames, indices.astype(np.int64)))
        return self._advance(self._ahead)

    @torch.inference_mode()
    def finish(self) -> list[CorrectedBatch]:
        """Return the batches that are still on their way."""
        return self._advance(0)

    def check(self, frames: npt.NDArray[Any], indices: Indices) -> None:
        """Say whether frames can be corrected; see `process`.

        Raises:
            FrameError: the arrays are not those of this acquisition.
        """
        check_frames(frames, indices, self.frame_shape)

    def abandon(self) -> Memory:
        """Let go of the batches on their way; return what was known before the oldest of them.

        The device, which may not work any more, is not asked.
        """
        flights = (*self._straightened, *self._looked)
        if flights and flights[0].before:
            self._placing, standing = flights[0].before
        else:
            standing = self._calibrator.standing
        self._calibrator.abandon(standing)
        self._looked.clear()
        self._straightened.clear()
        return Memory(self._placing, standing)

    def resume(self, failed: Corrector) -> None:
        """Go on where another corrector of this acquisition, now abandoned, failed.

        The running mean starts over.
        """
        self._placing, standing = failed.abandon()
        self.reference_center, self._own_center = failed.reference_center, failed._own_center
        self._calibrator.resume(standing, self.reference_center)
        self._detectors = failed._detectors

    def _outlast_faults(self) -> None:
        """Have what was commanded hold, too, where the batches on their way are done again."""
        for flight in self._straightened:
            if flight.before is not None:
                flight.before = flight.before._replace(standing=self._calibrator.standing)

    def _advance(self, ahead: int) -> list[CorrectedBatch]:
        """Bring batches on, but for so many at either stage; return the finished ones."""
        while len(self._looked) > ahead:
            flight = self._looked[0]
            with self._computing():
                self._straighten(flight)
            self._straightened.append(self._looked.popleft())
        flights = list(self._straightened)[: max(len(self._straightened) - ahead, 0)]
        finished = [self._finished(flight) for flight in flights]
        for _ in flights:  # where one fails, all of them can still be abandoned
            self._straightened.popleft()
        return finished

    def _computing(self) -> AbstractContextManager[object]:
        """Have torch's own operations on every device done in the order of everything else."""
        stack = ExitStack()
        for station in reversed(self._stations):
            stack.enter_context(station.lanes.computing())
        return stack

    def _look(self, frames: npt.NDArray[Any], indices: Indices) -> _Flight:
        station = self._stations[self._turn]
        self._turn = (self._turn + 1) % len(self._stations)
        size = station.most or max(len(frames), 1)
        flight = _Flight(indices, [], [], [])
        for start in range(0, max(len(frames), 1), size):
            some = frames[start : start + size]
            slot = station.take(self._camera, frames.dtype.newbyteorder("="), max(len(some), 1))
            flight.slots.append(slot)
            flight.sizes.append(len(some))
            flight.looks.append(slot.look(some))
        return flight

    def _straighten(self, flight: _Flight) -> None:
        calibrator, detectors = self._calibrator, self._detectors
        found = np.concatenate([look.wait() for look in flight.looks])
        ellipticity, reading = calibrator.ellipticity, calibrator.reading
        flight.before = Memory(self._placing.copy(), calibrator.standing)
        if self._straightened:
            self._straightened[-1].after = (calibrator.state, calibrator.patterns)
        sigmas = reading.sigmas if reading else (None, None)
        placed = self._placing.place(flight.indices, found, self.reference_center)
        applied, averaged = placed.applied, placed.averaged

        start = 0
        calibrator.see(placed.beam.tolist())
        for slot, n in zip(flight.slots, flight.sizes, strict=True):
            part = slice(start, start + n)
            slot.place(applied[part], averaged[part], self.reference_center, ellipticity)
            start += n
        if averaged.any():
            totals = [slot.average() for slot in flight.slots]
            home = self._stations[0].lanes.device
            total = sum(
                (each.to(home, non_blocking=True) for each in totals[1:]), totals[0].to(home)
            )
            calibrator.add(total, int(averaged.sum()))
        if detectors.searching:
            detectors.find(*self.mean())
        flight.patterns = [
            slot.straighten(n, detectors.weights)
            for slot, n in zip(flight.slots, flight.sizes, strict=True)
        ]
        flight.result = placed.fields | {
            "ellipticity": ellipticity,
            "ratio_sigma": sigmas[0],
            "theta_sigma": sigmas[1],
            "detectors": detectors.radii,
        }

    def _finished(self, flight: _Flight) -> CorrectedBatch:
        assert flight.patterns is not None
        assert flight.result is not None
        columns = zip(*flight.patterns, strict=True)
        corrected, aligned, added = (_joined([each.wait() for each in some]) for some in columns)
        for slot in flight.slots:
            slot.station.give_back(slot)
        state, patterns = flight.after or (self._calibrator.state, self._calibrator.patterns)
        return CorrectedBatch(
            **flight.result,
            indices=flight.indices,
            corrected=corrected,
            aligned=aligned,
            virtual=figures(added),
            state=state,
            patterns_averaged=patterns,
        )

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        return self._calibrator.state

    @property
    def stands(self) -> bool:
        """Whether the ellipticity is good for the next acquisition."""
        return self._calibrator.stands

    def mean(self) -> tuple[Float32, int]:
        """Return the running mean of the recentered raw patterns and their number.

        The mean is (h, w) float32 counts, before the ellipse is taken out; NaN where no source.
        """
        mean = self._stations[0].lanes.fetch(self._calibrator.mean()).wait()
        # Its owner lets go of it at any time. Page-locked memory that computing wrote to must not
        # be let go of by another thread while something is being recorded.
        return mean.copy(), self._calibrator.patterns

    def freeze(self) -> None:
        """Keep the ellipticity as it is until :meth:`unfreeze`; patterns are still averaged."""
        self._calibrator.freeze()
        self._outlast_faults()

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._calibrator.unfreeze()
        self._outlast_faults()

    def recalibrate(self) -> None:
        """Forget the running mean and the ellipticity, and start over; this also unfreezes."""
        self._calibrator.recalibrate()
        self._outlast_faults()

    def calibration(self) -> Calibration:
        """Return the calibration as it stands."""
        ellipticity, reading = self._calibrator.ellipticity, self._calibrator.reading
        if reading is not None and reading.loaded is not None:
            return reading.loaded.model_copy(update={"reference_center": self.reference_center})
        sigmas = reading.sigmas if reading else (None, None)
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

        It counts as locked, and holds until this scan has averaged enough patterns of its own, and
        reads them with less doubt or differently, or contradicts it. The reference center stays.

        Raises:
            CalibrationError: it was made on frames of another shape.
        """
        self._check_shape(calibration)
        self._calibrator.load(Reading.of(calibration))
        self._outlast_faults()

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Move centers to ``(cy, cx)``, pixels, from the next frames on.

        The running mean starts over; the ellipticity stays. ``None``: to where they were moved at
        first.

        Raises:
            FrameError: it lies outside of the frame, or is no pair of numbers.
        """
        center = self._own_center if center is None else center
        center = checked_center(center, self.frame_shape)
        if center != self.reference_center:
            self.reference_center = center
            self._calibrator.recenter(center)
            self._detectors.recenter(center)

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Measure the next frames with these virtual detectors; ``None``: find their radii."""
        self._detectors.set(radii)

    def _selected(self) -> Backend:
        config = self.config
        return select(
            config.backend,
            precision=config.precision,
            threads=config.threads,
            engines=config.engines,
        )

    def _check_shape(self, calibration: Calibration) -> None:
        if tuple(calibration.frame_shape) != self.frame_shape:
            raise CalibrationError(
                f"The calibration was made on frames of {calibration.frame_shape} pixels and does "
                f"not fit frames of {self.frame_shape}; calibrate on this detector."
            )


def _checked_gain(gain: float) -> float:
    try:
        value = float(gain)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise FrameError(f"The gain is a positive number of counts per electron, not {gain!r}.")
    return value


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
