"""Detectors: one file for each protocol, all turned into the events of ``base``."""

from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    Fault,
    FrameBlock,
    Source,
    SourceEvent,
)
from prenet4d_server.sources.dectris_v1 import DectrisV1Source
from prenet4d_server.sources.dectris_v2 import DectrisV2Source
from prenet4d_server.sources.native import NativeSource

__all__ = [
    "AcquisitionEnd",
    "AcquisitionStart",
    "DectrisV1Source",
    "DectrisV2Source",
    "Fault",
    "FrameBlock",
    "NativeSource",
    "Source",
    "SourceEvent",
]
