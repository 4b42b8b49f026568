"""The distortion's conventions and the one resampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_engines.geometry import UNKNOWN_ANGLE_SIGMA, Ellipticity, reference_center
from prenet4d_engines.resample import recentered_sum, resample

ellipticities = st.builds(
    Ellipticity, st.floats(1.0, 1.5), st.floats(-10, 10, allow_nan=False, allow_infinity=False)
)


def ring(
    shape: tuple[int, int],
    center: tuple[float, float],
    ellipticity: Ellipticity,
    radius: float,
    width: float = 2.0,
) -> torch.Tensor:
    """A ring as the detector sees it: raw(q) shows the ideal pattern at D⁻¹ (q − c)."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    inverse = np.linalg.inv(ellipticity.matrix)
    u = inverse @ np.stack([(x - center[1]).ravel(), (y - center[0]).ravel()])
    r = np.hypot(*u).reshape(shape)
    return torch.tensor(100 * np.exp(-((r - radius) ** 2) / (2 * width**2)), dtype=torch.float32)


def spot(shape: tuple[int, int], center: tuple[float, float], sigma: float = 2.0) -> torch.Tensor:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    r2 = (y - center[0]) ** 2 + (x - center[1]) ** 2
    return torch.tensor(1000 * np.exp(-r2 / (2 * sigma**2)), dtype=torch.float32)


def centroid(image: torch.Tensor) -> tuple[float, float]:
    image = image.nan_to_num(0.0).double()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    total = float(image.sum())
    return (
        float((image * torch.tensor(y)).sum()) / total,
        float((image * torch.tensor(x)).sum()) / total,
    )


def second_moments(image: torch.Tensor) -> np.ndarray:
    """(2, 2) covariance of the intensity, in (x, y)."""
    image = image.nan_to_num(0.0).double()
    cy, cx = centroid(image)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    r = np.stack([(x - cx).ravel(), (y - cy).ravel()])
    weights = image.numpy().ravel() / float(image.sum())
    return (r * weights) @ r.T


class TestEllipticity:
    def test_a_circle_becomes_the_ellipse_that_the_distortion_makes_of_it(self):
        y, x = Ellipticity(1.21, 0.5).ring((50.0, 60.0), 10.0)
        distance = np.hypot(y - 50, x - 60)
        assert distance.max() == pytest.approx(11.0, rel=1e-3)
        assert distance.min() == pytest.approx(10 / 1.1, rel=1e-3)
        far = distance.argmax()
        assert np.arctan2(y[far] - 50, x[far] - 60) % np.pi == pytest.approx(0.5, abs=0.04)

    def test_theta_is_the_direction_of_the_major_axis_from_columns_toward_rows(self):
        steep = Ellipticity(1.21, math.pi / 2)
        # A circle becomes an ellipse: points on the +y axis (rows) move outward by √ratio.
        np.testing.assert_allclose(steep.matrix @ [0, 1], [0, 1.1], atol=1e-12)
        np.testing.assert_allclose(steep.matrix @ [1, 0], [1 / 1.1, 0], atol=1e-12)
        oblique = Ellipticity(1.44, math.pi / 4).matrix @ [1, 1]
        np.testing.assert_allclose(oblique, [1.2, 1.2], atol=1e-12)

    @given(ellipticities)
    def test_matrix_is_the_documented_product(self, e: Ellipticity):
        c, s = math.cos(e.theta), math.sin(e.theta)
        R = np.array([[c, -s], [s, c]])
        expected = R @ np.diag([math.sqrt(e.ratio), 1 / math.sqrt(e.ratio)]) @ R.T
        np.testing.assert_allclose(e.matrix, expected, atol=1e-12)
        assert np.linalg.det(e.matrix) == pytest.approx(1)

    @given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
    def test_vector_round_trip(self, v0: float, v1: float):
        e = Ellipticity.from_vector(v0, v1)
        np.testing.assert_allclose(e.vector, (v0, v1), atol=1e-12)
        assert e.ratio >= 1
        assert 0 <= e.theta < math.pi

    @given(ellipticities)
    def test_matrix_round_trip_and_inverse(self, e: Ellipticity):
        np.testing.assert_allclose(Ellipticity.from_matrix(e.matrix).vector, e.vector, atol=1e-7)
        np.testing.assert_allclose(e.matrix @ e.inverse.matrix, np.eye(2), atol=1e-12)
        assert e.compose(e.inverse).ratio == pytest.approx(1, abs=1e-7)

    @given(ellipticities, ellipticities)
    def test_composition_makes_the_same_rings_as_both_in_turn(self, a: Ellipticity, b: Ellipticity):
        both = a.matrix @ b.matrix
        one = a.compose(b).matrix
        np.testing.assert_allclose(one @ one.T, both @ both.T, atol=1e-7)

    def test_along_one_axis_logarithms_add(self):
        composed = Ellipticity(1.02, 0.4).compose(Ellipticity(1.03, 0.4))
        assert composed.ratio == pytest.approx(1.02 * 1.03)
        assert composed.theta == pytest.approx(0.4)

    def test_sigmas(self):
        ratio_sigma, theta_sigma = Ellipticity(1.05, 1.0).sigmas(0.001)
        assert ratio_sigma == pytest.approx(0.00105)
        assert theta_sigma == pytest.approx(0.001 / (2 * math.log(1.05)))
        assert Ellipticity().sigmas(0.001)[1] == UNKNOWN_ANGLE_SIGMA

    @pytest.mark.parametrize("ratio", [0.99, math.nan, math.inf])
    def test_impossible_ratios_are_refused(self, ratio: float):
        with pytest.raises(ValueError, match="a/b ≥ 1"):
            Ellipticity(ratio, 0.0)

    def test_mirroring_is_no_distortion(self):
        with pytest.raises(ValueError, match="positive determinant"):
            Ellipticity.from_matrix(np.diag([1.0, -1.0]))


class TestResample:
    @pytest.mark.parametrize("shape", [(96, 96), (97, 128), (128, 75)])
    def test_an_ellipse_becomes_a_centered_circle(self, shape: tuple[int, int]):
        distortion = Ellipticity(1.08, 0.7)
        center = (shape[0] / 2 + 2.3, shape[1] / 2 - 3.6)
        raw = ring(shape, center, distortion, 20)
        reference = reference_center(shape)
        before = np.linalg.eigvalsh(second_moments(raw))
        out = resample(raw[None, None], torch.tensor([center]), reference, distortion)[0, 0]
        expected = ring(shape, reference, Ellipticity(), 20)
        seen = out.isfinite()
        assert float((out - expected)[seen].abs().max()) < 0.5
        after = np.linalg.eigvalsh(second_moments(out))
        assert before[1] / before[0] > 1.16
        assert after[1] / after[0] == pytest.approx(1, abs=1e-3)
        assert centroid(out) == pytest.approx(reference, abs=0.01)

    @given(st.floats(-5, 5), st.floats(-5, 5))
    def test_shifts_are_exact_and_keep_the_counts(self, dy: float, dx: float):
        center = (31.5 + dy, 31.5 + dx)
        raw = spot((64, 64), center)
        out = resample(raw[None, None], torch.tensor([center]), (31.5, 31.5), Ellipticity())[0, 0]
        assert centroid(out) == pytest.approx((31.5, 31.5), abs=0.01)
        assert float(out.nansum()) == pytest.approx(float(raw.sum()), rel=1e-3)

    def test_counts_are_kept_under_distortion(self):
        raw = ring((96, 96), (47.2, 48.9), Ellipticity(1.1, 2.0), 18)
        out = resample(
            raw[None, None], torch.tensor([[47.2, 48.9]]), (47.5, 47.5), Ellipticity(1.1, 2.0)
        )
        assert float(out.nansum()) == pytest.approx(float(raw.sum()), rel=1e-3)

    def test_nothing_to_do_changes_nothing(self):
        images = torch.rand(3, 2, 33, 40)
        reference = reference_center((33, 40))
        out = resample(images, torch.tensor([reference] * 3), reference, Ellipticity())
        torch.testing.assert_close(out, images, atol=1e-4, rtol=0)

    def test_a_gradient_stays_a_gradient(self):
        y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
        out = resample(
            (3 * y - 2 * x)[None, None], torch.tensor([[20.3, 18.8]]), (19.5, 19.5), Ellipticity()
        )[0, 0]
        inner = (3 * (y + 0.8) - 2 * (x - 0.7))[3:-3, 3:-3]
        torch.testing.assert_close(out[3:-3, 3:-3], inner, atol=1e-3, rtol=0)

    def test_pixels_without_a_source_are_marked(self):
        out = resample(
            torch.ones(1, 1, 20, 30), torch.tensor([[9.5, 17.5]]), (9.5, 14.5), Ellipticity()
        )
        # The content moves 3 to the left: the last three columns have no source.
        assert out[0, 0, :, 27:].isnan().all()
        assert out[0, 0, :, :27].isfinite().all()

    def test_channels_and_frames_move_independently(self):
        centers = torch.tensor([[20.0, 25.0], [30.5, 28.25]])
        images = torch.stack(
            [torch.stack([spot((64, 64), tuple(c.tolist()))] * 2) for c in centers]
        )
        images[:, 1] *= 2
        out = resample(images, centers, (31.5, 31.5), Ellipticity())
        for frame in out:
            assert centroid(frame[0]) == pytest.approx((31.5, 31.5), abs=0.01)
            torch.testing.assert_close(frame[1], 2 * frame[0], equal_nan=True)
        assert out[:, 0].is_contiguous() or out[:, 0][0].is_contiguous()

    @given(st.floats(-1, 1), st.floats(-1, 1))
    def test_bad_pixels_do_not_bleed(self, dy: float, dx: float):
        """Whatever a masked pixel holds, the rest is what its surroundings say, or NaN."""
        valid = torch.ones(32, 32, dtype=torch.bool)
        valid[10, 12] = valid[20:22] = False
        image = torch.full((32, 32), 7.0)
        image[~valid] = 1e6
        center = torch.tensor([[15.5 + dy, 15.5 + dx]])
        out = resample(image[None, None], center, (15.5, 15.5), Ellipticity(1.02, 1.0), valid)
        seen = out.isfinite()
        torch.testing.assert_close(out[seen], torch.full_like(out[seen], 7.0), atol=1e-3, rtol=0)
        lost = int((~seen[0, 0, 3:-3, 3:-3]).sum())
        assert 2 * 26 <= lost <= 5 * 26 + 9


class TestRecenteredSum:
    @given(st.floats(-6, 6), st.floats(-6, 6))
    def test_it_moves_like_the_resampling(self, dy: float, dx: float):
        image = spot((40, 50), (20 - dy, 24 - dx))
        total, weight = recentered_sum(image[None], torch.tensor([[dy, dx]]))
        assert centroid(total) == pytest.approx((20, 24), abs=0.01)
        assert float(total.sum()) == pytest.approx(float(image.sum()), rel=1e-3)
        assert float(weight[10:30, 10:40].sub(1).abs().max()) < 1e-5

    def test_sums_merge_by_addition(self):
        images, shifts = torch.rand(4, 24, 24), torch.randn(4, 2)
        both = recentered_sum(images, shifts)
        parts = [recentered_sum(images[i : i + 2], shifts[i : i + 2]) for i in (0, 2)]
        for k in range(2):
            torch.testing.assert_close(both[k], parts[0][k] + parts[1][k])

    def test_dithering_fills_what_is_masked(self):
        valid = torch.ones(32, 32, dtype=torch.bool)
        valid[:, 16] = False
        image = torch.full((32, 32), 5.0)
        image[~valid] = 1e6
        shifts = torch.tensor([[0.0, float(k)] for k in range(-3, 4)])
        total, weight = recentered_sum(image.expand(7, 32, 32), shifts, valid)
        inner = (total / weight)[4:-4, 4:-4]
        torch.testing.assert_close(inner, torch.full_like(inner, 5.0))

    def test_a_shift_beyond_the_frame_leaves_nothing(self):
        total, weight = recentered_sum(torch.ones(1, 16, 16), torch.tensor([[40.0, 0.0]]))
        assert not total.any()
        assert not weight.any()
