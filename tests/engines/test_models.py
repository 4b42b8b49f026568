"""The networks take any frame, stay in half-precision ranges and answer in pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models import CenterNet, Denoiser, EllipseNet, center, denoiser, ellipse
from prenet4d_engines.models.bins import BINS, Bins
from prenet4d_engines.models.layers import sum_by_pooling, sum_by_shifts, unshuffled

SHAPES = [(128, 128), (192, 192), (256, 256), (515, 515), (512, 1028), (64, 50)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _frames(shape: tuple[int, int], peak: float = 100.0, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.poisson(torch.rand(n, *shape, generator=generator) * peak, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_denoiser_returns_frames_of_the_same_shape(shape: tuple[int, int]) -> None:
    frames = _frames(shape)
    x, context = denoiser.stabilise(frames, torch.ones(shape, dtype=torch.bool))
    assert x.shape[2] % denoiser.MULTIPLE == 0
    assert x.shape[3] % denoiser.MULTIPLE == 0
    with torch.no_grad():
        rates = denoiser.restore(Denoiser().eval()(x), context)
    assert rates.shape == frames.shape
    assert rates.dtype == torch.float32
    assert torch.isfinite(rates).all()
    assert (rates > 0).all()


def test_an_untrained_denoiser_keeps_what_is_bright() -> None:
    """Residual learning: no residual leaves many counts alone."""
    frames = _frames((64, 64), peak=1e5)
    mask = torch.ones(64, 64, dtype=torch.bool)
    x, context = denoiser.stabilise(frames, mask)
    rates = denoiser.restore(torch.zeros(2, 1, *x.shape[2:]), context)
    torch.testing.assert_close(rates, frames, rtol=1e-2, atol=10.0)


def test_what_bad_pixels_read_does_not_matter_to_the_denoiser() -> None:
    frames = _frames((64, 64))
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[20:24] = False
    mask[5, 7] = False
    wild = frames.clone()
    wild[:, ~mask] = 1e6
    x, context = denoiser.stabilise(frames, mask)
    other_x, other = denoiser.stabilise(wild, mask)
    torch.testing.assert_close(x, other_x)
    torch.testing.assert_close(context.baseline, other.baseline)
    torch.testing.assert_close(context.electrons, other.electrons)


def test_the_denoiser_keeps_the_electrons_of_every_frame() -> None:
    frames = _frames((70, 90), peak=3.0)
    mask = torch.ones(70, 90, dtype=torch.bool)
    mask[:, 30] = False
    x, context = denoiser.stabilise(frames, mask)
    rates = denoiser.restore(0.2 * torch.randn(2, 1, *x.shape[2:]), context)
    kept, counted = (rates * mask).sum((1, 2)), (frames * mask).sum((1, 2))
    torch.testing.assert_close(kept, counted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("level", [0.05, 2.0, 300.0])
def test_the_denoiser_cannot_make_up_a_peak(level: float) -> None:
    """Whatever the network asks for, next to nothing of it is left where nothing was counted."""
    generator = torch.Generator().manual_seed(3)
    frames = torch.poisson(torch.full((1, 64, 64), level), generator=generator)
    x, context = denoiser.stabilise(frames, torch.ones(64, 64, dtype=torch.bool))
    residual = torch.zeros(1, 1, *x.shape[2:])
    residual[..., 20:24, 20:24] = 40.0
    rates = denoiser.restore(residual, context)
    asked = (0.5 * (context.baseline + residual[:, 0])).square()
    window = (0, slice(20, 25), slice(20, 25))
    made_up = (rates[window] - frames[window]).sum() / (asked[window] - frames[window]).sum()
    assert made_up < 0.15


def test_a_hot_pixel_may_be_taken_out() -> None:
    frames = torch.zeros(1, 64, 64)
    frames[0, 30, 30] = 5000.0
    frames[0, ::8, ::8] += 1.0
    _, context = denoiser.stabilise(frames, torch.ones(64, 64, dtype=torch.bool))
    assert (context.least == 0).all()


@pytest.mark.parametrize("peak", [1e-3, 1.0, 1e6])
def test_inputs_stay_small_at_any_count(peak: float) -> None:
    frames = _frames((128, 128), peak)
    frames[:, 40:60, 40:60] *= 50
    mask = torch.ones(128, 128, dtype=torch.bool)
    assert denoiser.stabilise(frames.clamp_max(1e6), mask)[0].abs().max() < 12
    assert center.prepare(Bins.of(frames, mask)).abs().max() < 30
    assert ellipse.prepare(frames, mask.float().expand(2, -1, -1)).abs().max() < 100


@pytest.mark.parametrize("blank", [0.0, 3.0])
def test_blank_frames_make_no_nonsense(blank: float) -> None:
    frames = torch.full((1, 128, 128), blank)
    mask = torch.ones(128, 128, dtype=torch.bool)
    with torch.no_grad():
        x, context = denoiser.stabilise(frames, mask)
        assert torch.isfinite(denoiser.restore(Denoiser().eval()(x), context)).all()
        bins = Bins.of(frames, mask)
        found = center.decode(CenterNet().eval()(center.prepare(bins)), bins)
        assert torch.isfinite(found.center).all()
        assert (found.sigma > 0).all()
        votes = EllipseNet().eval()(ellipse.prepare(frames, mask[None].float()))
        assert torch.isfinite(ellipse.decode(votes).vector).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_center_network_reads_any_frame(shape: tuple[int, int]) -> None:
    bins = Bins.of(_frames(shape), torch.ones(shape, dtype=torch.bool))
    assert bins.factor == max(1, round(min(shape) / BINS))
    x = center.prepare(bins)
    with torch.no_grad():
        maps = CenterNet().eval()(x)
    assert maps.shape == (2, 6, x.shape[2] // center.STRIDE, x.shape[3] // center.STRIDE)
    found = center.decode(maps, bins)
    assert found.center.shape == (2, 2)
    assert found.sigma.shape == (2, 2)
    assert ((found.usable >= 0) & (found.usable <= 1)).all()


@pytest.mark.parametrize(("side", "factor"), [(128, 1), (256, 2), (515, 4)])
def test_decoding_knows_where_a_binned_pixel_lies(side: int, factor: int) -> None:
    """A cell's center, said by hand, must come out in frame pixels to the last digit."""
    bins = Bins.of(torch.ones(1, side, side), torch.ones(side, side, dtype=torch.bool))
    assert bins.factor == factor
    maps = torch.zeros(1, 6, 32, 32)
    maps[:, center.HEAT] = -30.0
    maps[0, center.HEAT, 10, 20] = 30.0
    maps[0, center.OFFSET_Y, 10, 20] = 0.25
    found = center.decode(maps, bins)
    # cell k covers binned pixels 4k .. 4k + 3, binned pixel j covers f j .. f j + f - 1
    cy = factor * (4 * (10 + 0.25) + 1.5) + (factor - 1) / 2
    cx = factor * (4 * 20 + 1.5) + (factor - 1) / 2
    torch.testing.assert_close(found.center, torch.tensor([[cy, cx]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.sigma, torch.full((1, 2), float(factor)))


def test_other_beams_are_named_by_how_likely_they_are() -> None:
    bins = Bins.of(torch.ones(1, 256, 256), torch.ones(256, 256, dtype=torch.bool))
    maps = torch.zeros(1, 6, 32, 32)
    maps[:, center.HEAT] = torch.linspace(-40, -39, 32)[:, None]
    heat = {(10, 20): 5.0, (10, 21): 4.9, (25, 4): 3.0, (3, 29): 4.0}  # (10, 21): the same beam
    for (row, column), value in heat.items():
        maps[0, center.HEAT, row, column] = value
    found = center.decode(maps, bins)
    places, sigmas, odds = found.others.split([2, 1, 1], dim=2)
    expected = torch.tensor([[[3, 29], [25, 4]]]) * 4 + 1.5
    torch.testing.assert_close(places[:, :2], bins.pixels(expected), atol=1e-3, rtol=0)
    assert (sigmas == center.OTHER_SIGMA * bins.factor).all()
    torch.testing.assert_close(odds[0, :2, 0], torch.tensor([-1.0, -2.0]).exp())
    assert odds[0, 2, 0] < 1e-15  # there is no fourth beam


def test_the_beam_amid_others_is_taken_where_none_stands_out() -> None:
    """The center's error is to be small on average, however sure or unsure the heatmap is."""
    bins = Bins.of(torch.ones(1, 128, 128), torch.ones(128, 128, dtype=torch.bool))
    maps = torch.zeros(1, 6, 32, 32)
    maps[:, center.HEAT] = -40.0
    row = {6: 5.0, 16: 4.9, 26: 5.0}
    for column, value in row.items():
        maps[0, center.HEAT, 16, column] = value
    found = center.decode(maps, bins)
    torch.testing.assert_close(found.center, torch.tensor([[65.5, 65.5]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.others[0, :2, 3], torch.tensor([0.1, 0.1]).exp())
    assert sorted(found.others[0, :2, 1].tolist()) == pytest.approx([25.5, 105.5], abs=1e-3)
    maps[0, center.HEAT, 16, 6] = 8.0
    sure = center.decode(maps, bins)
    torch.testing.assert_close(sure.center, torch.tensor([[65.5, 25.5]]), atol=1e-3, rtol=0)


def test_binning_loses_no_electron() -> None:
    frames = _frames((256, 256), peak=3.0)
    bins = Bins.of(frames, torch.ones(256, 256, dtype=torch.bool))
    assert torch.equal(bins.counts.sum((1, 2, 3)), frames.sum((1, 2)))


def test_what_bad_pixels_read_does_not_matter_to_the_center() -> None:
    frames = _frames((256, 256))
    mask = torch.ones(256, 256, dtype=torch.bool)
    mask[100:103] = False
    wild = frames.clone()
    wild[:, ~mask] = 5e5
    quiet, loud = (center.prepare(Bins.of(each, mask)) for each in (frames, wild))
    torch.testing.assert_close(quiet, loud)


def _votes(vector: tuple[float, float]) -> Tensor:
    phi = 2 * math.pi * (torch.arange(16) + 0.5) / 16
    c, s = torch.cos(2 * phi), torch.sin(2 * phi)
    votes = torch.zeros(1, 5, 32, 16)
    votes[0, 0] = (vector[0] * c + vector[1] * s) / ellipse.SCALE
    votes[0, 1] = (-vector[0] * s + vector[1] * c) / ellipse.SCALE
    return votes


def test_agreeing_votes_give_their_vector_and_more_of_them_a_smaller_sigma() -> None:
    votes = _votes((0.03, -0.05))
    found = ellipse.decode(votes)
    torch.testing.assert_close(found.vector, torch.tensor([[0.03, -0.05]]), atol=1e-6, rtol=0)
    votes[:, 2:4] += 2.0
    assert ellipse.decode(votes).sigma < 0.5 * found.sigma


def test_a_wider_spread_is_a_larger_sigma_of_the_same_vector() -> None:
    votes = _votes((0.03, -0.05))
    found = ellipse.decode(votes)
    votes[:, ellipse.SPREAD] = math.log(3.0)
    wider = ellipse.decode(votes)
    torch.testing.assert_close(wider.sigma, 3 * found.sigma)
    torch.testing.assert_close(wider.sigma / wider.spread, found.sigma)
    assert torch.equal(wider.vector, found.vector)


def test_a_heavy_vote_outweighs_a_light_one() -> None:
    votes = torch.cat([_votes((0.1, 0.0))[:, :, :16], _votes((0.0, 0.0))[:, :, 16:]], 2)
    votes[:, 2:4, :16] = 6.0
    votes[:, 2:4, 16:] = -6.0
    assert ellipse.decode(votes).vector[0, 0] == pytest.approx(0.1, rel=1e-3)


def test_turning_a_pattern_turns_the_log_polar_map() -> None:
    image = torch.zeros(1, 129, 129)
    image[0, 64, 100] = 1e4  # on +x
    turned = image.transpose(1, 2)  # on +y: a quarter turn later
    valid = torch.ones(1, 129, 129)
    along_x, along_y = ellipse.prepare(image, valid), ellipse.prepare(turned, valid)
    one, two = along_x[0, 0].sum(0), along_y[0, 0].sum(0)
    quarter = ellipse.AZIMUTHS // 4
    torch.testing.assert_close(two, one.roll(quarter), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(128, 128), (515, 515), (200, 300)])
def test_the_ellipse_networks_input_has_one_size(shape: tuple[int, int]) -> None:
    x = ellipse.prepare(_frames(shape)[0], torch.ones(shape))
    assert x.shape == (1, ellipse.IN_CHANNELS, ellipse.RADII, ellipse.AZIMUTHS)
    with torch.no_grad():
        assert EllipseNet().eval()(x).shape == (1, 5, 32, 16)


@pytest.mark.parametrize("network", [Denoiser, CenterNet, EllipseNet])
def test_channels_fill_tensor_cores(network: type[nn.Module]) -> None:
    for module in network().modules():
        if isinstance(module, nn.Conv2d):
            assert module.in_channels % 8 == 0
            heads_and_answers = {4, 5}
            assert module.out_channels % 8 == 0 or module.out_channels in heads_and_answers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 6, 10), (1, 15, 96, 96)])
def test_unshuffling_is_torchs_own_with_channels_side_by_side(dtype, shape) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = unshuffled(x)
    assert torch.equal(found, functional.pixel_unshuffle(x, 2))
    assert dtype == torch.float32 or found.is_contiguous(memory_format=torch.channels_last)
    turned = x.transpose(2, 3)
    assert torch.equal(unshuffled(turned), functional.pixel_unshuffle(turned, 2))


@pytest.mark.parametrize("shape", [(21, 30), (1, 2)])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 11])
def test_box_sums_are_what_they_say_on_either_device(size: int, shape: tuple[int, int]) -> None:
    x = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    window = torch.ones(1, 1, size, size)
    expected = functional.conv2d(x, window, padding=size // 2)
    for summed in (sum_by_shifts(x, size), sum_by_pooling(x, size)):
        torch.testing.assert_close(summed, expected)
