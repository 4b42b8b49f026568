"""What a camera makes of an expected pattern: counting, readout, blur, bad pixels, saturation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from prenet4d_engines.errors import SimulationError

_FILLING: Final = 2.0
"""Reach in px of the neighbours that stand in for a pixel that is known to be bad."""
LOWEST_DOSE, HIGHEST_DOSE = 10**1.5, 1e6
"""Range of electrons per pattern that training draws from, log-uniformly."""


@dataclass(frozen=True)
class Detector:
    """One camera.

    Attributes:
        valid: (h, w) bool; False marks pixels known to be bad, which read 0.
        blur: Standard deviation in px of the modulation transfer, 0 for none.
        readout: Standard deviation of the readout noise in electrons; 0 for a counting camera.
        saturation: Highest electrons a pixel reports.
        hot: (k, 3): row, column and extra electrons, the same in every frame, of pixels that nobody
            has flagged.
        transmission: (h, w) share of the electrons that reach each pixel, where nobody has flagged
            what is missing: the shadow of a beam stop, flat-field errors. None for all. The dose
            is then what reaches the camera.
    """

    valid: NDArray[np.bool_]
    blur: float = 0.0
    readout: float = 0.0
    saturation: float = float("inf")
    hot: NDArray[np.float64] | None = None
    transmission: NDArray[np.float32] | None = None

    @property
    def dark(self) -> float:
        """Electrons that a pixel reads on average where none comes.

        Readings below 0 are cut off; what is left of the noise has a mean.
        """
        return self.readout / math.sqrt(2 * math.pi)


def ideal_detector(frame_shape: tuple[int, int]) -> Detector:
    """Return a counting camera without a fault."""
    return Detector(np.ones(frame_shape, np.bool_))


def draw_dose(rng: np.random.Generator, highest: float = HIGHEST_DOSE) -> float:
    """Draw electrons per pattern, log-uniform over the training range, which may end higher."""
    return float(np.exp(rng.uniform(np.log(LOWEST_DOSE), np.log(highest))))


def draw_detector(
    rng: np.random.Generator,
    frame_shape: tuple[int, int],
    center: tuple[float, float] | None = None,
) -> Detector:
    """Draw a camera: half of them faultless counters, the others with something wrong.

    Args:
        rng: Source of randomness.
        frame_shape: (h, w).
        center: The direct beam, where a beam stop would end; None for no beam stop.
    """
    h, w = frame_shape
    valid = np.ones(frame_shape, np.bool_)
    if rng.random() < 0.5:
        return Detector(valid)
    size = min(h, w)
    if rng.random() < 0.25:
        width = int(rng.integers(1, max(2, size // 40) + 1))
        row = h // 2 if rng.random() < 0.6 else int(rng.integers(0, h))
        valid[max(0, row - width // 2) : row - width // 2 + width] = False
        if rng.random() < 0.7:
            column = w // 2 if rng.random() < 0.6 else int(rng.integers(0, w))
            valid[:, max(0, column - width // 2) : column - width // 2 + width] = False
    if rng.random() < 0.35:
        dead = int(rng.integers(1, max(2, 1 + h * w // 800)))
        valid[rng.integers(0, h, dead), rng.integers(0, w, dead)] = False
    if center is not None and rng.random() < 0.12:
        valid &= ~_beam_stop(rng, frame_shape, center)
    hot = None
    if rng.random() < 0.15:
        count = int(rng.integers(1, 4))
        hot = np.stack(
            [
                rng.integers(0, h, count),
                rng.integers(0, w, count),
                np.exp(rng.uniform(0, 6, count)),
            ],
            axis=1,
        ).astype(np.float64)
    return Detector(
        valid=valid,
        blur=float(rng.uniform(0.3, 0.8)) if rng.random() < 0.35 else 0.0,
        readout=float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
        if rng.random() < 0.25
        else 0.0,
        saturation=float(2 ** rng.integers(6, 15)) if rng.random() < 0.15 else float("inf"),
        hot=hot,
    )


def _beam_stop(
    rng: np.random.Generator, frame_shape: tuple[int, int], center: tuple[float, float]
) -> NDArray[np.bool_]:
    """A disk on a bar that reaches to the frame's edge."""
    h, w = frame_shape
    size = min(h, w)
    angle = rng.uniform(0, 2 * np.pi)
    cy, cx = np.asarray(center) + rng.normal(0, 0.01 * size, 2)
    y, x = np.mgrid[:h, :w]
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = np.abs(-(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle))
    radius = rng.uniform(0.03, 0.09) * size
    bar = rng.uniform(0.2, 1.0) * radius
    stop: NDArray[np.bool_] = (np.hypot(along, across) < radius) | ((along > 0) & (across < bar))
    return stop


def expose(
    expected: Tensor,
    dose: float | Tensor,
    detector: Detector,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Take frames of expected intensities.

    Args:
        expected: (n, h, w) float32, each frame with sum 1.
        dose: Electrons per pattern, one number or (n,).
        detector: The camera; its valid pixels must have the frame's shape.
        generator: Source of randomness on the same device.

    Returns:
        The frames (n, h, w) float32 in electrons, bad pixels 0; and the clean expectation
        (n, h, w) float32 in electrons that a perfect denoiser would return.

    Raises:
        SimulationError: A dose that is no number of electrons, or a camera of another shape.
    """
    if detector.valid.shape != tuple(expected.shape[1:]):
        raise SimulationError(
            f"The camera has {detector.valid.shape} pixels, the frames {tuple(expected.shape[1:])}."
        )
    if not bool((torch.as_tensor(dose) >= 0).logical_and(torch.as_tensor(dose) < torch.inf).all()):
        raise SimulationError(f"The dose is a number of electrons from 0 up, not {dose}.")
    rate = expected_counts(expected, dose, detector)
    frames = torch.poisson(rate, generator=generator)
    if detector.hot is not None:
        for row, column, extra in detector.hot:
            frames[:, int(row), int(column)] += extra
    if detector.readout > 0:
        noise = torch.randn(frames.shape, generator=generator, device=frames.device)
        frames = (frames + detector.readout * noise).clamp_min_(0.0)
    if np.isfinite(detector.saturation):
        frames.clamp_max_(detector.saturation)
    valid = torch.from_numpy(detector.valid).to(frames.device)
    return frames * valid, rate


def expected_counts(expected: Tensor, dose: float | Tensor, detector: Detector) -> Tensor:
    """Return the electrons (n, h, w) that a camera counts on average, faults of pixels aside."""
    per_frame = torch.as_tensor(dose, dtype=torch.float32, device=expected.device).reshape(-1, 1, 1)
    if detector.transmission is not None:
        expected = expected * torch.from_numpy(detector.transmission).to(expected.device)
        expected = expected / expected.sum((1, 2), keepdim=True).clamp_min(1e-20)
    rate = expected * per_frame
    if detector.blur > 0:
        rate = _blur(rate, detector.blur)
    if np.isfinite(detector.saturation):
        rate = rate.clamp_max(detector.saturation)
    return rate


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Blur with a separable 5-tap Gaussian of the given standard deviation in px."""
    taps = torch.exp(-0.5 * (torch.arange(-2, 3, device=image.device) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = torch.nn.functional.pad(image[:, None], (2, 2, 2, 2), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, taps.view(1, 1, 5, 1))
    return torch.nn.functional.conv2d(rows, taps.view(1, 1, 1, 5))[:, 0]


def filled(frame: NDArray[np.floating], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return a frame (h, w) whose bad pixels hold the weighted mean of the valid ones around them.

    Far from any valid pixel, as inside a wide beam stop, they hold what the nearest one near the
    edge does; a frame without any valid pixel is 0.
    """
    counts = np.where(valid, frame, 0.0).astype(np.float64)
    if valid.all() or not valid.any():
        return counts
    weight = ndimage.gaussian_filter(valid.astype(np.float64), _FILLING)
    mean = ndimage.gaussian_filter(counts, _FILLING) / np.maximum(weight, 1e-9)
    nearest = ndimage.distance_transform_edt(
        weight < 0.05, return_distances=False, return_indices=True
    )
    return np.where(valid, counts, mean[tuple(nearest)])
