"""The classical methods that our networks are compared with, each with its source.

A comparison is worth as much as its rivals are good, so every doubt is settled in their favour:
a method with a parameter is run with each of its ``settings``, and the one that comes out best
*on the truth* is what the tables show; filters may take off a dark frame; masked pixels are filled
where that helps; center finders are told the direct beam's true radius where the simulator knows
it, and ellipse fits are told the true center. A method whose package is not installed is reported
as missing.
"""

from prenet4d_engines.evaluate.classical.center import CENTER_METHODS
from prenet4d_engines.evaluate.classical.denoise import DENOISE_METHODS
from prenet4d_engines.evaluate.classical.ellipse import ELLIPSE_METHODS
from prenet4d_engines.evaluate.classical.method import Method

__all__ = ["CENTER_METHODS", "DENOISE_METHODS", "ELLIPSE_METHODS", "Method"]
