"""The messages of the wire protocol: one pydantic model for each type, and nothing else.

Each message type is one pydantic model here. Its ``LAYOUT`` says which arrays it carries and how
their shapes depend on each other: ``n`` frames of ``h`` × ``w`` pixels. Units and coordinates:
pixels, ``[y, x]``, pixel centers at integers; angles in radians from +x toward +y; times in seconds
since the epoch; latencies in milliseconds; intensities in detector counts.

Fields may be added within a version (receivers ignore those they do not know); anything else that
changes makes a new version.
"""

from __future__ import annotations

import time as _time
from enum import IntFlag
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1

Shape: TypeAlias = tuple[Annotated[int, Field(ge=0)], ...]
DType = Literal["bool", "uint8", "uint16", "uint32", "int64", "float32", "float64"]
FrameDType = Literal["uint8", "uint16", "uint32", "float32"]
State = Literal["calibrating", "locked", "frozen", "lost"]


class FrameFlag(IntFlag):
    """What is special about one frame; ``Telemetry``'s array ``flags`` holds their sums."""

    BLANK = 1
    """No counts at all."""
    SATURATED = 2
    """At least one valid pixel at the detector's saturation value."""
    LOW_DOSE = 4
    """Fewer electrons than the configured minimum: take its center with care."""
    OUTLIER = 8
    """The single-frame center lies far from the track and was not trusted."""
    NO_BEAM = 16
    """The network sees no usable direct beam."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ArraySpec(_Model):
    """How one array part is to be read."""

    name: str
    dtype: DType
    shape: Shape
    encoding: Literal["raw", "lz4"] = "raw"
    """``lz4``: one bare LZ4 block of the array's bytes."""


class Header(_Model):
    """The fields that every message carries."""

    LAYOUT: ClassVar[dict[str, tuple[tuple[str, ...], str]]] = {}
    """Array name → (allowed dtypes, shape symbols); a name ending in ``?`` is optional."""

    protocol: Literal["prenet4d"] = "prenet4d"
    version: Literal[1] = 1
    type: str
    publisher: str = ""
    """Identifies the sending process's life: a new value means that it restarted."""
    acquisition_id: str = ""
    """Empty where the message belongs to no acquisition."""
    sequence: Annotated[int, Field(ge=0)] = 0
    """Counts the messages of this type from this publisher, from 0, with no holes."""
    time: float = Field(default_factory=_time.time)
    """When the message was made, in seconds since the epoch."""
    arrays: tuple[ArraySpec, ...] = ()


# --- ingest: FrameSender → service -------------------------------------------------------------

_FRAME_DTYPES = get_args(FrameDType)


class AcquisitionStart(Header):
    """An acquisition (usually one scan) begins."""

    LAYOUT: ClassVar = {"pixel_mask?": (("bool",), "h w")}
    type: Literal["acquisition_start"] = "acquisition_start"
    frame_shape: tuple[Annotated[int, Field(ge=8, le=8192)], Annotated[int, Field(ge=8, le=8192)]]
    """``(h, w)`` in pixels."""
    dtype: FrameDType
    scan_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """``(ny, nx)``; frame ``i`` belongs to probe position ``(i // nx, i % nx)``."""
    expected_frames: Annotated[int, Field(ge=1)] | None = None
    """How many frames will come; ``None`` where the detector runs until it is stopped."""
    saturation_value: float | None = None
    """Counts at and above which a pixel is saturated."""
    gain: Annotated[float, Field(gt=0)] = 1.0
    """Counts per electron."""
    detector: str = "native"
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class Frames(Header):
    """One or many raw frames."""

    LAYOUT: ClassVar = {"indices": (("int64",), "n"), "frames": (_FRAME_DTYPES, "n h w")}
    type: Literal["frames"] = "frames"


class AcquisitionEnd(Header):
    """The acquisition is over; also published as the last word on it, with its counters."""

    type: Literal["acquisition_end"] = "acquisition_end"


# --- stream and lossless: service → subscribers and receivers -----------------------------------


class Ellipticity(_Model):
    """The distortion in use: ``ratio`` = a/b ≥ 1, ``theta`` in [0, π) of the major axis."""

    ratio: float = 1.0
    theta: float = 0.0
    ratio_sigma: float | None = None
    """One sigma; ``None`` before the first reading."""
    theta_sigma: float | None = None


class Counters(_Model):
    """Every frame is in exactly one place: received = corrected + rejected + shed + in_flight."""

    received: int = 0
    corrected: int = 0
    rejected: int = 0
    shed: int = 0
    in_flight: int = 0
    rejected_by_reason: dict[str, int] = Field(default_factory=dict)


class Latency(_Model):
    """Milliseconds over the recent frames: median and 99th percentile."""

    p50: float
    p99: float


class Latencies(_Model):
    """Where a frame's time goes, from its arrival to its publication."""

    queue: Latency
    compute: Latency
    total: Latency


class Telemetry(Header):
    """What was found in one batch of frames, and how the service is doing."""

    LAYOUT: ClassVar = {
        "indices": (("int64",), "n"),
        "center": (("float32",), "n 2"),
        "center_sigma": (("float32",), "n 2"),
        "tracked": (("float32",), "n 2"),
        "tracked_sigma": (("float32",), "n 2"),
        "shift": (("float32",), "n 2"),
        "dose": (("float32",), "n"),
        "flags": (("uint8",), "n"),
    }
    type: Literal["telemetry"] = "telemetry"
    batch: int
    """The batch's number within the service's life; its patterns carry the same."""
    frame_shape: tuple[int, int]
    scan_shape: tuple[int, int] | None = None
    expected_frames: int | None = None
    reference_center: tuple[float, float]
    ellipticity: Ellipticity
    state: State
    patterns_averaged: int
    """Patterns in the running mean that the ellipticity is read from."""
    latency: Latencies
    frames_per_second: float
    backlog: int
    """Frames waiting in the ring."""
    counters: Counters


class _Patterns(Header):
    LAYOUT: ClassVar = {"indices": (("int64",), "n"), "patterns": (("float32",), "n h w")}
    batch: int
    scan_shape: tuple[int, int] | None = None


class Corrected(_Patterns):
    """Denoised and geometrically corrected patterns; pixels with no source are NaN."""

    type: Literal["corrected"] = "corrected"


class Aligned(_Patterns):
    """Raw counts, geometrically corrected only; pixels with no source are NaN."""

    type: Literal["aligned"] = "aligned"


class Mean(Header):
    """The running mean of the recentered raw patterns, before the ellipse is taken out."""

    LAYOUT: ClassVar = {"mean": (("float32",), "h w")}
    type: Literal["mean"] = "mean"
    patterns: int
    ellipticity: Ellipticity


class Event(Header):
    """Something a person should know, in one sentence."""

    type: Literal["event"] = "event"
    level: Literal["info", "warning", "error"]
    code: str
    """Stable name for programs: ``acquisition_started``, ``frame_rejected``, …"""
    message: str
    details: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


# --- lossless path: receiver ↔ service ----------------------------------------------------------


class Register(Header):
    """A receiver asks for every message of ``topics`` and grants its first credit."""

    type: Literal["register"] = "register"
    name: str
    topics: tuple[str, ...]
    credit: Annotated[int, Field(ge=1)]
    """One credit is one message."""


class Registered(Header):
    """The service's answer to ``register``."""

    type: Literal["registered"] = "registered"
    heartbeat_s: float
    """Silence longer than this gets a receiver dropped."""


class Credit(Header):
    """The receiver can take ``credit`` more messages."""

    type: Literal["credit"] = "credit"
    credit: Annotated[int, Field(ge=1)]


class Heartbeat(Header):
    """Still here; sent both ways."""

    type: Literal["heartbeat"] = "heartbeat"


class Goodbye(Header):
    """A receiver leaves, or the service drops it: ``reason`` says why."""

    type: Literal["goodbye"] = "goodbye"
    reason: str = ""


# --- control ------------------------------------------------------------------------------------


class ControlRequest(Header):
    """One command to the service."""

    type: Literal["control_request"] = "control_request"
    command: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ControlReply(Header):
    """The answer to the request with the same ``sequence``."""

    LAYOUT: ClassVar = {"mean?": (("float32",), "h w")}
    type: Literal["control_reply"] = "control_reply"
    ok: bool
    error: str = ""
    result: dict[str, Any] = Field(default_factory=dict)


AnyHeader = Annotated[
    AcquisitionStart
    | Frames
    | AcquisitionEnd
    | Telemetry
    | Corrected
    | Aligned
    | Mean
    | Event
    | Register
    | Registered
    | Credit
    | Heartbeat
    | Goodbye
    | ControlRequest
    | ControlReply,
    Field(discriminator="type"),
]
MESSAGE_TYPES: dict[str, type[Header]] = {
    model.model_fields["type"].default: model for model in get_args(get_args(AnyHeader)[0])
}
STREAM_TOPICS = (
    "telemetry", "corrected", "aligned", "mean", "event", "acquisition_start", "acquisition_end",
)  # fmt: skip
