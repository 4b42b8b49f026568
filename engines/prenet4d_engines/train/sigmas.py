"""Sigmas that mean what they say, fitted on fresh samples of invented crystals.

Training never saw these crystals, as it never saw most of a user's. The seeds are neither those of
training nor those of validation or evaluation.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from prenet4d_engines.models import CenterNet, EllipseNet, RefineNet, center, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.simulate import relatives
from prenet4d_engines.simulate.multislice import Multislice
from prenet4d_engines.train.samples import BATCHES, VALIDATION_SEED, Sample, looks_at, near_guesses
from prenet4d_engines.weights import Name

ONE_SIGMA: Final = math.erf(math.sqrt(0.5))
"""Share of a normal distribution within one sigma."""
_CALIBRATION_SEED: Final = VALIDATION_SEED + 1
_BATCH: Final = 32
_ROUNDS: Final = 3
"""Where a center's sigma is that of the hesitating network before, the spread does not scale it;
and what the ellipse network is told of its first look changes the second."""
_CLOSE: Final = 0.005


@torch.no_grad()
def calibrate(
    task: Name, network: nn.Module, *, samples: int, computed: Multislice | None = None
) -> float:
    """Scale a network's sigmas so that 68.3 % of errors lie within one; return the factor.

    The factor is folded into the last layer's bias: nothing downstream has to know of it.

    Args:
        task: Whose samples the network reads.
        network: In eval mode; changed in place.
        samples: How many to fit to.
        computed: Multislice patterns of training materials, for a quarter of them.
    """
    rng = np.random.default_rng(_CALIBRATION_SEED)
    materials = relatives(rng, samples)
    batches = [BATCHES[task](rng, _BATCH, materials, computed) for _ in range(samples // _BATCH)]
    whole = 1.0
    for _ in range(_ROUNDS):
        factor = _scale(network, batches)
        whole *= factor
        if abs(factor - 1) < _CLOSE:
            break
    return whole


def _scale(network: nn.Module, batches: list[Sample]) -> float:
    """Scale what the sigmas of these samples are made of; return by how much."""
    in_sigmas = torch.cat([_in_sigmas(network, each) for each in batches])
    factor = float(in_sigmas.quantile(ONE_SIGMA))
    if isinstance(network, CenterNet):
        bias = network.head[-1].bias
        assert isinstance(bias, Tensor)
        bias[center.LOG_SIGMA_Y : center.LOG_SIGMA_X + 1] += math.log(factor)
    elif isinstance(network, RefineNet):
        assert network.head.bias is not None
        network.head.bias[refine.SPREAD] += math.log(factor)
    elif isinstance(network, EllipseNet):
        assert network.head.bias is not None
        network.head.bias[ellipse.SPREAD] += math.log(factor)
    return factor


def _in_sigmas(network: nn.Module, sample: Sample) -> Tensor:
    """Return the errors (m,) of coordinates or components in units of what the network claims."""
    if isinstance(network, EllipseNet):
        *_, (look, left) = looks_at(sample, network)
        return ((look.left.vector - left).abs() / look.left.sigma[:, None]).flatten()
    shown = sample["usable"] > 0.5
    if isinstance(network, RefineNet):
        guess, _ = near_guesses(sample)
        x = refine.prepare(Bins.of(sample["frame"], sample["mask"]), guess, sample["sigma"])
        votes = refine.decode(network(x), guess)
        where, sigma = refine.settle(guess, votes, sample["sigma"])
        return ((where - sample["center"]).abs() / sigma)[shown].flatten()
    bins = Bins.of(sample["frame"], sample["mask"])
    found = center.decode(network(center.prepare(bins)), bins)
    return ((found.center - sample["center"]).abs() / found.sigma)[shown].flatten()
