"""Reading the ellipticity from a mean pattern, without leaving the device where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prenet4d_engines.backends import Backend
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.lanes import Fetched, Lanes
from prenet4d_engines.models import ellipse
from prenet4d_engines.resample import resample_by

PASSES = 3
"""Readings of the ellipse network on one mean: each sees what the ones before have left."""

PASSES_FROM_NEAR = 2
"""As many are enough from an estimate that is already near."""

SEEN = 0.25
"""A pixel of the mean counts as seen if it was in at least this share of the patterns."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An ellipticity with one sigma of each component of its vector form."""

    ellipticity: Ellipticity
    sigma: float
    loaded: Calibration | None = None
    """What it was taken from, where it was not read here."""

    @classmethod
    def of(cls, calibration: Calibration) -> Reading:
        """Take one from a calibration; an ellipticity that was given without a sigma is exact."""
        sigma = (calibration.ratio_sigma or 0.0) / calibration.ratio
        return cls(calibration.ellipticity, sigma, calibration)

    @property
    def sigmas(self) -> tuple[float | None, float | None]:
        """One sigma of ratio and theta; ``None`` where they were given without."""
        if self.loaded is not None:
            return self.loaded.ratio_sigma, self.loaded.theta_sigma
        return self.ellipticity.sigmas(self.sigma)

    def contradicts(self, other: Reading, least: float) -> bool:
        """Tell whether two readings differ by more than four sigmas, and by more than ``least``."""
        difference = math.dist(self.ellipticity.vector, other.ellipticity.vector)
        return difference > max(4 * math.hypot(self.sigma, other.sigma), least)


class Reader:
    """Reads means of one frame shape; the work is recorded once for each number of passes.

    Args:
        lanes: of the device.
        backend: runs the ellipse network there.
        frame_shape: ``(h, w)``, pixels.
    """

    def __init__(self, lanes: Lanes, backend: Backend, frame_shape: tuple[int, int]):
        self._lanes, self._backend = lanes, backend
        self._mean = torch.zeros(frame_shape, device=lanes.device)
        self._start = torch.zeros(4, dtype=torch.float64, device=lanes.device)
        self._recorded: dict[int, Callable[[], Tensor]] = {}

    def ask(self, mean: Tensor, reference: tuple[float, float], start: Ellipticity | None) -> Asked:
        """Have a mean read; see `read_ellipticity`. The answer need not be waited for at once."""
        lanes, passes = self._lanes, PASSES_FROM_NEAR if start else PASSES
        known = (*(start or Ellipticity()).vector, *reference)
        self._start = lanes.put(np.array(known), self._start)
        with lanes.computing():
            self._mean.copy_(mean)
        if passes not in self._recorded:
            self._recorded[passes] = lanes.record(
                lambda: _read(self._mean, self._start[2:], self._start[:2], passes, self._backend)
            )
        return Asked(lanes.fetch(self._recorded[passes]()))


class Asked:
    """A reading that was asked for."""

    def __init__(self, answer: Fetched):
        self._answer = answer

    def wait(self) -> Reading:
        """Return it, once it is there; one that is no number has an infinite sigma."""
        return _reading(self._answer.wait())


@torch.inference_mode()
def read_ellipticity(mean: Tensor, reference: tuple[float, float], backend: Backend) -> Reading:
    """Read the distortion of one mean pattern.

    Each pass undistorts the original mean by the estimate so far (one interpolation, never two on
    top of each other), reads the residual and composes it.

    Args:
        mean: (h, w) float32 counts centered on ``reference``; NaN where nothing was measured.
        reference: ``(cy, cx)``, pixels.
        backend: runs the ellipse network; ``mean`` lies on its device.
    """
    known = (reference, Ellipticity().vector)
    origin, circle = torch.tensor(known, dtype=torch.float64, device=mean.device)
    return _reading(_read(mean, origin, circle, PASSES, backend).cpu().numpy())


def _reading(answer: npt.NDArray[np.float64]) -> Reading:
    v0, v1, sigma = answer.tolist()
    if not math.isfinite(v0 + v1 + sigma):
        return Reading(Ellipticity(), math.inf)
    return Reading(Ellipticity.from_vector(v0, v1), sigma)


def _read(mean: Tensor, reference: Tensor, vector: Tensor, passes: int, backend: Backend) -> Tensor:
    """Return (3,) float64 on the device: the vector form and its sigma.

    Args:
        mean: (h, w) float32, NaN where nothing was measured.
        reference: (2,) float64 ``[cy, cx]``, pixels.
        vector: (2,) float64, the vector form of the estimate to begin with.
        passes: how often to look.
        backend: runs the ellipse network there.
    """
    seen = mean.isfinite()
    image = torch.where(seen, mean, 0.0)[None, None]
    # The network expects the center in the middle of the frame, wherever the reference is.
    h, w = mean.shape
    middle = torch.stack([reference.new_full((), at) for at in reference_center((h, w))])
    for _ in range(passes):
        upright = resample_by(image, reference[None], middle, _matrix(vector), seen)[0, 0]
        weight = upright.isfinite().float()
        votes = backend.ellipse(ellipse.prepare(upright.nan_to_num(0.0), weight))
        residual = ellipse.decode(votes)
        vector = _composed(vector, residual.vector[0].double())
    return torch.cat((vector, residual.sigma[:1].double()))


def _matrix(vector: Tensor) -> Tensor:
    """`Ellipticity.matrix` of a vector form (2,), on its device."""
    half = vector.norm() / 2
    shear = 0.5 * torch.where(half > 0, torch.sinh(half) / half, 1.0)
    v0, v1 = vector
    eye = torch.eye(2, dtype=vector.dtype, device=vector.device)
    return torch.cosh(half) * eye + shear * torch.stack((v0, v1, v1, -v0)).view(2, 2)


def _composed(vector: Tensor, residual: Tensor) -> Tensor:
    """`Ellipticity.compose` of two vector forms (2,), on their device."""
    matrix = _matrix(vector) @ _matrix(residual)
    squared = matrix @ matrix.T
    twice = torch.stack(((squared[0, 0] - squared[1, 1]) / 2, squared[0, 1]))
    length = twice.norm()
    return twice * torch.where(length > 0, torch.asinh(length) / length, 1.0)
