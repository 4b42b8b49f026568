"""How good the networks are: against the truth, and against the classical methods beside them.

`evaluate` runs everything and returns a `Report` of plain tables, goals met or missed, JSON and
plots. Classical methods and what is done in their favour: `prenet4d_engines.evaluate.classical`.
"""

from prenet4d_engines.evaluate.evaluation import SUBJECTS, Subject, evaluate
from prenet4d_engines.evaluate.report import Check, Part, Report, Table

__all__ = ["SUBJECTS", "Check", "Part", "Report", "Subject", "Table", "evaluate"]
