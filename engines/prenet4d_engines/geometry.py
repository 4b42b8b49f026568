"""The elliptical distortion: its conventions, its forms, and how two of them compose.

Conventions, used everywhere. Pixel centers lie at integers; centers are ``(cy, cx)``. ``theta`` is
the direction of the ellipse's major axis in radians, from +x (columns) toward +y (rows), in
``[0, π)``; ``ratio`` = a/b ≥ 1. The distortion preserves areas (so counts need no Jacobian)::

    D = R(θ) diag(√ratio, 1/√ratio) R(−θ)          acting on (x, y) column vectors
    corrected(p) = raw(c + D (p − c_ref))

With ``L = ln(ratio)`` and the *vector form* ``v = L (cos 2θ, sin 2θ)``, ``D`` is the exponential of
a symmetric traceless matrix, which is smooth at the circle where ``theta`` itself means nothing::

    D = exp(½ [[v0, v1], [v1, −v0]]) = cosh(L/2) I + sinh(L/2)/L [[v0, v1], [v1, −v0]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prenet4d_engines.errors import FrameError

Matrix = npt.NDArray[np.float64]

UNKNOWN_ANGLE_SIGMA = math.pi / math.sqrt(12)
"""The standard deviation of an angle of which nothing is known: uniform over ``[0, π)``."""


@dataclass(frozen=True, slots=True)
class Ellipticity:
    """An elliptical distortion: ``ratio`` = a/b ≥ 1, major axis along ``theta`` in [0, π).

    Raises:
        ValueError: ``ratio`` is below 1, or one of the two is not finite.
    """

    ratio: float = 1.0
    theta: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"An ellipticity ratio is a/b ≥ 1; {self.ratio} is not.")
        if not math.isfinite(self.theta):
            raise ValueError(f"An ellipticity angle is a number of radians; {self.theta} is not.")
        theta = self.theta % math.pi
        # A tiny negative angle rounds up to π itself.
        object.__setattr__(self, "theta", theta if theta < math.pi else 0.0)

    @classmethod
    def from_vector(cls, v0: float, v1: float) -> Ellipticity:
        """Read the vector form ``ln(ratio)·(cos 2θ, sin 2θ)``."""
        length = math.hypot(v0, v1)
        return cls(math.exp(length), 0.5 * math.atan2(v1, v0) if length else 0.0)

    @property
    def vector(self) -> tuple[float, float]:
        """The vector form ``ln(ratio)·(cos 2θ, sin 2θ)``."""
        length = math.log(self.ratio)
        return length * math.cos(2 * self.theta), length * math.sin(2 * self.theta)

    @classmethod
    def from_matrix(cls, matrix: Matrix) -> Ellipticity:
        """Return the ellipse that a general 2×2 map of the plane makes of a circle.

        The polar decomposition ``M = S R`` splits ``M`` into a rotation, which leaves circles as
        they are, and a symmetric ``S``; what remains of ``S`` at unit area is the result.

        Args:
            matrix: (2, 2), acting on (x, y), with positive determinant.

        Raises:
            ValueError: the determinant is not positive: the map mirrors or flattens the plane.
        """
        determinant = float(np.linalg.det(matrix))
        if not determinant > 0:
            raise ValueError(f"A distortion has a positive determinant; {determinant} is not.")
        # S² = M Mᵀ has the vector form of S with twice the length.
        squared = matrix @ matrix.T / determinant
        half_difference = (float(squared[0, 0]) - float(squared[1, 1])) / 2
        off_diagonal = float(squared[0, 1])
        length = math.hypot(half_difference, off_diagonal)
        if not length:
            return cls()
        return cls(math.exp(math.asinh(length)), 0.5 * math.atan2(off_diagonal, half_difference))

    @property
    def matrix(self) -> Matrix:
        """``D``, (2, 2) float64, acting on (x, y): where a corrected pixel's content comes from."""
        v0, v1 = self.vector
        half = math.hypot(v0, v1) / 2
        shear = 0.5 * (math.sinh(half) / half if half else 1.0)
        return math.cosh(half) * np.eye(2) + shear * np.array([[v0, v1], [v1, -v0]])

    def ring(self, center: tuple[float, float], radius: float) -> Matrix:
        """Draw what a circle in the corrected pattern is in the raw one.

        Args:
            center: ``(cy, cx)``, pixels.
            radius: of the circle, pixels.

        Returns:
            (2, n) ``[y, x]``, pixels; the last point is the first.
        """
        angle = np.linspace(0, 2 * np.pi, 97)
        x, y = self.matrix @ (radius * np.stack((np.cos(angle), np.sin(angle))))
        return np.stack((center[0] + y, center[1] + x))

    @property
    def inverse(self) -> Ellipticity:
        """The distortion that undoes this one: the same ratio, the axes exchanged."""
        return Ellipticity(self.ratio, self.theta + math.pi / 2)

    def compose(self, residual: Ellipticity) -> Ellipticity:
        """Add the distortion that is still seen in a pattern already corrected by ``self``.

        A pattern corrected by ``D`` and then by ``D'`` is ``raw(c + D D' (p − c_ref))``. ``D D'``
        is in general no pure ellipse; its rotation is left out (see :meth:`from_matrix`), so that
        rings become exactly as round as after both corrections.
        """
        return Ellipticity.from_matrix(self.matrix @ residual.matrix)

    def sigmas(self, component_sigma: float) -> tuple[float, float]:
        """Translate one sigma of each vector component into those of ``ratio`` and ``theta``.

        To first order ``σ_ratio = ratio σ`` and ``σ_θ = σ / (2 ln ratio)``, the latter at most
        that of an unknown angle.
        """
        length = math.log(self.ratio)
        theta_sigma = component_sigma / (2 * length) if length else math.inf
        return self.ratio * component_sigma, min(theta_sigma, UNKNOWN_ANGLE_SIGMA)


def reference_center(frame_shape: tuple[int, int]) -> tuple[float, float]:
    """Return the middle of a frame, ``((h − 1) / 2, (w − 1) / 2)``."""
    return (frame_shape[0] - 1) / 2, (frame_shape[1] - 1) / 2


def checked_center(
    center: tuple[float, float], frame_shape: tuple[int, int]
) -> tuple[float, float]:
    """Return a reference center ``(cy, cx)`` that lies on the frame.

    Raises:
        FrameError: it does not, or is no pair of numbers.
    """
    try:
        cy, cx = map(float, center)
    except (TypeError, ValueError):
        raise FrameError(f"A reference center is (cy, cx) in pixels, not {center}.") from None
    h, w = frame_shape
    if not (-0.5 <= cy <= h - 0.5 and -0.5 <= cx <= w - 0.5):
        raise FrameError(
            f"The reference center must lie on the frame of {h} × {w} pixels; "
            f"({cy:g}, {cx:g}) does not."
        )
    return cy, cx
