"""Virtual detectors: what a disk, a ring and the whole camera would have counted in each pattern.

They look at the raw counts after the geometrical correction, so that no network has touched the
intensities. Pixels without a source, masked ones too, count nothing. All of a pattern's figures are
sums of its counts under fixed weights: one small matrix product for a batch, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.errors import FrameError

if TYPE_CHECKING:
    from torch import Tensor

Float32 = npt.NDArray[np.float32]

VIRTUAL_NAMES = ("bright_field", "annular_dark_field", "sum", "com_y", "com_x")
"""What is measured: three sums of counts, and the center of mass relative to the reference center,
in pixels, NaN where there are no counts."""

BEYOND_THE_BEAM, SOFT_EDGE = 1.1, 1.0
"""The bright field detector's radius, found automatically: so many radii of the direct beam's disk,
and so many pixels more, as its edge is soft."""
CLEAR_OF_THE_BEAM = 1.4
"""Where the annular dark field detector begins, in radii of the bright field detector: what the
beam's edge sheds must not reach it."""
SETTLED_AFTER = 64
"""Patterns in the running mean from which on automatic radii stay as they are."""


@dataclass(frozen=True, slots=True)
class DetectorRadii:
    """A disk and a ring around the reference center, in pixels of the corrected pattern.

    Raises:
        FrameError: a radius is no number, the disk's is not above 0, or the ring's inner one is
            below 0 or not below the outer one.
    """

    bright_field_radius: float
    annular_inner: float
    annular_outer: float

    def __post_init__(self) -> None:
        radii = (self.bright_field_radius, self.annular_inner, self.annular_outer)
        if not (
            all(map(math.isfinite, radii))
            and self.bright_field_radius > 0
            and 0 <= self.annular_inner < self.annular_outer
        ):
            raise FrameError(
                "The detectors need a bright field radius above 0 and an annular ring whose inner "
                "radius is at least 0 and below the outer one, in pixels; "
                f"{', '.join(f'{radius:g}' for radius in radii)} are not."
            )


def beam_radius(mean: npt.NDArray[np.floating[Any]], reference: tuple[float, float]) -> float:
    """Estimate the radius of the direct beam's disk in a mean pattern.

    It is where the mean intensity on a circle first falls below half of the highest that there is
    within any smaller circle. Where it never does, an eighth of the frame's smaller side stands in.

    Args:
        mean: (h, w) counts, centered on ``reference``; NaN where there is no source.
        reference: ``(cy, cx)``, pixels.

    Returns:
        pixels.
    """
    counted = np.isfinite(mean)
    rings = np.rint(_distances(mean.shape, reference)).astype(np.intp)
    counts = np.bincount(rings.ravel(), np.where(counted, mean, 0.0).ravel())
    pixels = np.bincount(rings.ravel(), counted.ravel())
    on = counts / pixels.clip(min=1)
    within = counts.cumsum() / pixels.cumsum().clip(min=1)
    within[0] = within[1]  # a single pixel may be anything
    half = np.maximum.accumulate(within) / 2
    below = np.flatnonzero((on < half) & (pixels > 0))
    if not len(below) or counts.sum() <= 0:
        return float(min(mean.shape)) / 8
    edge = int(below[0])
    if edge == 0:
        return 0.5
    # Between the last ring above half and this one, by the straight line that joins them.
    inner, outer = float(on[edge - 1]), float(on[edge])
    above = inner - float(half[edge])
    return edge - 1 + (above / (inner - outer) if above > 0 else 0.0)


def find_radii(
    mean: npt.NDArray[np.floating[Any]], reference: tuple[float, float]
) -> DetectorRadii:
    """Choose radii by a mean pattern: see :func:`beam_radius` for the arguments.

    The bright field detector is a little larger than the direct beam, the annular one begins well
    clear of it and ends with the largest circle that fits into the frame.
    """
    h, w = mean.shape
    disk = BEYOND_THE_BEAM * beam_radius(mean, reference) + SOFT_EDGE
    hole = CLEAR_OF_THE_BEAM * disk
    cy, cx = reference
    largest = min(cy, h - 1 - cy, cx, w - 1 - cx) + 0.5
    return DetectorRadii(disk, hole, max(largest, hole + 1.0))


class VirtualDetectors:
    """The detectors of one acquisition; their radii are found, or set by the operator.

    Args:
        frame_shape: ``(h, w)``, pixels.
        reference: ``(cy, cx)``, pixels: the detectors' center.
    """

    def __init__(self, frame_shape: tuple[int, int], reference: tuple[float, float]):
        self._shape, self._reference = frame_shape, reference
        self._set: DetectorRadii | None = None
        self._found: DetectorRadii | None = None
        self._settled = False
        self._weights: Float32 | None = None

    @property
    def radii(self) -> DetectorRadii | None:
        """In use; ``None`` before the first pattern was looked at."""
        return self._set or self._found

    @property
    def automatic(self) -> bool:
        """Whether the radii are found from the pattern."""
        return self._set is None

    @property
    def searching(self) -> bool:
        """Whether :meth:`find` has something to do."""
        return self._set is None and not self._settled

    def set(self, radii: DetectorRadii | None) -> None:
        """Use these radii from now on; ``None``: find them again.

        Raises:
            FrameError: they are something else.
        """
        if not isinstance(radii, DetectorRadii | None):
            raise FrameError(f"The detectors' radii are a DetectorRadii, not {radii!r}.")
        self._set = radii
        self._settled = False
        self._weights = None

    def recenter(self, reference: tuple[float, float]) -> None:
        """Measure around another reference center from now on."""
        self._reference = reference
        self._settled = False
        self._weights = None

    def find(self, mean: npt.NDArray[np.floating[Any]], patterns: int) -> None:
        """Find the radii in the mean (h, w) of so many patterns centered on the reference."""
        found = find_radii(mean, self._reference)
        if found != self._found:
            self._found, self._weights = found, None
        self._settled = patterns >= SETTLED_AFTER

    @property
    def weights(self) -> Float32:
        """(h · w, 5): the share of each pixel in each of the sums; the same array until it changes.

        Raises:
            FrameError: there are no radii yet.
        """
        if self._weights is None:
            self._weights = self._new_weights()
        return self._weights

    def measure_frames(
        self, frames: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None
    ) -> Float32:
        """Measure frames (n, h, w) as they come, without torch.

        Args:
            frames: counts; of floats, what is negative or no number counts as zero.
            valid: (h, w), ``False`` where a pixel is not to be trusted; ``None``: all are.

        Returns:
            (n, 5), in the order of ``VIRTUAL_NAMES``.
        """
        weights = self.weights if valid is None else self.weights * valid.reshape(-1, 1)
        counts = frames.reshape(len(frames), -1).astype(np.float32)
        if frames.dtype.kind == "f":
            counts = np.nan_to_num(counts, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
        return figures(np.asarray(counts @ weights))

    def _new_weights(self) -> Float32:
        """The detectors' edges are soft."""
        radii = self.radii
        if radii is None:
            raise FrameError("The virtual detectors have no radii yet: find or set them first.")
        h, w = self._shape
        distance = _distances(self._shape, self._reference)

        def inside(radius: float) -> npt.NDArray[np.float64]:
            return np.clip(radius + 0.5 - distance, 0.0, 1.0)

        ring = inside(radii.annular_outer) - inside(radii.annular_inner)
        y = np.broadcast_to((np.arange(h) - self._reference[0])[:, None], (h, w))
        x = np.broadcast_to(np.arange(w) - self._reference[1], (h, w))
        images = (inside(radii.bright_field_radius), ring, np.ones((h, w)), y, x)
        return np.stack(images, axis=-1).reshape(h * w, len(images)).astype(np.float32)


def _distances(shape: tuple[int, ...], reference: tuple[float, float]) -> npt.NDArray[np.float64]:
    h, w = shape
    distances: npt.NDArray[np.float64] = np.hypot(
        (np.arange(h) - reference[0])[:, None], np.arange(w) - reference[1]
    )
    return distances


def sums(patterns: Tensor, weights: Tensor) -> Tensor:
    """Add up patterns (n, h, w), NaN where there is no source, under weights (h · w, 5): (n, 5)."""
    return patterns.nan_to_num(0.0).flatten(1) @ weights


def figures(sums: Float32) -> Float32:
    """Turn sums (n, 5) into ``VIRTUAL_NAMES`` (n, 5): moments into the center of mass."""
    counts = sums[:, 2:3]
    center = np.divide(sums[:, 3:], counts, out=np.full_like(sums[:, 3:], np.nan), where=counts > 0)
    return np.concatenate((sums[:, :3], center), axis=1)
