"""Centers of single frames: which beam is the direct one, and where in it the center lies.

The center network answers the first question for the whole frame. The second takes two looks around
its answer: the pattern's inversion symmetry gives a center that the counts alone justify, and the
refining network corrects it by what it sees of the beam's edge and of counterparts that differ.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prenet4d_engines.models import center, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.center import CenterEstimate
from prenet4d_engines.models.inversion import inversion


class CenterNetworks(Protocol):
    """What runs both networks; every `Backend` does."""

    def center(self, x: Tensor) -> Tensor:
        """Run the center network."""
        ...

    def refine(self, x: Tensor) -> Tensor:
        """Run the refining network."""
        ...


def find_centers(frames: Tensor, mask: Tensor, networks: CenterNetworks) -> CenterEstimate:
    """Find the centers of raw frames.

    Args:
        frames: (n, h, w) float32 electrons, n > 0.
        mask: (h, w) or (n, h, w) bool, True where a pixel is valid.
        networks: Both networks.
    """
    bins = Bins.of(frames, mask)
    found = center.decode(networks.center(center.prepare(bins)), bins)
    guess = inversion(bins, found.center)
    votes = networks.refine(refine.prepare(bins, guess, found.sigma))
    where, sigma = refine.settle(guess, refine.decode(votes, guess), found.sigma)
    return CenterEstimate(where, sigma, found.usable, found.others)
