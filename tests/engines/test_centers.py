"""Centers of single frames: by inversion symmetry, and refined by what a window around it shows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.centers import find_centers
from prenet4d_engines.models import center, refine
from prenet4d_engines.models.bins import Bins, bin_factor
from prenet4d_engines.models.inversion import REACH, Inversion, inversion
from prenet4d_engines.simulate import (
    Optics,
    Pattern,
    draw_pattern,
    expose,
    ideal_detector,
    render,
)
from prenet4d_engines.simulate.content import direct_disk

SURE = torch.full((3, 2), 0.1)
"""Sigma of a first look that does not hesitate between beams."""
SHAPES = [(128, 128), (192, 160), (256, 256), (257, 515)]


def beam(shape: tuple[int, int], center: tuple[float, float]) -> torch.Tensor:
    disks = direct_disk(Optics(1.0, 2e5, 100.0, 9.0, 0.6))
    return render([Pattern("vacuum", center, (1.05, 0.6), disks)], shape)


def everywhere(shape: tuple[int, int]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.fixture(scope="module")
def networks() -> TorchBackend:
    return TorchBackend("float32", threads=1, device="cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_inversion_makes_a_near_guess_exact(shape) -> None:
    true = torch.tensor([[shape[0] * 0.43 + 0.2, shape[1] * 0.56 - 0.3]])
    frames = 1e6 * beam(shape, tuple(true[0].tolist()))
    found = inversion(Bins.of(frames, everywhere(shape)), true + torch.tensor([-1.0, 1.0]))
    assert (found.center - true).abs().max() < 0.02


def test_inversion_leaves_alone_what_lies_out_of_reach() -> None:
    true, far = (50.0, 60.0), torch.tensor([[50.0 + REACH + 1.5, 60.0]])
    for frames in (1e6 * beam((128, 128), true), torch.zeros(1, 128, 128)):
        bins = Bins.of(frames, everywhere((128, 128)))
        assert torch.equal(inversion(bins, far).center, far)


@pytest.mark.parametrize("shape", SHAPES)
def test_votes_are_solved_in_the_frame_s_pixels(shape) -> None:
    """Every cell says 0.5 bins down and 0.25 to the left, along the four directions."""
    factor = bin_factor(shape)
    guess = Inversion(factor, torch.tensor([[40.3, 60.1]]), torch.ones(1, 2), torch.ones(1))
    angle = torch.pi * torch.arange(4) / 4
    votes = torch.zeros(1, 9, 24, 24)
    votes[:, :4] = (0.5 * torch.sin(angle) - 0.25 * torch.cos(angle))[:, None, None]
    votes[:, 4:8] = 3.0
    votes[:, 8] = 0.7
    found = refine.decode(votes, guess)
    wanted = torch.tensor([[40.3 + 0.5 * factor, 60.1 - 0.25 * factor]])
    torch.testing.assert_close(found.center, wanted, atol=1e-3, rtol=0)
    sure = refine.decode(votes + torch.tensor([0.0] * 4 + [2.0] * 4 + [0.0])[:, None, None], guess)
    torch.testing.assert_close(sure.sigma, found.sigma / torch.e, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.spread, torch.full((1, 1), math.exp(0.7)))


def test_what_only_one_direction_tells_leaves_the_other_to_the_guess() -> None:
    """A beam cut by an edge has no rim on that side."""
    guess = Inversion(1, torch.tensor([[40.0, 60.0]]), torch.ones(1, 2), torch.ones(1))
    votes = torch.zeros(1, 9, 24, 24)
    votes[:, 4:8] = -12.0
    votes[:, 2], votes[:, 6] = 1.0, 5.0  # along y
    found = refine.decode(votes, guess)
    torch.testing.assert_close(found.center, torch.tensor([[41.0, 60.0]]), atol=0.01, rtol=0)
    assert found.sigma[0, 0] < 0.01
    assert found.sigma[0, 1] > 1


def test_a_correction_within_its_own_doubt_is_applied_in_part() -> None:
    guess = Inversion(1, torch.tensor([[40.0, 60.0]]).expand(3, 2), torch.ones(3, 2), torch.ones(3))
    corrections = torch.tensor([[0.1, 0.0], [0.0, -0.4], [3.0, 4.0]])
    refined = refine.Refined(
        guess.center + corrections, torch.full((3, 2), 0.2), torch.full((3, 1), 2.0)
    )
    moved = refine.settle(guess, refined, SURE)[0] - guess.center
    applied = moved.norm(dim=1) / corrections.norm(dim=1)
    assert 0.7 < applied[0] < 0.8
    assert 0.9 < applied[1] < 0.97
    assert applied[2] > 0.999


def test_what_is_claimed_is_the_spread_of_both_cases() -> None:
    """The pattern is symmetric, and the counts say how well it is known; or the votes are right."""
    corrections = torch.tensor([[0.0, 0.0], [0.2, 0.2], [3.0, 4.0]])
    guess = Inversion(
        2, torch.tensor([[40.0, 60.0]]).expand(3, 2), torch.full((3, 2), 0.02), torch.ones(3)
    )
    refined = refine.Refined(guess.center + corrections, torch.full((3, 2), 0.2), torch.ones(3, 1))
    where, sigma = refine.settle(guess, refined, SURE)
    p = ((where - guess.center) / corrections.clamp_min(1e-9))[:, :1]
    p[0] = torch.sigmoid(torch.tensor(1.0))  # as for any correction of no length
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    right = torch.rand(3, n, 1, generator=generator) < p[:, None]
    noise = torch.randn(3, n, 2, generator=generator)
    drawn = torch.where(right, corrections[:, None] + 0.2 * noise, 2 * 0.02 * noise)
    torch.testing.assert_close(sigma, drawn.std(1), rtol=0.02, atol=0)
    torch.testing.assert_close(where - guess.center, drawn.mean(1), rtol=0.02, atol=2e-3)

    few = replace(guess, counting=torch.full((3, 2), 5.0))  # the votes know it better
    torch.testing.assert_close(refine.settle(few, refined, SURE)[1][0], torch.full((2,), 0.2))

    wider = replace(refined, spread=torch.full((3, 1), 1.5))
    again, spread = refine.settle(guess, wider, SURE)
    torch.testing.assert_close(spread, 1.5 * sigma)
    torch.testing.assert_close(again, where)


def test_where_two_beams_may_be_meant_neither_is_known_better_than_which_it_is() -> None:
    """A sigma of the first look of 4 bins is doubt between beams; one of 1 bin is not."""
    guess = Inversion(2, torch.full((2, 2), 50.0), torch.full((2, 2), 0.02), torch.ones(2))
    refined = refine.Refined(guess.center, torch.full((2, 2), 0.1), torch.ones(2, 1))
    _, sigma = refine.settle(guess, refined, torch.tensor([[8.0, 2.0], [2.0, 8.0]]))
    assert (sigma[0, 0], sigma[1, 1]) == (8.0, 8.0)
    assert sigma[0, 1] == sigma[1, 0] < 0.1


def test_a_window_holds_the_frame_around_the_guess_and_the_same_turned() -> None:
    frames = torch.zeros(1, 128, 128)
    frames[0, 30, 90] = 100.0  # of the window around (20.3, 100.4), which reaches over the edge
    guess = Inversion(1, torch.tensor([[20.3, 100.4]]), torch.ones(1, 2), torch.ones(1))
    x = refine.prepare(Bins.of(frames, everywhere((128, 128))), guess, torch.ones(1, 2))
    assert x.shape == (1, refine.IN_CHANNELS, refine.SIDE, refine.SIDE)
    corner = torch.tensor([20.5, 100.5]) - (refine.SIDE - 1) / 2
    at = (torch.tensor([30.0, 90.0]) - corner).long().tolist()
    assert (x[0, 0] > 0).nonzero().tolist() == [at]
    assert (x[0, 4] > 0).nonzero().tolist() == [[refine.SIDE - 1 - i for i in at]]
    assert x[0, 3].sum() == 69 * 75  # what of the window lies in the frame
    torch.testing.assert_close(x[0, 10:12, 0, 0], torch.tensor([-0.2, -0.1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(128, 128), (256, 256)])
def test_a_plain_beam_is_found_to_a_few_hundredths(shape, networks) -> None:
    scale = bin_factor(shape)
    true = [(shape[0] * (0.4 + 0.02 * i) + 0.1 * i, shape[1] * 0.55 - 0.07 * i) for i in range(8)]
    expected = torch.cat([beam(shape, each) for each in true])
    frames, _ = expose(expected, 1e5, ideal_detector(shape), torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = find_centers(frames, everywhere(shape), networks)
    error = (found.center - torch.tensor(true)).abs()
    assert error.mean() < 0.03 * scale
    assert (found.sigma < 0.2 * scale).all()
    assert (error < 5 * found.sigma).all()


def test_frames_do_not_disturb_each_other_and_masked_pixels_do_not_count(networks) -> None:
    one, other = (40.3, 70.6), (80.2, 50.9)
    frames = torch.cat([beam((128, 128), one), beam((128, 128), other)])
    frames, _ = expose(frames, 1e5, ideal_detector((128, 128)), torch.Generator().manual_seed(1))
    mask = everywhere((128, 128))
    mask[10, 10] = False
    frames[:, 10, 10] = 1e7
    with torch.inference_mode():
        both = find_centers(frames, mask, networks)
        alone = find_centers(frames[1:], mask, networks)
    torch.testing.assert_close(both.center[1], alone.center[0], atol=1e-3, rtol=0)
    assert (both.center - torch.tensor([one, other])).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(10, 10), (17, 17), (20, 20), (36, 36), (17, 129), (130, 130)])
def test_no_center_lies_in_what_bins_add_to_a_frame(shape, networks) -> None:
    """The networks read multiples of 16 bins; beyond the frame there are only masked ones."""
    rng = np.random.default_rng(2)
    patterns = [draw_pattern(rng, shape, kind=kind) for kind in ("spots", "grains", "vacuum") * 4]
    frames, _ = expose(render(patterns, shape), 1e3, ideal_detector(shape), torch.Generator())
    with torch.inference_mode():
        found = find_centers(frames, everywhere(shape), networks)
    assert (found.center < torch.tensor(shape)).all()
    assert (found.others[:, :, :2] < torch.tensor(shape) + 4).all()


@pytest.mark.parametrize("shape", [(65, 65), (128, 128), (130, 129), (515, 515)])
def test_even_light_shows_no_beam(shape, networks) -> None:
    even = torch.poisson(torch.full((2, *shape), 3.0), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = find_centers(even, everywhere(shape), networks)
    assert (found.usable < 0.2).all()


@pytest.mark.parametrize("shape", [(128, 128), (130, 130), (66, 130)])
def test_a_beam_cut_by_an_edge_is_seen_to_lie_beyond_it(shape, networks) -> None:
    true = (1.024 * shape[0], 0.5 * shape[1])
    expected = beam(shape, true)
    frames, _ = expose(expected, 1e4, ideal_detector(shape), torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = find_centers(frames, everywhere(shape), networks)
    assert found.center[0, 0] > shape[0] - 0.5
    assert ((found.center - torch.tensor([true])).abs() < 3 * found.sigma).all()
    assert (found.sigma < 0.04 * shape[0]).all()


def test_who_hesitates_between_beams_stays_unsure(networks) -> None:
    """How well one beam is known says little where it may be another one."""
    frames = 1e5 * beam((128, 128), (60.0, 60.0))

    class Hesitating:
        refine = staticmethod(networks.refine)

        def __init__(self, sigma: float):
            self.sigma = sigma

        def center(self, x: torch.Tensor) -> torch.Tensor:
            maps = networks.center(x).clone()
            maps[:, center.LOG_SIGMA_Y : center.LOG_SIGMA_X + 1] = torch.tensor(self.sigma).log()
            return maps

    with torch.inference_mode():
        sure = find_centers(frames, everywhere((128, 128)), Hesitating(0.1))
        unsure = find_centers(frames, everywhere((128, 128)), Hesitating(8.0))
    assert (sure.sigma < 0.5).all()
    torch.testing.assert_close(unsure.sigma, torch.full((1, 2), 8.0), rtol=1e-3, atol=0)
