"""The three-stage corrector: what goes in, what comes out, and what it remembers."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moments import MomentBackend

from prenet4d_engines import (
    Calibration,
    Corrector,
    CorrectorConfig,
    Ellipticity,
    FrameFlag,
    IdentityCorrector,
)
from prenet4d_engines.errors import CalibrationError, FrameError
from prenet4d_engines.geometry import reference_center
from prenet4d_engines.simulate import Drift, simulate_scan

SHAPE = (96, 112)
QUICK = CorrectorConfig(
    ellipse_every=16, patterns_to_lock=32, averaging_window=96, lost_after=2, min_dose=500
)
DISTORTION = Ellipticity(1.05, 0.6)


def expected(center, distortion=DISTORTION, dose=30_000.0, shape=SHAPE, radius=24.0):
    """(h, w) expected counts of a ring as the detector sees it."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    points = np.stack([(x - center[1]).ravel(), (y - center[0]).ravel()])
    r = np.hypot(*(np.linalg.inv(distortion.matrix) @ points)).reshape(shape)
    ring = np.exp(-((r - radius) ** 2) / (2 * 1.5**2))
    return ring * dose / ring.sum()


def centers_of(n: int, seed: int = 0) -> np.ndarray:
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 0.1, (n, 2)), axis=0)
    cy, cx = reference_center(SHAPE)
    return walk + np.array((cy + 3.2, cx - 4.7))


def rings(n: int, seed: int = 0, distortion=DISTORTION, dose=30_000.0):
    """n noisy ring frames uint16 with drifting centers, and these."""
    random = np.random.default_rng(seed)
    centers = centers_of(n, seed)
    frames = [random.poisson(expected(c, distortion, dose)) for c in centers]
    return np.stack(frames).astype(np.uint16), centers


def make(**changes) -> Corrector:
    given = {"config": QUICK, "backend": MomentBackend(), **changes}
    return Corrector(SHAPE, **given)


def run(corrector, frames, start=0, size=16):
    """Process frames in batches; return the last batch."""
    for i in range(0, len(frames), size):
        part = frames[i : i + size]
        batch = corrector.process(part, np.arange(start + i, start + i + len(part)))
    return batch


def roundness(pattern: np.ndarray) -> float:
    """Major over minor axis of the intensity's second moments, less the circle's 1."""
    y, x = np.mgrid[: pattern.shape[0], : pattern.shape[1]]
    weight = np.nan_to_num(pattern) / np.nansum(pattern)
    points = np.stack([y.ravel(), x.ravel()])
    covariance = np.cov(points, aweights=weight.ravel().clip(0))
    low, high = np.linalg.eigvalsh(covariance)
    return math.sqrt(high / low) - 1


class TestCorrection:
    def test_patterns_come_out_centered_and_round(self):
        corrector = make()
        frames, centers = rings(80)
        run(corrector, frames[:64])
        batch = corrector.process(frames[64:], np.arange(64, 80))
        assert batch.state == "locked"
        assert batch.ellipticity.ratio == pytest.approx(DISTORTION.ratio, abs=0.004)
        assert batch.ellipticity.theta == pytest.approx(DISTORTION.theta, abs=0.05)
        assert batch.ratio_sigma == pytest.approx(0.0022, rel=0.1)
        assert np.abs(batch.tracked - centers[64:]).max() < 0.5
        np.testing.assert_allclose(
            batch.shift, np.array(batch.reference_center) - batch.tracked, atol=1e-4
        )
        assert roundness(frames[64:].sum(0)) > 0.04
        for patterns in (batch.corrected, batch.aligned):
            assert patterns.shape == (16, *SHAPE)
            assert patterns.dtype == np.float32
            assert patterns.flags.c_contiguous
            assert roundness(patterns.mean(0)) < 0.01
        np.testing.assert_allclose(
            np.nansum(batch.aligned, (1, 2)), frames[64:].sum((1, 2)), rtol=0.001
        )

    def test_the_callers_array_of_indices_may_be_used_again(self):
        frames, _ = rings(2)
        indices = np.arange(2, dtype=np.uint16)
        batch = make().process(frames, indices)
        indices += 2
        assert batch.indices.tolist() == [0, 1]
        assert batch.indices.dtype == np.int64

    def test_every_array_has_its_announced_form(self):
        frames, _ = rings(5)
        batch = make().process(frames, np.arange(5))
        for name in (
            "center", "center_sigma", "tracked", "tracked_sigma", "shift", "shift_sigma",
        ):  # fmt: skip
            array = getattr(batch, name)
            assert (array.shape, array.dtype) == ((5, 2), np.float32), name
        assert (batch.dose.shape, batch.dose.dtype) == ((5,), np.float32)
        assert (batch.flags.shape, batch.flags.dtype) == ((5,), np.uint8)
        assert (batch.virtual.shape, batch.virtual.dtype) == ((5, 5), np.float32)
        np.testing.assert_array_equal(batch.indices, np.arange(5))

    def test_raw_counts_stay_raw(self):
        """Where shift and ellipse ask for nothing, aligned is the frame itself."""
        center = (47.0, 56.0)
        frame = np.round(expected(center, Ellipticity())).astype(np.uint16)[None]
        config = QUICK.model_copy(update={"reference_center": center, "center_mode": "single"})
        batch = make(config=config).process(frame, np.array([0]))
        np.testing.assert_allclose(batch.aligned[0], frame[0], atol=0.2)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
    def test_frame_types_make_no_difference(self, dtype):
        frames, _ = rings(3, dose=5000)
        one = make().process(frames, np.arange(3))
        other = make().process(frames.astype(dtype), np.arange(3))
        np.testing.assert_array_equal(one.corrected, other.corrected)

    def test_gain_turns_counts_into_electrons_and_back(self):
        frames, _ = rings(3, dose=5000)
        plain = make().process(frames, np.arange(3))
        scaled = make(gain=4.0).process(frames * 4, np.arange(3))
        np.testing.assert_allclose(scaled.dose, plain.dose, rtol=1e-5)
        np.testing.assert_allclose(scaled.corrected, 4 * plain.corrected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(scaled.aligned, 4 * plain.aligned, rtol=1e-3, atol=1e-2)

    def test_single_mode_applies_each_frames_own_center(self):
        frames, _ = rings(12)
        config = QUICK.model_copy(update={"center_mode": "single"})
        batch = make(config=config).process(frames, np.arange(12))
        np.testing.assert_allclose(
            batch.shift, np.array(batch.reference_center) - batch.center, atol=1e-4
        )
        assert np.abs(batch.center - batch.tracked).max() > 0

    def test_masked_pixels_never_pull(self):
        frames, _ = rings(4)
        mask = np.ones(SHAPE, dtype=bool)
        mask[40:43] = mask[:, 70] = False
        broken = frames.copy()
        broken[:, ~mask] = 60_000
        masked = make(pixel_mask=mask).process(broken, np.arange(4))
        zeroed = frames * mask
        np.testing.assert_allclose(masked.dose, zeroed.sum((1, 2)), rtol=1e-5)
        seen = np.isfinite(masked.aligned)
        assert 0.8 < seen.mean() < 0.98
        assert masked.aligned[seen].max() < 2 * frames.max()
        assert masked.corrected[seen].max() < 2 * frames.max()

    def test_any_split_into_batches_gives_the_same_mean(self):
        frames, _ = rings(40)
        one, other = make(), make()
        run(one, frames, size=40)
        run(other, frames, size=7)
        (first, n), (second, m) = one.mean(), other.mean()
        assert n == m == 40
        np.testing.assert_allclose(first, second, atol=1e-2, equal_nan=True)
        assert np.nansum(first) == pytest.approx(30_000, rel=0.02)

    def test_nothing_in_nothing_out(self):
        batch = make().process(np.zeros((0, *SHAPE), np.uint16), np.zeros(0, np.int64))
        assert batch.corrected.shape == (0, *SHAPE)
        assert batch.patterns_averaged == 0


class TestStates:
    def test_a_reading_applies_from_the_next_batch(self):
        corrector = make()
        frames, _ = rings(32)
        first = corrector.process(frames[:16], np.arange(16))
        assert first.ellipticity == Ellipticity()
        assert first.ratio_sigma is None
        assert first.state == "calibrating"
        second = corrector.process(frames[16:], np.arange(16, 32))
        assert second.ellipticity.ratio > 1.04

    def test_it_locks_when_certain_and_is_lost_when_the_lens_changes(self):
        corrector = make()
        assert run(corrector, rings(48)[0]).state == "locked"
        changed = Ellipticity(1.09, 2.2)
        frames, _ = rings(80, seed=1, distortion=changed)
        first = corrector.process(frames[:16], np.arange(48, 64))
        assert first.state == "locked"
        second = corrector.process(frames[16:32], np.arange(64, 80))
        assert second.state == "lost"
        last = run(corrector, frames[32:], start=80)
        assert last.state == "locked"
        assert last.ellipticity.ratio == pytest.approx(changed.ratio, abs=0.01)
        assert last.ellipticity.theta == pytest.approx(changed.theta, abs=0.05)

    def test_one_odd_window_is_no_reason_to_give_up(self):
        corrector = make()
        run(corrector, rings(48)[0])
        odd, _ = rings(16, seed=1, distortion=Ellipticity(1.09, 2.2))
        run(corrector, odd, start=48)
        last = run(corrector, rings(32, seed=2)[0], start=64)
        assert last.state == "locked"
        assert last.patterns_averaged == 96

    def test_it_is_lost_without_a_beam_and_found_with_it(self):
        corrector = make()
        run(corrector, rings(48)[0])
        dark = np.zeros((32, *SHAPE), np.uint16)
        batch = run(corrector, dark, start=48)
        assert batch.state == "lost"
        assert batch.patterns_averaged == 48
        assert run(corrector, rings(32, seed=3)[0], start=80).state == "locked"

    def test_the_beams_absence_is_seen_however_frames_were_batched(self):
        corrector = make()
        run(corrector, rings(48)[0])
        dark = np.zeros((32, *SHAPE), np.uint16)
        batch = run(corrector, np.concatenate([dark, rings(1)[0]]), start=48, size=33)
        assert batch.state == "lost"

    def test_what_was_found_stands_without_a_beam_wherever_centers_are_moved(self):
        corrector = make()
        run(corrector, rings(48)[0])
        assert run(corrector, np.zeros((32, *SHAPE), np.uint16), start=48).state == "lost"
        assert corrector.stands
        corrector.set_reference_center((40.0, 50.0))
        assert corrector.stands

    def test_frozen_keeps_its_ellipticity(self):
        corrector = make()
        before = run(corrector, rings(48)[0])
        corrector.freeze()
        changed = rings(64, seed=1, distortion=Ellipticity(1.09, 2.2))[0]
        batch = run(corrector, changed, start=48)
        assert batch.state == "frozen"
        assert batch.ellipticity == corrector.calibration().ellipticity
        assert batch.ellipticity.ratio == pytest.approx(before.ellipticity.ratio, abs=0.005)
        corrector.unfreeze()
        assert run(corrector, changed[:16], start=112).state != "frozen"

    def test_recalibrating_forgets(self):
        corrector = make()
        run(corrector, rings(48)[0])
        corrector.freeze()
        corrector.recalibrate()
        batch = corrector.process(rings(4)[0], np.arange(48, 52))
        assert batch.state == "calibrating"
        assert batch.ellipticity == Ellipticity()
        assert batch.patterns_averaged == 4

    def test_old_patterns_fade_out_of_the_mean(self):
        corrector = make()
        batch = run(corrector, rings(160)[0])
        assert batch.patterns_averaged == QUICK.averaging_window

    def test_a_reading_that_knows_nothing_is_not_applied(self):
        config = QUICK.model_copy(update={"max_ellipse_sigma": 0.001})
        batch = run(make(config=config), rings(64)[0])
        assert batch.state == "calibrating"
        assert batch.ellipticity == Ellipticity()


class TestCarryingOver:
    def test_a_calibration_serves_the_next_scan_at_once(self):
        corrector = make()
        run(corrector, rings(48)[0])
        saved = corrector.calibration()
        assert saved.patterns == 48
        again = make(calibration=Calibration.from_json(saved.to_json()))
        batch = again.process(rings(4, seed=5)[0], np.arange(4))
        assert batch.state == "locked"
        assert batch.ellipticity.ratio == pytest.approx(saved.ratio)
        assert batch.ratio_sigma == pytest.approx(saved.ratio_sigma)
        assert roundness(batch.aligned.mean(0)) < 0.015

    def test_it_is_told_as_what_it_is_until_the_scan_has_a_reading_of_its_own(self):
        given = Calibration(
            ratio=1.05, theta=0.6, reference_center=(47.5, 55.5), frame_shape=SHAPE,
            detector="ours", how="by hand",
        )  # fmt: skip
        corrector = make(calibration=given)
        batch = run(corrector, rings(16)[0])
        assert (batch.ratio_sigma, batch.theta_sigma) == (None, None)
        assert corrector.calibration() == given
        corrector.set_reference_center((40.0, 50.0))
        moved = given.model_copy(update={"reference_center": (40.0, 50.0)})
        assert corrector.calibration() == moved
        run(corrector, rings(48)[0], start=16)
        own = corrector.calibration()
        assert own.ratio_sigma > 0
        assert (own.patterns, own.how) == (48, "ellipse network on the running mean, locked")

    def test_it_holds_until_the_scan_has_a_mean_of_its_own(self):
        given = Calibration(ratio=1.06, theta=0.6, reference_center=(47.5, 55.5), frame_shape=SHAPE)
        corrector = make(calibration=given)
        early = run(corrector, rings(31)[0])
        assert early.ellipticity.ratio == pytest.approx(1.06)
        late = run(corrector, rings(64, seed=1)[0], start=31)
        assert late.ellipticity.ratio == pytest.approx(1.05, abs=0.005)

    def test_it_holds_where_the_scan_begins_in_the_dark(self):
        given = Calibration(ratio=1.06, theta=0.6, reference_center=(47.5, 55.5), frame_shape=SHAPE)
        corrector = make(calibration=given)
        assert run(corrector, np.zeros((32, *SHAPE), np.uint16)).state == "lost"
        early = run(corrector, rings(17)[0], start=32)
        assert early.ellipticity == given.ellipticity
        assert early.state == "locked"

    def test_a_less_certain_reading_that_agrees_does_not_replace_it(self):
        given = Calibration(
            ratio=1.051, theta=0.6, ratio_sigma=1e-4, theta_sigma=1e-3,
            reference_center=(47.5, 55.5), frame_shape=SHAPE,
        )  # fmt: skip
        corrector = make(calibration=given)
        assert run(corrector, rings(80)[0]).state == "locked"
        assert corrector.calibration() == given
        other = given.model_copy(update={"ratio": 1.065})
        corrector = make(calibration=other)
        assert run(corrector, rings(80)[0]).ellipticity.ratio == pytest.approx(1.05, abs=0.005)

    def test_one_that_contradicts_the_scan_is_lost(self):
        given = Calibration(ratio=1.2, theta=2.0, reference_center=(47.5, 55.5), frame_shape=SHAPE)
        corrector = make(calibration=given)
        assert run(corrector, rings(32)[0]).state == "lost"
        assert run(corrector, rings(48)[0], start=32).ellipticity.ratio == pytest.approx(
            1.05, abs=0.005
        )

    def test_the_reference_center_comes_along_unless_it_is_set(self):
        given = Calibration(ratio=1.0, theta=0.0, reference_center=(40.0, 50.0), frame_shape=SHAPE)
        assert make(calibration=given).reference_center == (40.0, 50.0)
        config = QUICK.model_copy(update={"reference_center": (44.0, 51.0)})
        assert make(calibration=given, config=config).reference_center == (44.0, 51.0)
        batch = make(calibration=given).process(rings(1)[0], np.arange(1))
        cy, cx = np.average(
            np.indices(SHAPE).reshape(2, -1),
            axis=1,
            weights=np.nan_to_num(batch.aligned[0]).ravel(),
        )
        assert (cy, cx) == pytest.approx((40, 50), abs=0.3)

    def test_other_detectors_calibrations_are_refused(self):
        given = Calibration(ratio=1.1, theta=0, reference_center=(63, 63), frame_shape=(128, 128))
        with pytest.raises(CalibrationError, match="does not fit"):
            make(calibration=given)


class TestReferenceCenter:
    def test_patterns_move_there_and_the_ellipticity_stays(self):
        frames, _ = rings(80)
        corrector = make()
        before = run(corrector, frames[:64])
        corrector.set_reference_center((40.0, 60.0))
        after = corrector.process(frames[64:], np.arange(64, 80))
        assert (before.state, after.state) == ("locked", "locked")
        assert after.ellipticity == corrector.calibration().ellipticity
        assert after.reference_center == (40.0, 60.0)
        cy, cx = np.average(
            np.indices(SHAPE).reshape(2, -1),
            axis=1,
            weights=np.nan_to_num(after.aligned.mean(0)).ravel(),
        )
        assert (cy, cx) == pytest.approx((40.0, 60.0), abs=0.2)
        assert corrector.mean()[1] == 16
        corrector.set_reference_center(None)
        assert corrector.reference_center == reference_center(SHAPE)

    def test_one_outside_of_the_frame_is_refused_and_changes_nothing(self):
        corrector = make()
        for center in ((-1.0, 5.0), (5.0, 112.0), (math.nan, 5.0)):
            with pytest.raises(FrameError, match="96 × 112"):
                corrector.set_reference_center(center)
        with pytest.raises(FrameError, match=r"\(cy, cx\) in pixels"):
            corrector.set_reference_center((1.0, 2.0, 3.0))
        assert corrector.reference_center == reference_center(SHAPE)

    def test_it_may_be_an_array_as_centers_are(self):
        corrector = make()
        corrector.set_reference_center(np.array([40.0, 60.0]))
        assert corrector.reference_center == (40.0, 60.0)


class TestWeirdFrames:
    def test_each_is_flagged_and_none_pulls_the_track(self):
        corrector = make(saturation_value=4000, scan_shape=(2, 40))
        frames, centers = rings(40)
        frames[20] = 0
        frames[22] = np.random.default_rng(0).poisson(3, SHAPE)
        cy, cx = np.round(centers[24]).astype(int)
        frames[24, cy, cx] = 4000
        random = np.random.default_rng(1)
        frames[26] = random.poisson(expected(centers[26] + [12, 9]))
        frames[28] = random.poisson(expected(centers[28], dose=300))
        batch = corrector.process(frames, np.arange(40))
        flags = [FrameFlag(int(f)) for f in batch.flags]
        assert flags[20] == FrameFlag.BLANK | FrameFlag.LOW_DOSE | FrameFlag.NO_BEAM
        assert flags[22] == FrameFlag.NO_BEAM
        assert flags[24] & FrameFlag.SATURATED
        assert flags[26] == FrameFlag.OUTLIER
        assert flags[28] & FrameFlag.LOW_DOSE
        assert all(f == 0 for i, f in enumerate(flags) if i not in (20, 22, 24, 26, 28))
        assert np.abs(batch.tracked - centers).max() < 1
        assert np.isnan(batch.center[[20, 22]]).all()
        assert np.isinf(batch.center_sigma[[20, 22]]).all()
        assert np.nansum(batch.corrected[20]) == 0
        assert np.nansum(batch.aligned[20]) == 0
        assert batch.patterns_averaged == 37

    @pytest.mark.parametrize("gain", [0.3, 1.0, 1.1, 3.88, 7.0, 15.03])
    def test_saturation_is_seen_whatever_the_gain(self, gain):
        frames, _ = rings(2)
        frames = frames.astype(np.uint16)
        frames[1, 48, 56] = 65535
        corrector = make(gain=gain, saturation_value=65535)
        batch = corrector.process(frames, np.arange(2))
        assert (batch.flags & FrameFlag.SATURATED).astype(bool).tolist() == [False, True]

    def test_a_masked_pixel_saturates_nothing(self):
        frames, _ = rings(1)
        frames[0, 48, 56] = 65535
        mask = np.ones(SHAPE, dtype=bool)
        mask[48, 56] = False
        batch = make(pixel_mask=mask, saturation_value=65535).process(frames, np.arange(1))
        assert not batch.flags.any()

    def test_a_scan_that_begins_in_the_dark_stays_where_it_is(self):
        batch = make().process(np.zeros((3, *SHAPE), np.uint16), np.arange(3))
        np.testing.assert_array_equal(batch.shift, 0)
        assert np.isnan(batch.tracked).all()
        assert np.isinf(batch.tracked_sigma).all()
        assert np.isfinite(batch.aligned).all()

    def test_values_that_are_no_counts_count_as_zero(self):
        frames, _ = rings(2)
        wild = frames.astype(np.float32)
        wild[0, :4] = [[np.nan], [np.inf], [-np.inf], [-5]]
        clean = frames.copy()
        clean[0, :4] = 0
        found, wanted = (make().process(f, np.arange(2)) for f in (wild, clean))
        np.testing.assert_array_equal(found.aligned, wanted.aligned)

    @pytest.mark.parametrize(
        ("frames", "indices", "message"),
        [
            (np.zeros((2, 64, 64), np.uint16), np.arange(2), "not \\(2, 64, 64\\)"),
            (np.zeros(SHAPE, np.uint16), np.arange(1), "Frames come as"),
            (np.zeros((2, *SHAPE), np.int64), np.arange(2), "not int64"),
            (np.zeros((2, *SHAPE), np.uint16), np.arange(3), "one integer index"),
            (np.zeros((2, *SHAPE), np.uint16), np.zeros(2), "one integer index"),
            (np.zeros((2, *SHAPE), np.uint16), [0, 1], "not as list"),
            (torch.zeros((2, *SHAPE)), np.arange(2), "not as Tensor"),
        ],
    )
    def test_frames_of_another_kind_are_refused(self, frames, indices, message):
        corrector = make()
        with pytest.raises(FrameError, match=message):
            corrector.process(frames, indices)
        assert corrector.mean()[1] == 0

    @pytest.mark.parametrize(
        "wrong",
        [
            {"pixel_mask": np.ones((4, 4), dtype=bool)},
            {"pixel_mask": np.zeros(SHAPE, dtype=bool)},
            {"pixel_mask": np.eye(*SHAPE, dtype=np.uint32)},  # of a detector: 0 is good
            {"gain": 0.0},
            {"gain": math.nan},
            {"gain": None},
            {"gain": "two"},
            {"pixel_mask": [[True, True]] * 4},
            {"pixel_mask": [[True], [True, False]]},
            {"config": {"min_dose": 50}},
            {"scan_shape": (4, 0)},
            {"scan_shape": (-1, 8)},
            {"scan_shape": (8,)},
            {"scan_shape": (4.5, 4)},
            {"config": CorrectorConfig(reference_center=(96.0, 5.0))},
        ],
    )
    def test_impossible_detectors_are_refused(self, wrong):
        with pytest.raises(FrameError):
            make(**wrong)


@pytest.mark.parametrize("shape", [(128, 128), (192, 192), (256, 256), (515, 515), (512, 1028)])
def test_shipped_networks_take_every_detectors_shape(shape):
    mask = np.ones(shape, dtype=bool)
    mask[shape[0] // 2 - 2 : shape[0] // 2 + 2] = False
    config = CorrectorConfig(ellipse_every=2)
    corrector = Corrector(shape, pixel_mask=mask, config=config)
    frames = np.random.default_rng(0).poisson(
        np.stack([expected((shape[0] / 2, shape[1] / 2 + k), shape=shape) for k in range(3)])
    )
    batch = corrector.process(frames.astype(np.uint16), np.arange(3))
    assert batch.aligned.shape == (3, *shape)
    assert np.isfinite(batch.corrected).mean() > 0.5
    assert np.isfinite(batch.tracked).all()


def test_shipped_networks_take_no_frames_at_all():
    corrector = Corrector((64, 48))
    batch = corrector.process(np.zeros((0, 64, 48), np.uint16), np.arange(0))
    assert batch.corrected.shape == batch.aligned.shape == (0, 64, 48)
    assert batch.tracked.shape == (0, 2)
    assert batch.virtual is not None
    assert batch.virtual.shape == (0, 5)
    assert corrector.mean()[1] == 0


def test_shipped_networks_correct_a_scan():
    """Loose bounds: the figures that matter are the evaluation's."""
    scan = simulate_scan(
        (8, 16),
        (128, 128),
        kind="rings",
        dose=3e4,
        ellipticity=(1.06, 0.5),
        drift=Drift(plane=4.0, walk=0.5, jump=0.2),
        seed=20_000_001,
    )
    config = CorrectorConfig(ellipse_every=32, patterns_to_lock=64, averaging_window=128)
    corrector = Corrector((128, 128), scan_shape=(8, 16), config=config)
    frames = scan.frames()
    batches = [
        corrector.process(frames[i : i + 16], np.arange(i, i + 16)) for i in range(0, 128, 16)
    ]
    tracked = np.concatenate([b.tracked for b in batches])
    error = np.hypot(*(tracked - scan.centers).T)
    assert np.median(error) < 0.5
    found = batches[-1].ellipticity
    assert math.dist(found.vector, Ellipticity(1.06, 0.5).vector) < 0.03
    before = np.nansum(frames, (1, 2))
    after = np.nansum(np.concatenate([b.corrected for b in batches]), (1, 2))
    assert after.sum() == pytest.approx(before.sum(), rel=0.05)


def test_a_mask_may_be_a_list():
    mask = np.ones(SHAPE, bool)
    mask[:30] = False
    frames, _ = rings(2)
    masked, same = (make(pixel_mask=given) for given in (mask, mask.tolist()))
    doses = [each.process(frames, np.arange(2)).dose for each in (masked, same, make())]
    np.testing.assert_array_equal(doses[0], doses[1])
    assert (doses[0] < doses[2]).all()


class TestIdentity:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"frame_shape": (4, 4)},
            {"pixel_mask": np.ones((4, 4), dtype=bool)},
            {"pixel_mask": np.zeros(SHAPE, dtype=bool)},
            {"pixel_mask": np.eye(*SHAPE, dtype=np.uint32)},
        ],
    )
    def test_impossible_detectors_are_refused(self, wrong):
        with pytest.raises(FrameError):
            IdentityCorrector(**({"frame_shape": SHAPE} | wrong))

    @pytest.mark.parametrize(
        ("frames", "indices"),
        [
            (np.zeros((2, 64, 64), np.uint16), np.arange(2)),
            (np.zeros((2, *SHAPE), np.int64), np.arange(2)),
            (np.zeros((2, *SHAPE), np.uint16), np.arange(3)),
            (np.zeros((2, *SHAPE), np.uint16), [0, 1]),
        ],
    )
    def test_frames_of_another_kind_are_refused(self, frames, indices):
        with pytest.raises(FrameError):
            IdentityCorrector(SHAPE).process(frames, indices)

    def test_a_mask_may_be_a_list(self):
        mask = np.ones(SHAPE, bool)
        mask[:30] = False
        frames, _ = rings(2)
        seen = [
            IdentityCorrector(SHAPE, pixel_mask=given).process(frames, np.arange(2)).virtual
            for given in (mask, mask.tolist())
        ]
        np.testing.assert_array_equal(*seen)

    def test_frames_go_through_as_they_are(self):
        frames, _ = rings(3)
        corrector = IdentityCorrector(SHAPE)
        batch = corrector.process(frames, np.arange(3))
        assert batch.corrected is frames
        assert batch.aligned is frames
        assert batch.state == "frozen"
        np.testing.assert_allclose(batch.tracked, [reference_center(SHAPE)] * 3)
        assert not batch.flags.any()
        for act in (corrector.freeze, corrector.unfreeze, corrector.recalibrate):
            act()
        corrector.load(corrector.calibration())
        assert corrector.mean()[1] == 0


def test_the_light_half_never_loads_torch():
    code = (
        "import sys, prenet4d_engines as e; e.IdentityCorrector((8, 8)); e.CorrectedBatch; "
        "e.FrameFlag; e.CorrectorConfig(); e.Calibration; e.Ellipticity(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_face():
    import prenet4d_engines

    for name in prenet4d_engines.__all__:
        assert getattr(prenet4d_engines, name) is not None


def test_the_readmes_example_runs(capsys):
    text = (Path(__file__).parents[2] / "engines" / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "Corrector(" in b)
    names: dict[str, object] = {}
    exec(block, names)
    said = capsys.readouterr().out
    assert said.count("Ellipticity(") == 5
    assert said.splitlines()[-1].startswith("locked Ellipticity(")
    calibration = Calibration.from_json(str(names["saved"]))
    assert calibration.frame_shape == (128, 128)
    assert calibration.ratio == pytest.approx(1.04, abs=0.004)
