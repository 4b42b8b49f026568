"""What each network is asked for: one loss per task, and the figures shown beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prenet4d_engines.models import center, denoiser, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.train.samples import Sample, looks_at, near_guesses
from prenet4d_engines.train.sigmas import ONE_SIGMA
from prenet4d_engines.weights import Name

Figures = dict[str, Tensor]
_CENTER_FIGURES: Final = ("median_px", "p90_px", "within_sigma", "wrong_cell")
_REFINE_FIGURES: Final = ("median_px", "p90_px", "guess_median_px", "within_sigma")
_LINEAR_WEIGHT: Final = 0.5
_HEAT_WEIGHT: Final = 2.0
"""Which beam it is weighs more than where in it: what comes after the network finds the latter."""
_SPREAD_WEIGHT: Final = 0.25


def denoise_loss(network: nn.Module, sample: Sample) -> tuple[Tensor, Figures]:
    """Poisson deviance and squared error between predicted and true rates, both in units of noise.

    The deviance 2 (l - m + m ln(m / l)) is about four times the squared error of the square
    roots, which treats bright and dark alike; the squared error in counts, relative to that of
    the noise (the sum of the rates), looks after the bright. Both are Bregman divergences: their
    minimum is the conditional mean, so counts are kept on average.
    """
    mask = sample["mask"]
    x, context = denoiser.stabilise(sample["frame"], mask)
    rate = denoiser.restore(network(_channels_last(x)), context)
    true = sample["rate"]
    deviance = 2.0 * (rate - true + true * (true.clamp_min(1e-12) / rate).log())
    valid = mask.float()
    per_frame = (deviance * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1.0)
    possible = (true.clamp_max(1.0) * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1.0)
    square = ((rate - true).square() * valid).sum((1, 2)) / (true * valid).sum((1, 2)).clamp_min(
        1.0
    )
    loss = (per_frame / (possible + 1e-3) ** 0.75 + _LINEAR_WEIGHT * square.clamp_max(10.0)).mean()

    with torch.no_grad():
        error = ((rate.sqrt() - true.sqrt()).square() * valid).sum((1, 2))
        noisy = ((sample["frame"].sqrt() - true.sqrt()).square() * valid).sum((1, 2))
        kept = (rate * valid).sum((1, 2)) / (true * valid).sum((1, 2)).clamp_min(1e-6)
        figures = {
            "gain_db": 10 * torch.log10(noisy / error.clamp_min(1e-12)).median(),
            "counts_kept": kept.median(),
            "worse_than_input": (error > noisy).float().mean(),
        }
    return loss, figures


def center_loss(network: nn.Module, sample: Sample) -> tuple[Tensor, Figures]:
    """Cross entropy of the heatmap, Laplace likelihood of the decoded center, usable or not.

    Where the cell to settle on is wrong, its offset has nothing to learn, but its sigma has: how
    wrong it may be.
    """
    bins = Bins.of(sample["frame"], sample["mask"])
    maps = network(_channels_last(center.prepare(bins))).float()
    usable = sample["usable"]
    target = bins.place(sample["center"])
    cells = (target - 0.5 * (center.STRIDE - 1)) / center.STRIDE
    height, width = maps.shape[2:]
    rows = torch.arange(height, device=maps.device)[None, :, None]
    columns = torch.arange(width, device=maps.device)[None, None, :]
    square = (rows - cells[:, :1, None]) ** 2 + (columns - cells[:, 1:, None]) ** 2
    wanted = torch.softmax((-square / (2 * 0.6**2)).flatten(1), 1)
    entropy = -(wanted * maps[:, center.HEAT].flatten(1).log_softmax(1)).sum(1)

    truth = cells.round().long()
    truth[:, 0].clamp_(0, height - 1)
    truth[:, 1].clamp_(0, width - 1)
    best = center.likely_cells(maps.detach())[0][:, 0]
    wrong = (best - truth).abs().amax(1) > 1
    place, log_sigma = center.at_cell(maps, torch.where(wrong[:, None], truth, best))
    error = (place - target).abs()
    likelihood = (2**0.5 * error * torch.exp(-log_sigma) + log_sigma).sum(1)
    far, far_log_sigma = center.at_cell(maps, best)
    far_error = (far - target).abs().detach()
    likelihood = torch.where(
        wrong,
        (2**0.5 * far_error * torch.exp(-far_log_sigma) + far_log_sigma).sum(1),
        likelihood,
    )
    located = _HEAT_WEIGHT * entropy + 0.5 * likelihood + 0.5 * error.clamp_max(8.0).sum(1)
    answer = maps[:, center.USABLE].mean((1, 2))
    loss = (located * usable).sum() / usable.sum().clamp_min(1.0)
    loss = loss + functional.binary_cross_entropy_with_logits(answer, usable)

    with torch.no_grad():
        shown = usable > 0.5
        if not shown.any():  # nothing to be wrong about
            return loss, dict.fromkeys(_CENTER_FIGURES, loss.new_zeros(()))
        distance = (far - target).norm(dim=1)[shown] * bins.factor
        covered = (far - target).abs()[shown] < far_log_sigma.exp()[shown]
        figures = (
            distance.median(),
            distance.quantile(0.9),
            covered.float().mean(),
            wrong[shown].float().mean(),
        )
    return loss, dict(zip(_CENTER_FIGURES, figures, strict=True))


def refine_loss(network: nn.Module, sample: Sample) -> tuple[Tensor, Figures]:
    """Laplace likelihood of the center under the votes' own precision, where the guess is near.

    And the spread, wherever there is a beam: the quantile loss whose minimum leaves 68.3 % of the
    errors of what is claimed in the end within their sigma.
    """
    guess, near = near_guesses(sample)
    x = refine.prepare(Bins.of(sample["frame"], sample["mask"]), guess, sample["sigma"])
    found = refine.decode(network(_channels_last(x)), guess)
    error = (found.center - sample["center"]).abs() / guess.factor
    sigma = found.sigma / guess.factor
    each = (2**0.5 * error / sigma + sigma.log() + 0.5 * error).sum(1)
    loss = torch.where(near, each, 0.0).sum() / near.sum().clamp_min(1)
    fixed = replace(found, center=found.center.detach(), sigma=found.sigma.detach())
    claimed, claimed_sigma = refine.settle(guess, fixed, sample["sigma"])
    excess = ((claimed - sample["center"]).abs().clamp_min(1e-6) / claimed_sigma).log()
    quantile = _quantile(excess).sum(1)
    usable = sample["usable"]
    loss = loss + _SPREAD_WEIGHT * (quantile * usable).sum() / usable.sum().clamp_min(1.0)
    with torch.no_grad():
        if not near.any():  # nothing to refine
            return loss, dict.fromkeys(_REFINE_FIGURES, loss.new_zeros(()))
        distance = (found.center - sample["center"]).norm(dim=1)[near]
        before = (sample["guess"] - sample["center"]).norm(dim=1)[near]
        figures = (
            distance.median(),
            distance.quantile(0.9),
            before.median(),
            (excess < 0)[usable > 0.5].float().mean(),
        )
    return loss, dict(zip(_REFINE_FIGURES, figures, strict=True))


def ellipse_loss(network: nn.Module, sample: Sample) -> tuple[Tensor, Figures]:
    """Laplace likelihood of the distortion's vector under the votes' own precision, at every look.

    And the spread: the quantile loss whose minimum leaves 68.3 % of the errors within their sigma,
    whatever their distribution is.

    What a second look shows, hangs on what the first one made of the same pattern, so the network
    looks as it will in use, and learns from all that it was shown on the way.
    """
    learning, n = network.training, len(sample["vector"])
    with torch.no_grad():
        taken = list(looks_at(sample, lambda x: network.eval()(_channels_last(x))))
    # All looks at once: norms over the batch would hide what is the same in all samples of one.
    seen = torch.cat([look.seen for look, _ in taken])
    found = ellipse.decode(network.train(learning)(_channels_last(seen)))
    deviation = found.vector - torch.cat([left for _, left in taken])
    error, independent = deviation.norm(dim=1), found.sigma / found.spread
    each = error / independent + 2 * independent.log() + 10 * error / ellipse.SCALE
    claimed = (found.spread * independent.detach())[:, None]
    excess = (deviation.detach().abs().clamp_min(1e-9) / claimed).log()
    loss = (each + _SPREAD_WEIGHT * _quantile(excess).sum(1)).mean()
    with torch.no_grad():
        figures = {
            "first_median_percent": 100 * error[:n].median(),
            "median_percent": 100 * error[-n:].median(),
            "p90_percent": 100 * error[-n:].quantile(0.9),
            "within_sigma": (excess[-n:] < 0).float().mean(),
        }
    return loss, figures


def _quantile(excess: Tensor) -> Tensor:
    """Return a loss of logarithms of errors in sigmas, least where 68.3 % of them are negative."""
    return torch.maximum(ONE_SIGMA * excess, (ONE_SIGMA - 1) * excess)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LOSSES: Final[dict[Name, Callable[[nn.Module, Sample], tuple[Tensor, Figures]]]] = {
    "denoise": denoise_loss,
    "center": center_loss,
    "refine": refine_loss,
    "ellipse": ellipse_loss,
}
