"""prenet4d client: send frames, subscribe to corrected patterns, control the service.

::

    from prenet4d_client import Subscriber

    with Subscriber("tcp://127.0.0.1:5561", topics="telemetry") as stream:
        for telemetry in stream:
            print(telemetry.tracked, telemetry.ellipticity.ratio)
"""

from importlib.metadata import version

from prenet4d_client.control import ControlClient
from prenet4d_client.errors import (
    CommandRefused,
    ConnectionRefused,
    InvalidUse,
    MalformedMessage,
    MissingCodec,
    NoAnswer,
    OversizeMessage,
    PayloadMismatch,
    Prenet4dError,
    ProtocolError,
    UnknownType,
    UnsupportedVersion,
)
from prenet4d_client.lossless import LosslessReceiver
from prenet4d_client.maps import ScanMaps
from prenet4d_client.messages import FrameFlag
from prenet4d_client.sender import FrameSender
from prenet4d_client.subscriber import Subscriber
from prenet4d_client.wire import Message, decode, encode

__version__ = version("prenet4d")

__all__ = [
    "CommandRefused",
    "ConnectionRefused",
    "ControlClient",
    "FrameFlag",
    "FrameSender",
    "InvalidUse",
    "LosslessReceiver",
    "MalformedMessage",
    "Message",
    "MissingCodec",
    "NoAnswer",
    "OversizeMessage",
    "PayloadMismatch",
    "Prenet4dError",
    "ProtocolError",
    "ScanMaps",
    "Subscriber",
    "UnknownType",
    "UnsupportedVersion",
    "__version__",
    "decode",
    "encode",
]
