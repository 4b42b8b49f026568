"""The virtual detectors: what they count, where they look, and how they find their radii."""

import math

import numpy as np
import pytest
import torch
from moments import MomentBackend

from prenet4d_engines import Corrector, CorrectorConfig, DetectorRadii, IdentityCorrector
from prenet4d_engines.errors import FrameError
from prenet4d_engines.virtual import VirtualDetectors, beam_radius, figures, find_radii, sums

SHAPE = (64, 80)
CENTER = (31.5, 39.5)
RADII = DetectorRadii(8.0, 12.0, 20.0)


def distance(center=CENTER, shape=SHAPE):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(y - center[0], x - center[1])


def detectors(radii=RADII):
    made = VirtualDetectors(SHAPE, CENTER)
    made.set(radii)
    return made


def measure(patterns, radii=RADII):
    """Patterns seen on a torch device, as the columns of ``VIRTUAL_NAMES``."""
    on_device = torch.from_numpy(patterns.astype(np.float32))
    weights = torch.from_numpy(detectors(radii).weights)
    return figures(sums(on_device, weights).numpy()).T


class TestMeasuring:
    def test_a_disk_and_a_ring_count_what_falls_on_them(self):
        r = distance()
        patterns = np.stack([r < 5, (r > 14) & (r < 18), (r > 25) & (r < 30)]).astype(float)
        bright, dark, total, _, _ = measure(patterns)
        sums = patterns.sum((1, 2))
        np.testing.assert_allclose(bright, [sums[0], 0, 0])
        np.testing.assert_allclose(dark, [0, sums[1], 0])
        np.testing.assert_allclose(total, sums)

    def test_their_areas_are_those_of_their_radii_not_of_whole_pixels(self):
        flat = np.ones((1, *SHAPE))
        for radius in (7.8, 8.0, 8.3):
            bright, dark, _, _, _ = measure(flat, DetectorRadii(radius, radius, 20.0))
            assert bright[0] == pytest.approx(math.pi * radius**2, rel=0.01)
            assert bright[0] + dark[0] == pytest.approx(math.pi * 20**2, rel=0.01)

    @pytest.mark.parametrize("offset", [(0.0, 0.0), (2.5, -3.25)])
    def test_the_center_of_mass_is_told_from_the_reference(self, offset):
        spot = np.exp(-(distance((CENTER[0] + offset[0], CENTER[1] + offset[1])) ** 2) / 18)
        _, _, _, y, x = measure(1000 * spot[None])
        assert (y[0], x[0]) == pytest.approx(offset, abs=1e-3)

    def test_pixels_without_a_source_count_nothing(self):
        pattern = np.where(distance() < 5, 3.0, 0.0)
        pattern[:, :20] = np.nan
        pattern[31, 39] = np.nan
        bright, _, total, y, _ = measure(pattern[None])
        assert bright[0] == total[0] == np.nansum(pattern)
        assert np.isfinite(y).all()

    def test_no_counts_have_no_center_of_mass(self):
        bright, dark, total, y, x = measure(np.zeros((2, *SHAPE)))
        assert [one.any() for one in (bright, dark, total)] == [False] * 3
        assert np.isnan(y).all()
        assert np.isnan(x).all()

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
    def test_frames_in_numpy_are_seen_alike(self, dtype):
        frames = np.random.default_rng(0).poisson(3.0, (4, *SHAPE)).astype(dtype)
        by_numpy = detectors().measure_frames(frames, None)
        np.testing.assert_allclose(by_numpy.T, measure(frames), rtol=1e-4, atol=1e-3)

    def test_bad_values_and_masked_pixels_of_frames_count_nothing(self):
        frames = np.ones((1, *SHAPE), np.float32)
        frames[0, 31, 36:39] = np.nan, np.inf, -5
        valid = np.ones(SHAPE, bool)
        valid[30] = False
        sums = detectors().measure_frames(frames, valid)[0]
        assert sums[2] == SHAPE[0] * SHAPE[1] - SHAPE[1] - 3

    @pytest.mark.parametrize(
        "radii", [(0, 1, 2), (3, 5, 5), (3, 6, 5), (3, -1, 5), (math.nan, 1, 2), (3, 1, math.inf)]
    )
    def test_radii_that_make_no_sense_are_refused(self, radii):
        with pytest.raises(FrameError, match="inner radius"):
            DetectorRadii(*radii)


class TestFindingRadii:
    @pytest.mark.parametrize("radius", [2.0, 4.5, 9.0, 15.5])
    @pytest.mark.parametrize("scattered", [0.0, 0.2])
    def test_the_direct_beam_is_measured(self, radius, scattered):
        disk = 1 / (1 + np.exp((distance() - radius) / 0.3))
        rings = scattered * (np.abs(distance() - 2.2 * radius) < 2)
        noisy = np.random.default_rng(1).poisson(200 * (disk + rings) + 0.2).astype(float)
        assert beam_radius(noisy, CENTER) == pytest.approx(radius, abs=0.5)

    def test_it_is_found_around_another_reference_and_despite_missing_pixels(self):
        disk = np.where(distance((20.0, 50.0)) < 7, 10.0, 0.1)
        disk[:, 52] = np.nan
        assert beam_radius(disk, (20.0, 50.0)) == pytest.approx(7, abs=0.5)

    @pytest.mark.parametrize("mean", [np.zeros(SHAPE), np.full(SHAPE, np.nan), np.full(SHAPE, 7.0)])
    def test_without_a_beam_a_share_of_the_frame_stands_in(self, mean):
        radii = find_radii(mean, CENTER)
        assert radii.bright_field_radius == pytest.approx(1.1 * 8 + 1)
        assert radii.annular_outer == 32

    def test_the_ring_has_a_width_even_where_the_beam_fills_the_frame(self):
        mean = np.where(distance() < 31, 5.0, 0.0)
        radii = find_radii(mean, CENTER)
        assert radii.annular_outer > radii.annular_inner > radii.bright_field_radius

    def test_they_stay_once_enough_patterns_were_seen(self):
        made = VirtualDetectors(SHAPE, CENTER)
        assert (made.radii, made.searching) == (None, True)
        made.find(np.where(distance() < 5, 1.0, 0.0), 10)
        first = made.radii
        made.find(np.where(distance() < 9, 1.0, 0.0), 64)
        assert made.radii.bright_field_radius > first.bright_field_radius
        assert not made.searching
        made.recenter((30.0, 30.0))
        assert made.searching

    def test_the_operators_radii_win_until_they_are_taken_back(self):
        made = VirtualDetectors(SHAPE, CENTER)
        made.find(np.where(distance() < 5, 1.0, 0.0), 64)
        found = made.radii
        made.set(RADII)
        assert (made.radii, made.automatic, made.searching) == (RADII, False, False)
        made.set(None)
        assert (made.radii, made.automatic, made.searching) == (found, True, True)


def frames_of(offsets, radius=6.0, dose=20_000):
    """(n, 64, 80) uint16 noisy disks whose centers are off by these from the middle."""
    rng = np.random.default_rng(2)
    disks = [
        1 / (1 + np.exp((distance((CENTER[0] + y, CENTER[1] + x)) - radius) / 0.3))
        for y, x in offsets
    ]
    return np.stack([rng.poisson(dose * d / d.sum()) for d in disks]).astype(np.uint16)


class TestInTheCorrectors:
    def test_they_look_at_raw_counts_after_the_geometrical_correction(self):
        frames = frames_of([(0, 0), (2, -3), (-1.5, 2.5)] * 8)
        corrector = Corrector(SHAPE, backend=MomentBackend())
        corrector.process(frames, np.arange(24))
        batch = corrector.process(frames, np.arange(24, 48))
        bright, dark, total, y, x = batch.virtual.T
        np.testing.assert_allclose(total, np.nansum(batch.aligned, (1, 2)), rtol=1e-5)
        np.testing.assert_allclose(total, frames.sum((1, 2)), rtol=2e-3)
        assert batch.detectors.bright_field_radius == pytest.approx(7.6, abs=0.8)
        assert (bright > 0.97 * total).all()
        assert (dark < 0.03 * total).all()
        np.testing.assert_allclose(y, 0, atol=0.3)
        np.testing.assert_allclose(x, 0, atol=0.3)

    def test_masked_pixels_are_left_out(self):
        frames = frames_of([(0, 0)] * 8)
        mask = np.ones(SHAPE, bool)
        mask[31, 39] = False
        frames[:, 31, 39] = 60_000
        batch = Corrector(SHAPE, backend=MomentBackend(), pixel_mask=mask).process(
            frames, np.arange(8)
        )
        assert (batch.virtual[:, 2] < 25_000).all()

    @pytest.mark.parametrize("kind", ["corrector", "identity"])
    def test_the_operators_radii_and_reference_hold_for_the_frames_after(self, kind):
        frames = frames_of([(0, 0)] * 8)
        config = CorrectorConfig()
        corrector = (
            IdentityCorrector(SHAPE)
            if kind == "identity"
            else Corrector(SHAPE, backend=MomentBackend(), config=config)
        )
        assert corrector.process(frames, np.arange(8)).detectors.bright_field_radius > 6
        with pytest.raises(FrameError, match="DetectorRadii"):
            corrector.set_detectors((3.0, 20.0, 22.0))  # later frames would fail by it
        corrector.set_detectors(DetectorRadii(3.0, 20.0, 22.0))
        corrector.set_reference_center((30.0, 36.0))
        batch = corrector.process(frames, np.arange(8, 16))
        assert batch.detectors == DetectorRadii(3.0, 20.0, 22.0)
        assert (batch.virtual[:, 0] < 0.5 * batch.virtual[:, 2]).all()
        assert batch.reference_center == (30.0, 36.0)
        corrector.set_detectors(None)
        assert corrector.process(frames, np.arange(16, 24)).detectors.bright_field_radius > 4
        corrector.set_reference_center(None)
        assert corrector.process(frames, np.arange(24, 32)).reference_center == CENTER

    def test_the_identity_looks_at_frames_as_they_are_and_only_if_asked(self):
        frames = frames_of([(2, -3)] * 4)
        wanted = [True]
        corrector = IdentityCorrector(SHAPE, wants_virtual=lambda: wanted[0])
        batch = corrector.process(frames, np.arange(4))
        np.testing.assert_allclose(batch.virtual[:, 2], frames.sum((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(batch.virtual[:, 3:], [(2, -3)] * 4, atol=0.2)
        wanted[0] = False
        batch = corrector.process(frames, np.arange(4))
        assert (batch.virtual, batch.detectors) == (None, None)

    def test_blank_frames_are_no_trouble(self):
        blank = np.zeros((3, *SHAPE), np.uint16)
        for corrector in (IdentityCorrector(SHAPE), Corrector(SHAPE, backend=MomentBackend())):
            batch = corrector.process(blank, np.arange(3))
            assert (batch.virtual[:, :3] == 0).all()
            assert np.isnan(batch.virtual[:, 3:]).all()
