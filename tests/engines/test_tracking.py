"""The center track over simulated measurements of known drift."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prenet4d_engines.tracking import CenterTracker

SCAN = (24, 40)
NOISES = (0.03, 0.1, 0.3, 1.0)


def drift(kind: str, seed: int) -> np.ndarray:
    """True centers (n, 2) over SCAN, in pixels."""
    random = np.random.default_rng(seed)
    ny, nx = SCAN
    n = ny * nx
    row, column = np.divmod(np.arange(n), nx)
    center = np.full((n, 2), 127.5)
    if "plane" in kind:
        center += np.stack([0.03 * column + 0.02 * row, -0.05 * column + 0.04 * row], axis=1)
    if "walk" in kind:
        center += np.cumsum(random.normal(0, 0.01, (n, 2)), axis=0)
    if "fly-back" in kind:
        center += random.normal(0, 0.4, (ny, 2))[row]
    if "transient" in kind:
        center += np.exp(-column / 4)[:, None] * [1.0, -0.7]
    if "jumps" in kind:
        jumps = random.random(n) < 0.02
        center += np.cumsum(jumps[:, None] * random.normal(0, 1, (n, 2)), axis=0)
    return center


def track(truth, noise, seed=0, *, scan=SCAN, claimed=None):
    """Track noisy measurements; return tracked, sigma, outlier and the measurements."""
    random = np.random.default_rng(1000 + seed)
    measured = truth + random.normal(0, noise, truth.shape)
    sigmas = np.full_like(truth, claimed or noise)
    found = CenterTracker(scan).update(np.arange(len(truth)), measured, sigmas)
    return *found, measured


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", ["static", "plane", "plane walk fly-back", "plane transient"])
def test_tracked_is_better_than_single_frame(kind: str, noise: float):
    for seed in range(2):
        truth = drift(kind, seed)
        tracked, _, _, measured = track(truth, noise, seed)
        assert rms(tracked - truth) < 0.9 * rms(measured - truth)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", ["plane", "plane walk fly-back"])
def test_without_a_scan_shape_it_is_still_no_worse(kind: str, noise: float):
    truth = drift(kind, 0)
    tracked, _, _, measured = track(truth, noise, scan=None)
    assert rms(tracked - truth) < 1.05 * rms(measured - truth)


@pytest.mark.parametrize("noise", NOISES)
def test_pure_jumps_cost_only_their_discovery(noise: float):
    """Where the center only jumps, in mid-line, most frames are as good or better."""
    truth = drift("jumps", 0)
    tracked, _, _, measured = track(truth, noise)
    error, single = np.abs(tracked - truth), np.abs(measured - truth)
    assert np.quantile(error, 0.9) < 1.1 * np.quantile(single, 0.9)
    assert np.median(error) < np.median(single)


@pytest.mark.parametrize("size", [0.5, 2.0, 20.0])
def test_a_jump_is_followed_within_a_few_frames(size: float):
    truth = drift("static", 0)
    truth[500:] += size
    tracked, _, outlier, _ = track(truth, 0.05)
    assert np.abs(tracked[504:540] - truth[504:540]).max() < 0.2
    assert outlier[500:504].sum() <= 2


@pytest.mark.parametrize("step", [1.0, 2.3, 6.0])
def test_a_steep_descan_costs_a_quick_look_hardly_a_frame(step: float):
    """Few probe positions over a wide field: far from one to the next, and no line before."""
    index = np.arange(256)
    truth = 100 + np.stack([0.3 * (index // 16) + 0.1 * (index % 16), step * (index % 16)], axis=1)
    tracked, _, _, _ = track(truth, 0.2, scan=(16, 16))
    assert (np.abs(tracked - truth).max(1) > 1).sum() <= 3


def test_wrong_centers_are_flagged_and_do_not_pull():
    truth = drift("plane walk fly-back", 3)
    random = np.random.default_rng(5)
    measured = truth + random.normal(0, 0.1, truth.shape)
    wrong = random.choice(np.arange(60, len(truth)), 20, replace=False)
    measured[wrong] += random.choice([-1, 1], (20, 2)) * random.uniform(4, 12, (20, 2))
    indices = np.arange(len(truth))
    tracked, _, outlier = CenterTracker(SCAN).update(indices, measured, np.full_like(measured, 0.1))
    assert outlier[wrong].mean() > 0.9
    assert np.delete(outlier, wrong).mean() < 0.01
    assert rms(tracked - truth) < 0.15


def test_a_large_jump_at_a_line_start_is_followed_though_the_first_ones_were_small():
    truth = drift("plane", 0)
    for row, jump in ((1, 0.001), (2, 0.001), (3, 1.5), (4, -2.0)):
        truth[row * SCAN[1] :] += jump
    tracked, _, outlier, measured = track(truth, 0.015)
    line = slice(3 * SCAN[1], 5 * SCAN[1])
    assert outlier[line].sum() <= 2
    assert rms((tracked - truth)[line]) < 3 * rms((measured - truth)[line])


def after_a_wrong_beam(frames: slice) -> np.ndarray:
    """How far the track is off in the line after one that showed another beam in some frames.

    In that line the middle half shows no beam: the track is what the lines before make expect.
    """
    truth, line = drift("plane", 3), SCAN[1]
    measured = truth + np.random.default_rng(3).normal(0, 0.05, truth.shape)
    measured[frames] += [14.0, -9.0]
    usable = np.ones(len(truth), dtype=bool)
    following = (frames.start // line + 1) * line
    usable[following + line // 4 : following + 3 * line // 4] = False
    sigmas = np.full_like(truth, 0.05)
    tracked, _, _ = CenterTracker(SCAN).update(np.arange(len(truth)), measured, sigmas, usable)
    return np.abs(tracked - truth)[following : following + line]


def test_a_wrong_beam_in_the_first_line_does_not_tilt_the_next_one():
    assert after_a_wrong_beam(slice(0, 9)).max() < 0.5


def test_jumps_to_a_wrong_beam_and_back_are_not_expected_in_the_next_line():
    line = SCAN[1]
    assert after_a_wrong_beam(slice(line + 15, line + 25)).max() < 0.5


def test_wandering_fast_costs_good_centers_nothing():
    random = np.random.default_rng(4)
    truth = 127.5 + np.cumsum(random.normal(0, 0.3, (SCAN[0] * SCAN[1], 2)), axis=0)
    tracked, _, outlier, measured = track(truth, 0.01)
    assert np.abs(tracked - truth).mean() < 1.1 * np.abs(measured - truth).mean()
    assert outlier.mean() < 0.01


def test_a_grain_with_needlessly_large_sigmas_is_followed_all_the_same():
    random = np.random.default_rng(6)
    truth = drift("plane walk fly-back", 1)
    truth += np.cumsum(random.normal(0, 0.05, truth.shape), axis=0)
    measured = truth + random.normal(0, 0.02, truth.shape)
    sigmas = np.full_like(truth, 0.02)
    sigmas[np.arange(len(truth)) % 20 >= 10] = 0.5  # every other grain
    tracked, _, _ = CenterTracker(SCAN).update(np.arange(len(truth)), measured, sigmas)
    # A price is paid for not following grains that are misread: 2.5 times without that.
    assert np.abs(tracked - truth).mean() < 4 * np.abs(measured - truth).mean()


def test_a_track_that_nothing_agrees_with_is_given_up():
    """Outliers that disagree with each other as well mean that the track is wrong."""
    truth = drift("static", 0)
    random = np.random.default_rng(7)
    truth[400:] += 8 + np.cumsum(random.normal(0, 1.0, (len(truth) - 400, 2)), axis=0)
    tracked, _, outlier, _ = track(truth, 0.02)
    assert outlier[400:410].sum() <= 6
    assert np.median(np.abs(tracked - truth)[420:]) < 0.1


def with_grains(shown: dict[tuple[int, int], tuple[float, float]], seed: int = 3):
    """A drifting scan whose columns show another beam, so far away; the direct one is named too."""
    truth = drift("plane walk fly-back", seed)
    random = np.random.default_rng(seed)
    centers = truth + random.normal(0, 0.05, truth.shape)
    others = np.zeros((len(truth), 3, 4))
    others[:, 0] = [3.0, 3.0, 1.0, 0.01]  # a beam that is no candidate for anything
    others[:, 1, :2] = truth + random.normal(0, 0.3, truth.shape)
    others[:, 1, 2:] = 1.0, 0.1
    others[:, 1, 3] = 0.0
    column = np.arange(len(truth)) % SCAN[1]
    for (first, end), offset in shown.items():
        wrong = (column >= first) & (column < end)
        centers[wrong] += offset
        others[wrong, 1, 3] = 0.1
    return truth, centers, others


def follow(truth, centers, others, first=0):
    indices, sigmas = first + np.arange(len(truth)), np.full_like(truth, 0.05)
    return CenterTracker(SCAN).update(indices, centers, sigmas, others=others)


def test_a_grain_that_shows_another_beam_does_not_lead_the_track_away():
    grains = {(8, 18): (14.0, -9.0), (30, 36): (-3.0, 12.0)}
    truth, centers, others = with_grains(grains)
    tracked, _, outlier = follow(truth, centers, others)
    wrong = np.abs(centers - truth).max(1) > 1
    assert np.abs(tracked - truth).max() < 1.0
    assert outlier[wrong].all()
    assert not outlier[~wrong].any()
    alone, _, _ = follow(truth, centers, None)
    assert (np.abs(alone - truth).max(1)[wrong] > 3).mean() > 0.5  # where nothing else is named


def test_another_beam_at_a_lines_start_is_no_fly_back():
    truth, centers, others = with_grains({(0, 6): (14.0, -9.0)})
    # The very first frames have nothing before them that knew better.
    tracked, _, _ = follow(*(values[20:] for values in (truth, centers, others)), first=20)
    # Each line jumps, and where to is known to a pixel only until the direct beam shows itself.
    assert np.abs(tracked - truth[20:]).max() < 2.5


def test_a_beam_that_the_network_hesitates_to_take_gives_way_to_the_expected_one():
    """Its sigma says that it may be another beam, and covers the place of the right one."""
    truth, centers, others = with_grains({(8, 18): (14.0, -9.0)})
    sigmas = np.where(np.abs(centers - truth).max(1) > 1, 12.0, 0.05)[:, None].repeat(2, 1)
    tracked, sigma, _ = CenterTracker(SCAN).update(
        np.arange(len(truth)), centers, sigmas, others=others
    )
    assert np.abs(tracked - truth).max() < 1.0
    assert sigma.max() < 3.0


@pytest.mark.parametrize("size", [4.0, 20.0])
def test_a_jump_is_followed_at_once_though_other_beams_are_named(size: float):
    """They jump with the direct one."""
    truth, centers, others = with_grains({})
    others[:, 2, :2] = truth + np.array((15.0, 2.0))
    others[:, 2, 2:] = 1.0, 0.5
    for places in (truth, centers):
        places[500:] += size
    others[500:, :, :2] += size
    tracked, _, outlier = follow(truth, centers, others)
    assert np.abs(tracked[504:540] - truth[504:540]).max() < 0.5
    assert outlier[500:504].sum() <= 2


def test_a_track_that_began_on_another_beam_is_outvoted():
    """Though that beam is named in every frame."""
    truth, centers, others = with_grains({})
    centers[:20] += [14.0, -9.0]
    others[:, 1, :2] = truth + np.array((14.0, -9.0))
    others[20:, 1, 3] = 0.1
    tracked, _, outlier = follow(truth, centers, others)
    off = np.abs(tracked - truth).max(1) > 1
    assert off[20:35].all()
    assert not off[50:].any()
    assert outlier[20:60].tolist() == off[20:60].tolist()


def test_a_center_that_is_the_less_likely_beam_is_no_vote():
    """Frames may settle on the beam amid others; they neither outvote the track nor bind it."""
    truth, centers, others = with_grains({})
    centers[20:] += [14.0, -9.0]
    others[20:220, 1, 3] = 3.0  # the beam that the track follows is likelier
    others[220:, 1, 3] = 0.1
    tracked, _, _ = follow(truth, centers, others)
    off = np.abs(tracked - truth).max(1) > 1
    assert not off[:220].any()
    assert off[260:].all()


def test_a_track_that_was_led_away_has_no_more_credit_than_the_frames_that_led_it():
    truth, centers, others = with_grains({})
    hidden = slice(362, 370)  # here the direct beam is not even named
    centers[hidden] += [14.0, -9.0]
    others[370:, 1, :2] = truth[370:] + np.array((14.0, -9.0))
    others[370:, 1, 3] = 0.1
    tracked, _, _ = follow(truth, centers, others)
    off = np.abs(tracked - truth).max(1) > 1
    assert not off[:362].any()
    assert off[366:375].all()
    assert not off[393:].any()  # before the line's end, where it would be seen anyhow


def test_what_most_frames_say_outlasts_a_grain_as_long_as_a_line():
    truth, centers, others = with_grains({})
    wrong = slice(400, 400 + SCAN[1])
    centers[wrong] += [14.0, -9.0]
    others[wrong, 1, 3] = 0.1
    tracked, _, _ = follow(truth, centers, others)
    assert np.abs(tracked - truth).max() < 1.0


def test_a_twin_goes_its_own_way():
    truth, centers, others = with_grains({(8, 18): (14.0, -9.0)})
    sigmas, indices = np.full_like(truth, 0.05), np.arange(len(truth))
    for stop in (12, 300):  # within the first line, and where much was learned
        tracker = CenterTracker(SCAN)
        before, after = slice(0, stop), slice(stop, 2 * stop)
        tracker.update(indices[before], centers[before], sigmas[before], others=others[before])
        twin = tracker.copy()
        twin.update(indices[after], centers[after] + 5, sigmas[after], others=others[after])
        found = tracker.update(indices[after], centers[after], sigmas[after], others=others[after])
        whole = follow(*(values[: 2 * stop] for values in (truth, centers, others)))
        np.testing.assert_array_equal(found[0], whole[0][after])


def test_sigmas_are_honest():
    truth = np.concatenate([drift("plane walk fly-back", seed) for seed in range(1)])
    tracked, sigma, _, _ = track(truth, 0.2)
    assert 0.6 < rms((tracked - truth) / sigma) < 1.4


def test_sigmas_that_claim_too_little_are_found_out():
    truth = drift("plane", 0)
    tracked, _, outlier, measured = track(truth, 0.3, claimed=0.12)
    assert rms((tracked - truth)[200:]) < 0.7 * rms((measured - truth)[200:])
    assert outlier[200:].mean() < 0.02


@settings(max_examples=20)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 3))
def test_batching_changes_nothing(sizes: list[int], seed: int):
    truth = drift("plane walk fly-back", seed)[:400]
    measured = truth + np.random.default_rng(seed).normal(0, 0.2, truth.shape)
    sigmas = np.full_like(measured, 0.2)
    indices = np.arange(400)
    whole = CenterTracker(SCAN).update(indices, measured, sigmas)
    tracker, start, parts = CenterTracker(SCAN), 0, []
    for size in [*sizes, 400]:
        part = slice(start, start + size)
        parts.append(tracker.update(indices[part], measured[part], sigmas[part]))
        start += size
    for k in range(3):
        np.testing.assert_array_equal(np.concatenate([p[k] for p in parts]), whole[k])


def test_order_within_a_batch_does_not_matter():
    truth = drift("plane", 0)[:200]
    measured = truth + np.random.default_rng(0).normal(0, 0.2, truth.shape)
    sigmas = np.full_like(measured, 0.2)
    order = np.random.default_rng(1).permutation(200)
    straight = CenterTracker(SCAN).update(np.arange(200), measured, sigmas)[0]
    shuffled = CenterTracker(SCAN).update(order, measured[order], sigmas[order])[0]
    np.testing.assert_array_equal(shuffled, straight[order])


def test_missing_frames_are_bridged():
    truth = drift("plane", 0)
    measured = truth + np.random.default_rng(0).normal(0, 0.2, truth.shape)
    keep = np.random.default_rng(1).random(len(truth)) < 0.7
    keep[300:390] = False  # more than two lines
    indices = np.flatnonzero(keep)
    tracked, _, _ = CenterTracker(SCAN).update(
        indices, measured[keep], np.full((keep.sum(), 2), 0.2)
    )
    assert rms(tracked - truth[keep]) < 0.9 * rms(measured[keep] - truth[keep])


def test_late_frames_are_answered_and_change_nothing():
    truth = drift("plane", 0)
    measured = truth + np.random.default_rng(0).normal(0, 0.2, truth.shape)
    sigmas = np.full_like(measured, 0.2)
    indices = np.arange(len(truth))
    one, two = CenterTracker(SCAN), CenterTracker(SCAN)
    one.update(indices[:600], measured[:600], sigmas[:600])
    two.update(indices[:600], measured[:600], sigmas[:600])
    late, sigma, _ = two.update(indices[595:600], measured[595:600], sigmas[595:600])
    assert np.abs(late - truth[595:600]).max() < 0.5
    assert (sigma < 0.2).all()
    after = [t.update(indices[600:700], measured[600:700], sigmas[600:700])[0] for t in (one, two)]
    np.testing.assert_array_equal(*after)


def test_a_late_frames_sigma_holds_the_error_that_it_shares_with_its_neighbours():
    random = np.random.default_rng(0)
    n = SCAN[0] * SCAN[1]
    shared = np.repeat(random.normal(0, 0.3, (n // 24 + 1, 2)), 24, axis=0)[:n]
    error = shared + random.normal(0, 0.05, (n, 2))
    tracker, sigmas = CenterTracker(SCAN), np.full((n, 2), 0.3)
    off = []
    for i in range(512, n, 32):
        most = np.setdiff1d(np.arange(i - 32 if i > 512 else 0, i), [i - 10])
        tracker.update(most, 50 + error[most], sigmas[most])
        late = np.array([i - 10])
        place, sigma, _ = tracker.update(late, 50 + error[late], sigmas[late])
        off.append((place - 50) / sigma)
    assert 0.6 < rms(np.concatenate(off)) < 1.6


def test_a_scan_that_starts_over_is_followed():
    truth = drift("plane", 0)
    tracker = CenterTracker(SCAN)
    sigmas = np.full_like(truth, 0.05)
    tracker.update(np.arange(len(truth)), truth, sigmas)
    tracked, _, _ = tracker.update(np.arange(40), truth[:40] + 5, sigmas[:40])
    assert np.abs(tracked[5:] - truth[5:40] - 5).max() < 0.1


@pytest.mark.parametrize("wild", [100_000, 10**15, -(10**15), 2**63 - 1])
def test_an_index_that_is_none_of_the_scan_costs_neither_its_frame_nor_the_next(wild: int):
    truth = drift("plane", 0)
    measured = truth + np.random.default_rng(0).normal(0, 0.05, truth.shape)
    indices = np.arange(len(truth))
    indices[510] = wild
    tracker = CenterTracker(SCAN)
    for i in range(len(truth)):
        one = slice(i, i + 1)
        place, sigma, _ = tracker.update(indices[one], measured[one], np.full((1, 2), 0.05))
        if i > 500:
            assert np.abs(place - truth[i]).max() < 0.3
            assert sigma.max() < 0.3


def test_unusable_frames_are_predicted():
    truth = drift("plane", 0)
    usable = np.ones(len(truth), dtype=bool)
    usable[500:510] = False
    measured = truth + np.random.default_rng(0).normal(0, 0.05, truth.shape)
    measured[500:510] = np.nan
    tracked, sigma, outlier = CenterTracker(SCAN).update(
        np.arange(len(truth)), measured, np.full_like(truth, 0.05), usable
    )
    assert np.abs(tracked[500:510] - truth[500:510]).max() < 0.15
    assert (sigma[509] > sigma[499]).all()
    assert not outlier[500:510].any()


def test_nothing_is_claimed_before_the_first_beam():
    tracker = CenterTracker(SCAN)
    tracked, sigma, outlier = tracker.update(
        np.arange(3), np.full((3, 2), np.nan), np.full((3, 2), np.inf), np.zeros(3, dtype=bool)
    )
    assert np.isnan(tracked).all()
    assert np.isinf(sigma).all()
    assert not outlier.any()
    first, _, _ = tracker.update(np.array([3]), np.array([[10.0, 11.0]]), np.array([[0.1, 0.1]]))
    np.testing.assert_allclose(first, [[10, 11]])


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5000),
            st.floats(allow_nan=True, allow_infinity=True, width=32),
            st.floats(min_value=0, width=32) | st.just(math.nan),
            st.booleans(),
            st.lists(st.floats(width=32), min_size=8, max_size=8),
        ),
        max_size=40,
    )
)
@example(
    [
        (0, 1.0, 0.0, True, [0.0] * 8),
        (1, 0.0, 0.0, True, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, math.inf, 1.0]),
    ]
)
@example(
    [
        (0, 0.0, 0.0, False, [0.0] * 8),
        (0, 0.0, math.nan, False, [0.0] * 8),
        (0, 0.0, 0.0, True, [0.0] * 8),
        (1, 1.0, 0.0, True, [0.0] * 7 + [1.0]),
    ]
)
def test_wild_input_never_breaks_it(rows: list[tuple[int, float, float, bool, list[float]]]):
    tracker = CenterTracker((50, 100))
    indices = np.array([row[0] for row in rows], dtype=np.int64)
    centers = np.array([[row[1], -row[1]] for row in rows]).reshape(-1, 2)
    sigmas = np.array([[row[2]] * 2 for row in rows]).reshape(-1, 2)
    usable = np.array([row[3] for row in rows], dtype=bool)
    others = np.array([row[4] for row in rows]).reshape(-1, 2, 4)
    tracked, sigma, outlier = tracker.update(indices, centers, sigmas, usable, others)
    assert tracked.shape == sigma.shape == (len(rows), 2)
    assert (np.isfinite(tracked) | np.isinf(sigma)).all()
    assert not outlier[~usable].any()


@pytest.mark.parametrize("columns", [slice(0, 12), slice(14, 26), slice(28, 40)])
def test_a_grain_that_is_misread_the_same_way_in_all_frames_does_not_draw_the_track_away(
    columns: slice,
):
    """Its frames agree with each other, and claim a quarter of what they are off."""
    truth, random = drift("plane walk", 0), np.random.default_rng(3)
    grain = np.zeros(SCAN, bool)
    grain[8:20, columns] = True
    grain = grain.ravel()
    sigma = np.where(grain, 2.0, 0.05)[:, None] * np.ones(2)
    measured = truth + 0.7 * sigma * random.normal(0, 1, truth.shape)
    measured[grain] += [6.0, -5.0]
    tracked, _, _ = CenterTracker(SCAN).update(np.arange(len(truth)), measured, sigma)
    error = np.linalg.norm(tracked - truth, axis=1)
    assert np.median(error[grain]) < 0.5
    assert error[grain].max() < 2.5
    assert np.median(error[~grain]) < 0.05
