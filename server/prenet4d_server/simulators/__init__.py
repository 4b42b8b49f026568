"""Simulated detectors: each speaks the real bytes of the source of the same name."""

from prenet4d_server.simulators.base import FAULTS, ArrayFeed, FaultName, FrameFeed
from prenet4d_server.simulators.dectris_v1 import simulate_dectris_v1
from prenet4d_server.simulators.dectris_v2 import simulate_dectris_v2
from prenet4d_server.simulators.native import simulate_native

__all__ = [
    "FAULTS",
    "ArrayFeed",
    "FaultName",
    "FrameFeed",
    "simulate_dectris_v1",
    "simulate_dectris_v2",
    "simulate_native",
]
