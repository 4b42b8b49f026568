"""Sigmas that mean what they say, fitted on fresh samples of the training materials.

The seeds are neither those of training nor those of validation or evaluation.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from prenet4d_engines.models import CenterNet, EllipseNet, center, ellipse
from prenet4d_engines.simulate import TRAINING
from prenet4d_engines.symmetry import inversion
from prenet4d_engines.train.samples import BATCHES, VALIDATION_SEED, Task

ONE_SIGMA: Final = math.erf(math.sqrt(0.5))
ONE_SIGMA_RADIUS: Final = math.sqrt(-2 * math.log(1 - ONE_SIGMA))
"""68.3 % of a two-dimensional normal distribution lies within this many sigma."""
_CALIBRATION_SEED: Final = VALIDATION_SEED + 1
_REFINED_SEED: Final = VALIDATION_SEED + 2
_BATCH: Final = 32


@torch.no_grad()
def calibrate(task: Task, network: nn.Module, *, samples: int) -> float:
    """Scale a network's sigmas so that 68.3 % of errors lie within one; return the factor.

    The factor is folded into the last layer's bias: nothing downstream has to know of it.
    """
    rng = np.random.default_rng(_CALIBRATION_SEED)
    scaled = []
    for _ in range(max(1, samples // _BATCH)):
        sample = BATCHES[task](rng, _BATCH, tuple(TRAINING.values()))
        if isinstance(network, CenterNet):
            x, grid = center.prepare(sample["frame"], sample["mask"])
            found = center.decode(network(x), grid)
            shown = sample["usable"] > 0.5
            error = (found.center - sample["center"]).abs() / found.sigma
            scaled.append(error[shown].flatten())
        else:
            votes = network(ellipse.prepare(sample["mean"], sample["valid"]))
            answer = ellipse.decode(votes)
            scaled.append((answer.vector - sample["vector"]).norm(dim=1) / answer.sigma)
    factor = float(torch.cat(scaled).quantile(ONE_SIGMA))
    if isinstance(network, CenterNet):
        bias = network.head[-1].bias
        assert isinstance(bias, Tensor)
        bias[center.LOG_SIGMA_Y : center.LOG_SIGMA_X + 1] += math.log(factor)
    elif isinstance(network, EllipseNet):
        factor /= ONE_SIGMA_RADIUS
        assert network.head.bias is not None
        network.head.bias[2:] -= 2 * math.log(factor)
    return factor


def fit_refined(network: CenterNet, *, samples: int = 3072) -> tuple[float, float, float, float]:
    """Fit the sigma of centers that inversion symmetry has refined; run it after `calibrate`.

    The exponents of ``exp(a) counting^b network^c asymmetry^d`` make the errors' Laplace
    likelihood largest, which a few wrong beams do not dominate; then a is such that 68.3 % of the
    errors lie within one sigma.

    Args:
        network: The center network, its own sigmas calibrated.
        samples: Frames to fit to.

    Returns:
        a, b, c, d for `prenet4d_engines.symmetry`.
    """
    features, errors = _refined_errors(network, samples)
    weights = torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        log_sigma = features @ weights
        value = (log_sigma + math.sqrt(2) * errors * torch.exp(-log_sigma)).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scale = (errors / torch.exp(features @ weights)).quantile(ONE_SIGMA)
        weights[0] += scale.log()
    a, b, c, d = (round(float(value), 3) for value in weights.detach())
    return a, b, c, d


@torch.no_grad()
def _refined_errors(network: CenterNet, samples: int) -> tuple[Tensor, Tensor]:
    """Return log features (m, 4) and errors in bins (m,), one row for each refined coordinate."""
    rng = np.random.default_rng(_REFINED_SEED)
    network.eval()
    features, errors = [], []
    for _ in range(max(1, samples // _BATCH)):
        sample = BATCHES["center"](rng, _BATCH, tuple(TRAINING.values()))
        x, grid = center.prepare(sample["frame"], sample["mask"])
        found = center.decode(network(x), grid)
        seen = inversion(sample["frame"], sample["mask"], found.center)
        kept = seen.inside & (sample["usable"] > 0.5)
        logs = [
            torch.zeros_like(found.sigma),
            seen.counting.log(),
            (found.sigma / seen.factor).log(),
            seen.asymmetry.log()[:, None].expand_as(found.sigma),
        ]
        features.append(torch.stack(logs, -1)[kept].flatten(0, 1))
        errors.append((seen.center - sample["center"]).abs()[kept].flatten() / seen.factor)
    rows = torch.cat(features)
    rows[:, 0] = 1.0
    return rows, torch.cat(errors)
