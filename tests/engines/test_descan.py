"""The fit of the center's drift over the scan: right, robust, and honest about its sigmas."""

import numpy as np
import pytest
from pydantic import ValidationError

from prenet4d_engines.descan import Descan, fit_descan

SCAN = (24, 32)
Y = (63.0, 1.5, -0.4, 0.8, 0.3, -0.6)
X = (60.0, -0.7, 2.2, -0.2, 0.5, 0.9)


def drift(y=Y, x=X, shape=SCAN):
    """(2, ny, nx) true centers."""
    along = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    v, u = np.meshgrid(*along, indexing="ij")
    terms = np.stack([np.ones_like(v), v, u, v * v, v * u, u * u])
    return np.stack([np.tensordot(c, terms[: len(c)], axes=1) for c in (y, x)])


def measured(seed=0, *, sigma=0.1, shape=SCAN):
    rng = np.random.default_rng(seed)
    sigmas = sigma * rng.uniform(0.5, 2, (2, *shape))
    return drift(shape=shape) + sigmas * rng.normal(size=sigmas.shape), sigmas, rng


def deviations(fit):
    """Every coefficient's error in its own sigmas."""
    found = np.array((fit.coefficients_y, fit.coefficients_x))
    return (found - np.array((Y, X))) / np.array((fit.sigma_y, fit.sigma_x))


def test_the_drift_is_found():
    centers, sigmas, _ = measured()
    fit = fit_descan(centers, sigmas)
    assert np.abs(deviations(fit)).max() < 4
    assert np.abs(fit.centers(SCAN) - drift()).max() < 0.05
    assert fit.residual == pytest.approx((0.11, 0.11), abs=0.03)
    assert fit.outliers < 0.02


def test_the_sigmas_are_what_they_say():
    fits = [fit_descan(*measured(seed)[:2]) for seed in range(30)]
    z = np.concatenate([deviations(fit).ravel() for fit in fits])
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25


def test_a_quarter_of_gross_errors_does_not_move_it():
    centers, sigmas, rng = measured(1)
    wrong = rng.random(SCAN) < 0.25
    centers[:, wrong] += rng.normal(20, 15, (2, wrong.sum()))
    fit = fit_descan(centers, sigmas)
    assert np.abs(fit.centers(SCAN) - drift()).max() < 0.06
    assert fit.outliers == pytest.approx(wrong.mean(), abs=0.03)


def test_lines_that_jumped_away_and_came_back_are_left_out():
    centers, sigmas, _ = measured(2)
    centers[:, 5:9] += np.array((6.0, -4.0))[:, None, None]
    fit = fit_descan(centers, sigmas)
    assert np.abs(fit.centers(SCAN) - drift()).max() < 0.1
    assert fit.outliers == pytest.approx(4 / 24, abs=0.03)


def test_drift_that_is_no_surface_shows_in_the_residual():
    centers, sigmas, rng = measured(3, sigma=0.01)
    centers += np.cumsum(rng.normal(0, 0.1, (2, *SCAN)), axis=2) * 0.3
    fit = fit_descan(centers, sigmas)
    assert min(fit.residual) > 0.05
    assert fit.outliers < 0.05


def test_where_little_was_seen_there_is_no_fit_then_a_plane_then_second_order():
    centers, sigmas, _ = measured(4)
    kinds = []
    for rows in (1, 3, 10, 20):
        seen = np.where(np.arange(SCAN[0])[:, None] < rows, centers, np.nan)
        fit = fit_descan(seen, sigmas)
        kinds.append(len(fit.coefficients_y) if fit else 0)
    assert kinds == [0, 0, 3, 6]


def test_centers_along_a_line_make_no_fit_of_what_is_across_it():
    centers, sigmas, _ = measured(8, shape=(64, 64))
    row, column = np.indices((64, 64))
    for line in (row == column, np.abs(row + column - 63) < 2, np.abs(row - 30) < 3):
        assert fit_descan(np.where(line, centers, np.nan), sigmas) is None
    for crossed in ((row == 32) | (column == 32), (row == 0) | (row == 63)):
        fit = fit_descan(np.where(crossed, centers, np.nan), sigmas)
        assert len(fit.coefficients_y) == 3


def test_too_few_centers_or_none_make_no_fit():
    centers, sigmas, rng = measured(5)
    assert fit_descan(np.full_like(centers, np.nan), sigmas) is None
    assert fit_descan(centers, np.full_like(sigmas, np.inf)) is None
    few = np.where(rng.random(SCAN) < 0.02, centers, np.nan)
    assert fit_descan(few, sigmas) is None


def test_a_single_line_knows_nothing_of_the_other_direction():
    centers, sigmas, _ = measured(6, shape=(1, 200))
    fit = fit_descan(centers, sigmas)
    assert fit.coefficients_y[2] == pytest.approx(Y[2], abs=0.1)
    assert fit.coefficients_y[1] == pytest.approx(0, abs=1e-9)
    assert np.abs(fit.centers((1, 200)) - drift(shape=(1, 200))).max() < 0.1


def test_centers_without_any_scatter_are_no_trouble():
    fit = fit_descan(drift(), np.zeros((2, *SCAN)))
    assert fit.coefficients_y == pytest.approx(Y, abs=1e-6)
    assert fit.outliers == 0


def test_a_large_scan_is_fitted_by_a_share_of_its_centers():
    centers, sigmas, _ = measured(7, shape=(300, 400))
    fit = fit_descan(centers.astype(np.float32), sigmas.astype(np.float32))
    assert np.abs(deviations(fit)).max() < 4.5


def test_how_far_the_center_drifts():
    plane = Descan(
        coefficients_y=(5, 3, 0), coefficients_x=(6, 0, -4), sigma_y=(0.1,) * 3,
        sigma_x=(0.1,) * 3, residual=(0, 0), outliers=0,
    )  # fmt: skip
    assert plane.drift == pytest.approx(10)
    assert plane.centers((3, 3))[:, 0, 0] == pytest.approx((2, 10))


@pytest.mark.parametrize("wrong", [{"sigma_x": (1.0,)}, {"coefficients_y": (1.0, 2.0)}])
def test_a_fit_whose_parts_do_not_belong_together_is_refused(wrong):
    good = fit_descan(*measured()[:2]).model_dump()
    with pytest.raises(ValidationError, match="three coefficients"):
        Descan(**(good | wrong))
