"""The demo: detector, service, watcher and recorder at work, beside the truth."""

from prenet4d_server.demo.run import Demo, Outcome, run
from prenet4d_server.demo.score import Deviation, Score

__all__ = ["Demo", "Deviation", "Outcome", "Score", "run"]
