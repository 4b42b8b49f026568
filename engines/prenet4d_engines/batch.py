"""What a corrector returns, without any need of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.virtual import DetectorRadii

Float32: TypeAlias = npt.NDArray[np.float32]
State = Literal["calibrating", "locked", "frozen", "lost"]


class FrameFlag(IntFlag):
    """What is special about one frame; ``CorrectedBatch.flags`` holds their sums."""

    BLANK = 1
    """No counts at all."""
    SATURATED = 2
    """At least one valid pixel at the detector's saturation value."""
    LOW_DOSE = 4
    """Fewer electrons than the configured minimum: take its center with care."""
    OUTLIER = 8
    """The single-frame center lies far from the track and was not trusted."""
    NO_BEAM = 16
    """The network sees no usable direct beam."""


@dataclass(frozen=True, slots=True)
class CorrectedBatch:
    """``n`` corrected frames of ``h`` × ``w`` pixels and what was found in them.

    Centers and shifts are ``[y, x]`` in pixels, pixel centers at integers; every sigma is one
    standard deviation in the unit of its value.
    """

    indices: npt.NDArray[np.int64]
    """(n,) each frame's number within the acquisition, as it was given."""
    corrected: Float32
    """(n, h, w) denoised and geometrically corrected, counts; NaN where there is no source.

    The identity corrector alone hands on another dtype, that of the frames.
    """
    aligned: Float32
    """(n, h, w) raw counts, geometrically corrected only; NaN where there is no source."""
    center: Float32
    """(n, 2) of each frame on its own; NaN where the network sees no usable beam."""
    center_sigma: Float32
    """(n, 2); infinite where there is no center."""
    tracked: Float32
    """(n, 2) the center after the scan so far was taken into account; NaN before the first beam."""
    tracked_sigma: Float32
    """(n, 2); infinite where it is not known."""
    shift: Float32
    """(n, 2) reference center − applied center: what each frame was moved by."""
    shift_sigma: Float32
    """(n, 2) one sigma of the applied center; infinite where it is not known."""
    dose: Float32
    """(n,) electrons in the valid pixels."""
    flags: npt.NDArray[np.uint8]
    """(n,) sums of :class:`FrameFlag`."""
    ellipticity: Ellipticity
    """The distortion taken out of these frames."""
    ratio_sigma: float | None
    """``None`` before the first reading, and where a calibration gave the ratio without it."""
    theta_sigma: float | None
    """Radians; ``None`` likewise."""
    state: State
    """The calibration's, after these frames."""
    patterns_averaged: int
    """Patterns in the running mean, after these frames."""
    reference_center: tuple[float, float]
    """``(cy, cx)`` where the centers lie in ``corrected`` and ``aligned``."""
    virtual: Float32 | None
    """(n, 5) what the virtual detectors saw in ``aligned``, in the order of ``VIRTUAL_NAMES``."""
    detectors: DetectorRadii | None
    """The radii of the virtual detectors that saw it."""


Outcome: TypeAlias = CorrectedBatch | Exception
"""What became of a batch: its patterns, or why it cannot be corrected."""


class PatternCorrector(Protocol):
    """The face that every corrector shows to the service; one instance serves one acquisition."""

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        ...

    @property
    def stands(self) -> bool:
        """Whether the ellipticity is good for the next acquisition.

        It is once it was locked, until patterns contradict it, also where the beam has gone since;
        and while it is frozen, if anything had been found.
        """
        ...

    def process(
        self, frames: npt.NDArray[np.generic], indices: npt.NDArray[np.int64]
    ) -> CorrectedBatch:
        """Correct frames (n, h, w), any order; results of the calibration apply to later calls."""
        ...

    def submit(
        self, frames: npt.NDArray[np.generic], indices: npt.NDArray[np.int64]
    ) -> list[Outcome]:
        """Take a batch, as :meth:`process` does; return what became of those that are finished.

        They come in the order in which they were submitted. ``frames`` must not change before.
        """
        ...

    def finish(self) -> list[Outcome]:
        """Return what became of the batches that are still on their way."""
        ...

    def mean(self) -> tuple[Float32, int]:
        """Return the running mean of the recentered raw patterns (h, w) and their number."""
        ...

    def freeze(self) -> None:
        """Keep the ellipticity as it is until :meth:`unfreeze`."""
        ...

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        ...

    def recalibrate(self) -> None:
        """Forget the running mean and the ellipticity, and start over."""
        ...

    def calibration(self) -> Calibration:
        """Return the calibration as it stands."""
        ...

    def load(self, calibration: Calibration) -> None:
        """Take over a calibration made earlier."""
        ...

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Move centers to ``(cy, cx)``, pixels, from now on; ``None``: to where they were at first.

        Raises:
            FrameError: it lies outside of the frame.
        """
        ...

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Measure with these virtual detectors from now on; ``None``: find their radii."""
        ...
