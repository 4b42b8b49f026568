"""Centers refined by inversion symmetry: right, bounded, honest."""

from __future__ import annotations

import pytest
import torch

from prenet4d_engines.models.center import CenterEstimate
from prenet4d_engines.simulate import Optics, Pattern, expose, ideal_detector, render
from prenet4d_engines.simulate.content import direct_disk
from prenet4d_engines.symmetry import REACH, refine


def beam(shape: tuple[int, int], center: tuple[float, float]) -> torch.Tensor:
    disks = direct_disk(Optics(1.0, 2e5, 100.0, 9.0, 0.6))
    return render([Pattern("vacuum", center, (1.05, 0.6), disks)], shape)


def guess(*centers: tuple[float, float]) -> CenterEstimate:
    n = len(centers)
    return CenterEstimate(torch.tensor(centers), torch.full((n, 2), 0.3), torch.ones(n))


@pytest.mark.parametrize("shape", [(128, 128), (192, 160), (256, 256), (257, 515)])
def test_a_near_guess_becomes_exact(shape) -> None:
    true = (shape[0] * 0.43 + 0.2, shape[1] * 0.56 - 0.3)
    frames = 1e6 * beam(shape, true)
    found = refine(frames, torch.ones(shape, dtype=torch.bool), guess((true[0] - 1, true[1] + 1)))
    assert (found.center[0] - torch.tensor(true)).abs().max() < 0.02
    assert (found.sigma < 0.3).all()


def test_what_lies_out_of_reach_is_left_alone() -> None:
    true, far = (50.0, 60.0), (50.0 + REACH + 1.5, 60.0)
    mask = torch.ones((128, 128), dtype=torch.bool)
    for frames in (1e6 * beam((128, 128), true), torch.zeros(1, 128, 128)):
        found = refine(frames, mask, guess(far))
        assert torch.equal(found.center, guess(far).center)
        assert torch.equal(found.sigma, guess(far).sigma)


def test_frames_do_not_disturb_each_other_and_masked_pixels_do_not_count() -> None:
    one, other = (40.3, 70.6), (80.2, 50.9)
    frames = torch.cat([beam((128, 128), one), beam((128, 128), other)])
    frames, _ = expose(frames, 1e5, ideal_detector((128, 128)), torch.Generator().manual_seed(1))
    mask = torch.ones((128, 128), dtype=torch.bool)
    mask[10, 10] = False
    frames[:, 10, 10] = 1e7
    both = refine(frames, mask, guess((41.0, 70.0), (80.0, 51.5)))
    alone = refine(frames[1:], mask, guess((80.0, 51.5)))
    assert torch.allclose(both.center[1], alone.center[0], atol=1e-3)
    assert (both.center - torch.tensor([one, other])).abs().max() < 0.1
