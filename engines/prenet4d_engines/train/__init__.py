"""Training of the networks from simulated patterns."""

from prenet4d_engines.train.loop import Progress, train

__all__ = ["Progress", "train"]
