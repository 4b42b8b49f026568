"""The messages of the wire protocol: one pydantic model for each type, and nothing else.

The service listens on four sockets; where it has CURVE keys, all are encrypted, and a client sets
the service's public key as its server key and any pair of keys as its own:

- ingest, PULL, port 5560: a PUSH socket sends ``acquisition_start``, ``frames`` and
  ``acquisition_end``.
- stream, PUB, port 5561: a SUB socket subscribes to the types it wants of ``telemetry``,
  ``corrected``, ``aligned``, ``mean``, ``preview``, ``maps``, ``event``, ``acquisition_start`` and
  ``acquisition_end``. The service waits for nobody: a hole in ``sequence`` is what was missed.
- lossless, ROUTER, port 5562: a DEALER socket sends ``register``. The service answers
  ``registered``, or ``goodbye`` where it refuses, and then sends messages of the stream's types,
  each for one credit, first the ``acquisition_start`` of what is running; ``credit`` grants more.
  ``heartbeat`` and ``goodbye`` go both ways, for none.
- control, ROUTER, port 5563: a DEALER socket sends ``control_request`` and gets ``control_reply``.
  Nothing goes before a message's first part: a REQ socket sends an empty one, and gets no answer.
  Where the service names operators' keys, who has none of them may ask and not command.

What cannot be read is skipped, and an ``event`` says what is wrong with it; on the lossless socket,
who is not registered gets that as a ``goodbye`` too, and on the control socket as the answer alone.
Frames that cannot be used are counted as rejected. What a receiver says may take 64 KiB, a command
1 MiB; what is more than four times that breaks the connection. A receiver that was let go, or hears
nothing for ``heartbeat_s``, registers again.

The tables of arrays (a model's ``LAYOUT``) say which of them a message carries; where two have a
side of the same name (``n`` frames of ``h`` × ``w`` pixels), it has the same length.

Units and coordinates: pixels, ``[y, x]``, pixel centers at integers, ``(0, 0)`` the first pixel's;
angles in radians from +x (columns) toward +y (rows); times in seconds since the epoch; latencies in
milliseconds; intensities in detector counts.

Fields and message types may be added within a version (receivers ignore the fields and skip the
messages that they do not know); anything else that changes makes a new version.
"""

from prenet4d_client.messages.control import ControlReply, ControlRequest
from prenet4d_client.messages.header import (
    VERSION,
    ArrayRule,
    ArraySpec,
    DType,
    FrameDType,
    Header,
    Shape,
)
from prenet4d_client.messages.ingest import AcquisitionEnd, AcquisitionStart, Counters, Frames
from prenet4d_client.messages.lossless import Credit, Goodbye, Heartbeat, Register, Registered
from prenet4d_client.messages.stream import (
    Aligned,
    Corrected,
    Descan,
    DetectorRadii,
    Ellipticity,
    Event,
    FrameFlag,
    Latencies,
    Latency,
    Maps,
    Mean,
    Preview,
    State,
    Telemetry,
)

_TYPES: tuple[type[Header], ...] = (
    AcquisitionStart, Frames, AcquisitionEnd,
    Telemetry, Corrected, Aligned, Mean, Preview, Maps, Event,
    Register, Registered, Credit, Heartbeat, Goodbye,
    ControlRequest, ControlReply,
)  # fmt: skip
MESSAGE_TYPES: dict[str, type[Header]] = {
    model.model_fields["type"].default: model for model in _TYPES
}
STREAM_TOPICS = (
    "telemetry", "corrected", "aligned", "mean", "preview", "maps", "event", "acquisition_start",
    "acquisition_end",
)  # fmt: skip

__all__ = [
    "MESSAGE_TYPES",
    "STREAM_TOPICS",
    "VERSION",
    "AcquisitionEnd",
    "AcquisitionStart",
    "Aligned",
    "ArrayRule",
    "ArraySpec",
    "ControlReply",
    "ControlRequest",
    "Corrected",
    "Counters",
    "Credit",
    "DType",
    "Descan",
    "DetectorRadii",
    "Ellipticity",
    "Event",
    "FrameDType",
    "FrameFlag",
    "Frames",
    "Goodbye",
    "Header",
    "Heartbeat",
    "Latencies",
    "Latency",
    "Maps",
    "Mean",
    "Preview",
    "Register",
    "Registered",
    "Shape",
    "State",
    "Telemetry",
]
