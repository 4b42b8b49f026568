"""Descan: how the center drifts over the scan, as a robust fit of a plane or of second order.

``center = c[0] + c[1] v + c[2] u + c[3] v² + c[4] v u + c[5] u²``, where ``v`` runs from −1 in the
scan's first row to 1 in its last, and ``u`` so over its columns: the coefficients are pixels at the
scan's edge, whatever its shape. The fit is one of iteratively reweighted least squares: first of
least absolute deviations, which finds the bulk of the centers among gross errors, then with Tukey's
biweight (c = 4.685), which leaves them out (Huber & Ronchetti, Robust Statistics, 2009, ch. 7). A
center's weight is 1 / (its variance + the scatter around the fit that its sigma does not explain).
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Array = npt.NDArray[np.float64]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sigma = Annotated[float, Field(ge=0, allow_inf_nan=False)]

MOST_CENTERS = 16_384
"""Of a larger scan, so many centers, evenly spread, are enough for six coefficients."""
FEWEST_CENTERS = 24
TOLD_OF_PLANE, TOLD_OF_SECOND_ORDER = 0.0133, 0.0027
"""How well what was seen must tell a fit's terms apart (see ``_told``): for a plane as well as the
first quarter of a scan does, for second order as well as its first half."""

_ABSOLUTE, _BIWEIGHT = 12, 8  # iterations
_TUKEY = 4.685  # 95 % efficient where errors are Gaussian
_TO_SIGMA = 1.4826  # of a Gaussian's median absolute deviation
_LEAST_SIGMA = 1e-3  # px
_RANK = 1e-10


class Descan(BaseModel):
    """The center's drift over the scan; the module tells what the coefficients mean."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    coefficients_y: tuple[Finite, ...]
    """Of the center's y, pixels: three of a plane, six of second order."""
    coefficients_x: tuple[Finite, ...]
    """Of the center's x, pixels."""
    sigma_y: tuple[Sigma, ...]
    """One sigma of each of ``coefficients_y``, if what the fit leaves were noise of each frame."""
    sigma_x: tuple[Sigma, ...]
    """One sigma of each of ``coefficients_x``."""
    residual: tuple[Sigma, Sigma]
    """Typical distance of the frames' centers from the fit, ``(y, x)``, pixels."""
    outliers: Annotated[float, Field(ge=0, le=1)]
    """Share of the frames that were left out because they lie far from the fit."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        parts = (self.coefficients_y, self.coefficients_x, self.sigma_y, self.sigma_x)
        if len({len(part) for part in parts}) > 1 or len(self.coefficients_y) not in (3, 6):
            raise ValueError("a fit has three coefficients (a plane) or six (second order) an axis")
        return self

    def centers(self, scan_shape: tuple[int, int], step: int = 1) -> Array:
        """Return the fitted center at every ``step``-th probe position of each axis.

        (2, ny, nx) ``[cy, cx]``, pixels; with a ``step``, as many as ``[::step]`` leaves.
        """
        ny, nx = scan_shape
        terms = _terms(*np.meshgrid(_along(ny)[::step], _along(nx)[::step], indexing="ij"))
        return np.stack(
            [
                np.tensordot(coefficients, terms[: len(coefficients)], axes=1)
                for coefficients in (self.coefficients_y, self.coefficients_x)
            ]
        )

    @property
    def drift(self) -> float:
        """The farthest that the fitted center moves between two probe positions, pixels."""
        centers = self.centers((9, 9)).reshape(2, -1)
        return float(np.hypot(*(centers[:, :, None] - centers[:, None])).max())


def fit_descan(centers: npt.NDArray[Any], sigmas: npt.NDArray[Any]) -> Descan | None:
    """Fit the drift of the center over a scan.

    Second order is fitted once half of the scan was seen in both directions, a plane once a quarter
    was; centers along a line of it, a diagonal too, tell neither. Terms that a scan of a single row
    or column cannot tell are 0.

    Args:
        centers: (2, ny, nx) ``[cy, cx]``, pixels; NaN where there is none.
        sigmas: (2, ny, nx) one sigma of each.

    Returns:
        ``None`` where too little was seen.
    """
    _, ny, nx = centers.shape
    known = np.flatnonzero(np.isfinite(centers).all(0) & np.isfinite(sigmas).all(0))
    if len(known) < FEWEST_CENTERS:
        return None
    if len(known) > MOST_CENTERS:
        known = known[np.linspace(0, len(known) - 1, MOST_CENTERS).astype(np.intp)]
    y, x = np.divmod(known, nx)
    terms = _terms(_along(ny)[y], _along(nx)[x])
    if _told(terms) < TOLD_OF_SECOND_ORDER:
        terms = terms[:3]
        if _told(terms) < TOLD_OF_PLANE:
            return None
    design = terms.T
    fits = [
        _fit(design, values[y, x].astype(np.float64), sigma[y, x].astype(np.float64))
        for values, sigma in zip(centers, sigmas, strict=True)
    ]
    (fit_y, sigma_y, residual_y, out_y), (fit_x, sigma_x, residual_x, out_x) = fits
    return Descan(
        coefficients_y=tuple(fit_y.tolist()),
        coefficients_x=tuple(fit_x.tolist()),
        sigma_y=tuple(sigma_y.tolist()),
        sigma_x=tuple(sigma_x.tolist()),
        residual=(residual_y, residual_x),
        outliers=float((out_y | out_x).mean()),
    )


def _along(n: int) -> Array:
    return np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1)


def _terms(v: Array, u: Array) -> Array:
    return np.stack([np.ones_like(v), v, u, v * v, v * u, u * u])


def _told(terms: Array) -> float:
    """Tell the least mean square of a sum of terms whose coefficients' squares add up to 1.

    It is 0 where some of the terms cannot be told from each other. Terms that are 0 everywhere do
    not count.
    """
    some = terms[terms.any(axis=1)]
    return float(np.linalg.eigvalsh(some @ some.T / terms.shape[1])[0])


def _fit(
    design: Array, values: Array, sigma: Array
) -> tuple[Array, Array, float, npt.NDArray[np.bool_]]:
    """Fit one axis: coefficients, their sigmas, the residual's size, and which are outliers."""
    variance = np.maximum(sigma, _LEAST_SIGMA) ** 2
    own = 1 / np.sqrt(variance + np.median(variance))
    middle = float(np.median(values))
    values = values - middle
    coefficients = _solve(design, values, own**2)
    for _ in range(_ABSOLUTE):
        off = np.abs(values - design @ coefficients) * own
        coefficients = _solve(design, values, own**2 / np.maximum(off, 1e-3))
    kept = np.ones(len(values), dtype=np.bool_)
    for _ in range(_BIWEIGHT):
        residuals = values - design @ coefficients
        total = variance + _scatter(residuals[kept], variance[kept])
        share = residuals**2 / total / _TUKEY**2
        kept = share < 1
        weights = np.where(kept, (1 - share) ** 2, 0.0) / total
        coefficients = _solve(design, values, weights)
    # An M-estimator's covariance: the slope of its influence against the influence's own variance.
    slope = np.where(kept, (1 - share) * (1 - 5 * share), 0.0) / total
    bread = np.linalg.pinv((design * slope[:, None]).T @ design, rcond=_RANK, hermitian=True)
    influence = design * (weights * residuals)[:, None]
    covariance = bread @ (influence.T @ influence) @ bread
    coefficients[0] += middle
    residual = _TO_SIGMA * float(np.median(np.abs(residuals)))
    return coefficients, np.sqrt(np.diag(covariance)), residual, ~kept


def _scatter(residuals: Array, variance: Array) -> float:
    """The variance around the fit that the centers' own variances leave unexplained."""
    seen = (_TO_SIGMA * float(np.median(np.abs(residuals)))) ** 2
    return max(seen - float(np.median(variance)), 0.0)


def _solve(design: Array, values: Array, weights: Array) -> Array:
    weighted = design * weights[:, None]
    inverse = np.linalg.pinv(weighted.T @ design, rcond=_RANK, hermitian=True)
    solution: Array = inverse @ (weighted.T @ values)
    return solution
