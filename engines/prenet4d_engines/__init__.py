"""prenet4d engines: the science, from simulation to the three-stage corrector.

The names below are the public face. Those that need torch import it when they are first used, so
that ``import prenet4d_engines`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prenet4d_engines.batch import CorrectedBatch, FrameFlag, PatternCorrector, State
    from prenet4d_engines.calibration import Calibration
    from prenet4d_engines.config import CorrectorConfig
    from prenet4d_engines.corrector import Corrector
    from prenet4d_engines.descan import Descan
    from prenet4d_engines.errors import EngineError
    from prenet4d_engines.geometry import Ellipticity
    from prenet4d_engines.identity import IdentityCorrector
    from prenet4d_engines.maps import MapAccumulator
    from prenet4d_engines.virtual import DetectorRadii

__all__ = [
    "Calibration",
    "CorrectedBatch",
    "Corrector",
    "CorrectorConfig",
    "Descan",
    "DetectorRadii",
    "Ellipticity",
    "EngineError",
    "FrameFlag",
    "IdentityCorrector",
    "MapAccumulator",
    "PatternCorrector",
    "State",
]

_HOMES = {
    "Calibration": "calibration",
    "CorrectedBatch": "batch",
    "Corrector": "corrector",
    "CorrectorConfig": "config",
    "Descan": "descan",
    "DetectorRadii": "virtual",
    "Ellipticity": "geometry",
    "EngineError": "errors",
    "FrameFlag": "batch",
    "IdentityCorrector": "identity",
    "MapAccumulator": "maps",
    "PatternCorrector": "batch",
    "State": "batch",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
