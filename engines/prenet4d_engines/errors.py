"""What can go wrong in the engines.

EngineError
├── BackendError       an engine that cannot be built or run here
├── CalibrationError   a calibration that cannot be read or does not fit
├── EvaluationError    a rival that is named but cannot be run
├── FrameError         frames of a shape, type or value that cannot be corrected
├── SimulationError    a simulation asked for that cannot be
├── TrainingError      a training that cannot start or go on
└── WeightsError       shipped weights that are missing or not what they should be
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything that prenet4d_engines refuses or fails at; catch this to catch all."""


class BackendError(EngineError):
    """An engine cannot be built or run on this machine."""


class CalibrationError(EngineError):
    """A calibration cannot be read, or does not fit the frames."""


class EvaluationError(EngineError):
    """A method that the evaluation was told to compare with cannot be run."""


class FrameError(EngineError):
    """Frames have a shape, a type or values that cannot be corrected."""


class SimulationError(EngineError):
    """What was asked of the simulator makes no pattern or scan."""


class TrainingError(EngineError):
    """A training cannot start or go on."""


class WeightsError(EngineError):
    """Weights are missing, damaged, or belong to another network."""
