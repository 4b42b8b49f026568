"""Reading the ellipticity from a mean pattern, without leaving the device where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prenet4d_engines.backends import Backend
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.lanes import Fetched, Lanes
from prenet4d_engines.models import ellipse
from prenet4d_engines.models.ellipse import EllipseEstimate
from prenet4d_engines.resample import resample_by

LOOKS = 2
"""Looks of the ellipse network at one mean: each sees what the one before has left."""

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

    def knows_better(self, other: Reading) -> bool:
        """Tell whether this is a measured calibration that agrees with a less certain reading."""
        if self.loaded is None or self.loaded.ratio_sigma is None or self.sigma > other.sigma:
            return False
        difference = math.dist(self.ellipticity.vector, other.ellipticity.vector)
        return difference <= 3 * math.hypot(self.sigma, other.sigma)


class Reader:
    """Reads means of one frame shape; the work is recorded once.

    Args:
        lanes: of the device.
        backend: runs the ellipse network there.
        frame_shape: ``(h, w)``, pixels.
    """

    def __init__(self, lanes: Lanes, backend: Backend, frame_shape: tuple[int, int]):
        self._lanes, self._backend = lanes, backend
        self._mean = torch.zeros(frame_shape, device=lanes.device)
        self._reference = torch.zeros(2, dtype=torch.float64, device=lanes.device)
        self._recorded: Callable[[], Tensor] | None = None

    def ask(self, mean: Tensor, reference: tuple[float, float]) -> Asked:
        """Have a mean read; see `read_ellipticity`. The answer need not be waited for at once."""
        lanes = self._lanes
        self._reference = lanes.put(np.array(reference), self._reference)
        with lanes.computing():
            self._mean.copy_(mean)
        if self._recorded is None:
            self._recorded = lanes.record(lambda: _read(self._mean, self._reference, self._backend))
        return Asked(lanes.fetch(self._recorded()))


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

    Args:
        mean: (h, w) float32 counts centered on ``reference``; NaN where nothing was measured.
        reference: ``(cy, cx)``, pixels.
        backend: runs the ellipse network; ``mean`` lies on its device.
    """
    origin = torch.tensor(reference, dtype=torch.float64, device=mean.device)
    return _reading(_read(mean, origin, backend).cpu().numpy())


def _reading(answer: npt.NDArray[np.float64]) -> Reading:
    v0, v1, sigma = answer.tolist()
    if not math.isfinite(v0 + v1 + sigma):
        return Reading(Ellipticity(), math.inf)
    return Reading(Ellipticity.from_vector(v0, v1), sigma)


def _read(mean: Tensor, reference: Tensor, backend: Backend) -> Tensor:
    """Return (3,) float64 on the device: the vector form and its sigma.

    Args:
        mean: (h, w) float32, NaN where nothing was measured.
        reference: (2,) float64 ``[cy, cx]``, pixels.
        backend: runs the ellipse network there.
    """
    *_, last = looks(mean[None], reference, backend.ellipse)
    return torch.cat((last.vector[0], last.left.sigma[:1].double()))


@dataclass(frozen=True)
class Look:
    """What one look at n means is at, and what comes of it.

    Attributes:
        seen: (n, 6, 256, 128) float32, what the network reads.
        before: (n, 2) float64, the vector form that has been taken out of the means.
        network: is asked when the answer is first wanted.
    """

    seen: Tensor
    before: Tensor
    network: Callable[[Tensor], Tensor]

    @cached_property
    def left(self) -> EllipseEstimate:
        """What the network says is left."""
        return ellipse.decode(self.network(self.seen))

    @cached_property
    def vector(self) -> Tensor:
        """(n, 2) float64, the vector form that was taken out and what is left, together."""
        return _composed(self.before, self.left.vector.double())


def looks(means: Tensor, reference: Tensor, network: Callable[[Tensor], Tensor]) -> Iterator[Look]:
    """Look at means `LOOKS` times, each time undistorted by what is known so far.

    It is always the original that is undistorted: one interpolation, never two on top of each
    other. The network is told how well the distortion is known already. It needs that: of a
    lattice that may be distorted, or another lattice, both looks show the same, and one that took
    the second for news would believe in its own guess.

    Args:
        means: (n, h, w) float32 counts, NaN where nothing was measured.
        reference: (2,) float64 ``[cy, cx]`` that they are centered on, pixels.
        network: the ellipse network, or what runs it.
    """
    seen = means.isfinite()
    images = torch.where(seen, means, 0.0)
    # The network expects the center in the middle of the frame, wherever the reference is.
    n, h, w = means.shape
    middle = torch.stack([reference.new_full((), at) for at in reference_center((h, w))])
    vector = reference.new_zeros((n, 2))
    sigma = means.new_full((n,), ellipse.SCALE)
    for number in range(1, LOOKS + 1):
        upright = torch.cat(
            [
                resample_by(image[None, None], reference[None], middle, matrix, valid)[0]
                for image, matrix, valid in zip(images, _matrix(vector), seen, strict=True)
            ]
        )
        x = ellipse.prepare(upright.nan_to_num(0.0), upright.isfinite().float(), sigma)
        look = Look(x, vector, network)
        yield look
        if number < LOOKS:
            vector, sigma = look.vector, look.left.sigma


def left_of(truth: Tensor, taken_out: Tensor) -> Tensor:
    """Return the vector forms (n, 2) that are left of distortions when others are taken out."""
    return _composed(-taken_out, truth)


def _matrix(vector: Tensor) -> Tensor:
    """`Ellipticity.matrix` of vector forms (n, 2), on their device: (n, 2, 2)."""
    half = vector.norm(dim=1)[:, None, None] / 2
    shear = 0.5 * torch.where(half > 0, torch.sinh(half) / half, 1.0)
    v0, v1 = vector.unbind(1)
    eye = torch.eye(2, dtype=vector.dtype, device=vector.device)
    return torch.cosh(half) * eye + shear * torch.stack((v0, v1, v1, -v0), 1).view(-1, 2, 2)


def _composed(vector: Tensor, residual: Tensor) -> Tensor:
    """Return the vector forms (n, 2) of distortions with what they left, on their device."""
    matrix = _matrix(vector) @ _matrix(residual)
    squared = matrix @ matrix.mT
    twice = torch.stack(((squared[:, 0, 0] - squared[:, 1, 1]) / 2, squared[:, 0, 1]), 1)
    length = twice.norm(dim=1, keepdim=True)
    return twice * torch.where(length > 0, torch.asinh(length) / length, 1.0)
