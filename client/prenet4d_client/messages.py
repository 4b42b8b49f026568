"""The messages of the wire protocol: one pydantic model for each type, and nothing else.

Its ``LAYOUT`` says which arrays a message carries; where two of them have a side of the same name
(``n`` frames of ``h`` × ``w`` pixels), it has the same length.

Units and coordinates: pixels, ``[y, x]``, pixel centers at integers, ``(0, 0)`` the first pixel's;
angles in radians from +x (columns) toward +y (rows); times in seconds since the epoch; latencies in
milliseconds; intensities in detector counts.

Fields and message types may be added within a version (receivers ignore the fields and skip the
messages that they do not know); anything else that changes makes a new version.
"""

from __future__ import annotations

import time as _time
from dataclasses import dataclass
from enum import IntFlag
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


@dataclass(frozen=True, slots=True)  # no model: two are made for every message of frames
class ArraySpec:
    """How one array part is to be read."""

    name: str
    dtype: DType
    shape: Shape
    encoding: Literal["raw", "lz4"] = "raw"
    """``lz4``: one bare LZ4 block of the array's bytes."""


class ArrayRule(NamedTuple):
    """What a message type demands of one of its arrays."""

    dtypes: tuple[str, ...]
    """Any one of these."""
    shape: tuple[str | int, ...]
    """A letter stands for the same size in all arrays of the message."""
    doc: str
    optional: bool = False


class Header(_Model):
    """The fields that every message carries."""

    LAYOUT: ClassVar[dict[str, ArrayRule]] = {}
    """The arrays of this message type, by name."""

    protocol: Literal["prenet4d"] = "prenet4d"
    version: Literal[1] = 1
    """Raised by any change that is more than a new field."""
    type: str
    """Which message this is; the same as the first part."""
    publisher: str = ""
    """Identifies the sending process's life: a new value means that it restarted."""
    acquisition_id: str = ""
    """Empty where the message belongs to no acquisition."""
    sequence: Annotated[int, Field(ge=0)] = 0
    """Counts the messages of this type from this publisher, from 0, with no holes."""
    time: float = Field(default_factory=_time.time)
    """When the message was made, in seconds since the epoch."""
    arrays: tuple[ArraySpec, ...] = ()
    """How to read the parts that follow the header, in their order."""


# --- ingest: FrameSender → service -------------------------------------------------------------

_FRAME_DTYPES: tuple[str, ...] = get_args(FrameDType)
_INDICES = ArrayRule(("int64",), ("n",), "Number of each frame within the acquisition, from 0.")


class AcquisitionStart(Header):
    """An acquisition (usually one scan) begins."""

    LAYOUT: ClassVar = {
        "pixel_mask": ArrayRule(
            ("bool",),
            ("h", "w"),
            "True where a pixel can be trusted; absent: all can.",
            optional=True,
        )
    }
    type: Literal["acquisition_start"] = "acquisition_start"
    frame_shape: tuple[Annotated[int, Field(ge=8, le=8192)], Annotated[int, Field(ge=8, le=8192)]]
    """``(h, w)`` in pixels."""
    dtype: FrameDType
    """Of every frame of the acquisition."""
    scan_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """``(ny, nx)``; frame ``i`` belongs to probe position ``(i // nx, i % nx)``."""
    expected_frames: Annotated[int, Field(ge=1)] | None = None
    """How many frames will come; ``None`` where the detector runs until it is stopped."""
    saturation_value: float | None = None
    """Counts at and above which a pixel is saturated."""
    gain: Annotated[float, Field(gt=0)] = 1.0
    """Counts per electron."""
    detector: str = "native"
    """Where the frames come from, for people to read."""
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Whatever else is to be kept with the acquisition, under names of the sender's choice."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """What corrects it; the service fills it in: ``versions`` of programs, ``engine``, ``weights``
    (network → SHA-256), ``machine``, ``configuration``, and the ``calibration`` it began with."""


class Frames(Header):
    """One or many raw frames."""

    LAYOUT: ClassVar = {
        "indices": _INDICES,
        "frames": ArrayRule(_FRAME_DTYPES, ("n", "h", "w"), "Raw detector images, in counts."),
    }
    type: Literal["frames"] = "frames"


class Counters(_Model):
    """Every frame is in exactly one place: received = corrected + rejected + shed + in_flight."""

    received: int = 0
    corrected: int = 0
    rejected: int = 0
    """Could not be used."""
    shed: int = 0
    """Dropped because the service could not keep up and was told to drop."""
    in_flight: int = 0
    rejected_by_reason: dict[str, int] = Field(default_factory=dict)


class AcquisitionEnd(Header):
    """The acquisition is over; also published as the last word on it, with its counters."""

    type: Literal["acquisition_end"] = "acquisition_end"
    aborted: bool = False
    """It ended early: the sender failed, or the service gave it up."""
    reason: str = ""
    """Why it was aborted, for people to read."""
    frames: Annotated[int, Field(ge=0)] | None = None
    """How many frames the sender sent, where it says so."""
    counters: Counters | None = None
    """What became of this acquisition's frames; the service fills it in."""


# --- stream and lossless: service → subscribers and receivers -----------------------------------


class Ellipticity(_Model):
    """The distortion in use: ``ratio`` = a/b ≥ 1, ``theta`` in [0, π) of the major axis."""

    ratio: float = 1.0
    theta: float = 0.0
    ratio_sigma: float | None = None
    """One sigma; ``None`` before the first reading."""
    theta_sigma: float | None = None
    """One sigma, in radians; ``None`` before the first reading."""


class Latency(_Model):
    """Milliseconds over the recent frames: median and 99th percentile."""

    p50: float
    p99: float


class Latencies(_Model):
    """Where a frame's time goes, from its arrival to its publication."""

    queue: Latency
    """From arrival to the start of its batch."""
    compute: Latency
    """In the corrector."""
    total: Latency
    """From arrival to publication."""


def _per_frame(doc: str) -> ArrayRule:
    return ArrayRule(("float32",), ("n", 2), doc)


class Telemetry(Header):
    """What was found in one batch of frames, and how the service is doing."""

    LAYOUT: ClassVar = {
        "indices": _INDICES,
        "center": _per_frame("Center of each frame on its own, [cy, cx], in pixels."),
        "center_sigma": _per_frame("One sigma of ``center``, in pixels."),
        "tracked": _per_frame("Center followed over the scan, [cy, cx], in pixels."),
        "tracked_sigma": _per_frame("One sigma of ``tracked``, in pixels."),
        "shift": _per_frame(
            "What was applied: reference center − center in use, [y, x], in pixels."
        ),
        "dose": ArrayRule(("float32",), ("n",), "Electrons in each frame."),
        "flags": ArrayRule(("uint8",), ("n",), "Sums of ``FrameFlag``."),
    }
    type: Literal["telemetry"] = "telemetry"
    batch: int
    """The batch's number within the service's life; its patterns carry the same."""
    frame_shape: tuple[int, int]
    """``(h, w)`` in pixels."""
    scan_shape: tuple[int, int] | None = None
    """``(ny, nx)``, where it is known."""
    expected_frames: int | None = None
    """``None`` where the detector runs until it is stopped."""
    reference_center: tuple[float, float]
    """``(cy, cx)`` in pixels: where the corrected patterns have their center."""
    ellipticity: Ellipticity
    """The one that this batch was corrected with."""
    state: State
    """Of the ellipticity: still being read, settled, held by the operator, or not to be trusted."""
    patterns_averaged: int
    """Patterns in the running mean that the ellipticity is read from."""
    latency: Latencies
    frames_per_second: float
    """Corrected frames per second, recently."""
    backlog: int
    """Frames waiting in the ring."""
    counters: Counters


class _Patterns(Header):
    LAYOUT: ClassVar = {
        "indices": _INDICES,
        "patterns": ArrayRule(
            ("float32",), ("n", "h", "w"), "In counts; NaN where there is no source."
        ),
    }
    batch: int
    """The same as in the telemetry of this batch."""
    scan_shape: tuple[int, int] | None = None
    """``(ny, nx)``, where it is known."""


class Corrected(_Patterns):
    """Denoised and geometrically corrected patterns; pixels with no source are NaN."""

    type: Literal["corrected"] = "corrected"


class Aligned(_Patterns):
    """Raw counts, geometrically corrected only; pixels with no source are NaN."""

    type: Literal["aligned"] = "aligned"


class Mean(Header):
    """The running mean of the recentered raw patterns, before the ellipse is taken out."""

    LAYOUT: ClassVar = {"mean": ArrayRule(("float32",), ("h", "w"), "In counts per pattern.")}
    type: Literal["mean"] = "mean"
    patterns: int
    """How many patterns it averages."""
    ellipticity: Ellipticity
    """The latest reading of this mean."""


class Preview(Header):
    """One recent frame and what became of it, binned for people to look at; a few a second."""

    LAYOUT: ClassVar = {
        "raw": ArrayRule(("float32",), ("h", "w"), "Raw counts per pixel of the frame."),
        "corrected": ArrayRule(
            ("float32",), ("h", "w"), "Corrected counts per pixel; NaN where there is no source."
        ),
    }
    type: Literal["preview"] = "preview"
    index: Annotated[int, Field(ge=0)]
    """The frame's number within the acquisition, from 0."""
    scan_shape: tuple[int, int] | None = None
    """``(ny, nx)``, where it is known."""
    frame_shape: tuple[int, int]
    """``(h, w)`` of the frame, in pixels."""
    binning: Annotated[int, Field(ge=1)]
    """Each pixel shown is the mean of so many × so many of the frame; rests at the lower and the
    right edge are left out."""
    center: tuple[float, float]
    """``(cy, cx)`` of the direct beam in the frame, in its pixels: the one that was taken out."""
    reference_center: tuple[float, float]
    """``(cy, cx)`` of the direct beam in the corrected pattern, in the frame's pixels."""
    ellipticity: Ellipticity
    """The one that was taken out."""
    dose: float
    """Electrons in the frame."""


class DetectorRadii(_Model):
    """The virtual detectors: a disk and a ring around the reference center, radii in pixels."""

    bright_field_radius: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Of the bright field detector's disk."""
    annular_inner: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Of the annular dark field detector's hole."""
    annular_outer: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Of the annular dark field detector."""
    automatic: bool = False
    """Found from the pattern, rather than set by the operator."""


class Descan(_Model):
    """The center's drift over the scan: a robust fit of a plane, or of second order.

    ``center = c[0] + c[1] v + c[2] u + c[3] v² + c[4] v u + c[5] u²``, where ``v`` runs from −1 in
    the scan's first row to 1 in its last, and ``u`` so over its columns. A plane has the first
    three terms only.
    """

    coefficients_y: tuple[float, ...]
    """Of the center's y, in pixels."""
    coefficients_x: tuple[float, ...]
    """Of the center's x, in pixels."""
    sigma_y: tuple[float, ...]
    """One sigma of each of ``coefficients_y``."""
    sigma_x: tuple[float, ...]
    """One sigma of each of ``coefficients_x``."""
    residual: tuple[float, float]
    """Typical distance of the frames' centers from the fit, ``(y, x)``, in pixels."""
    outliers: Annotated[float, Field(ge=0, le=1)]
    """Share of the frames that were left out because they lie far from the fit."""


class Maps(Header):
    """What changed in the scan maps: one rectangle of probe positions, in all maps alike.

    A newcomer subscribes, asks for the whole maps by the control command ``maps``, and leaves out
    messages of this type whose ``sequence`` is not above that of the answer.
    """

    LAYOUT: ClassVar = {
        "values": ArrayRule(
            ("float32",),
            ("k", "height", "width"),
            "The maps within ``region``, in the order of ``names``; NaN where no frame came yet, "
            "and where a frame without counts has no center of mass.",
        )
    }
    type: Literal["maps"] = "maps"
    scan_shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """``(ny, nx)`` of the whole maps."""
    region: tuple[
        Annotated[int, Field(ge=0)],
        Annotated[int, Field(ge=0)],
        Annotated[int, Field(ge=0)],
        Annotated[int, Field(ge=0)],
    ]
    """``(y0, x0, height, width)`` in probe positions: what ``values`` covers."""
    names: tuple[str, ...]
    """``bright_field``, ``annular_dark_field``, ``sum`` (raw counts in the geometrically corrected
    pattern), ``com_y``, ``com_x`` (its center of mass relative to the reference center, pixels),
    ``center_y``, ``center_x`` (the raw frame's center in use, pixels), ``center_sigma`` (one sigma
    of it, root mean square of both axes, pixels; infinite where it is not known), ``flags`` (sums
    of ``FrameFlag``)."""
    detectors: DetectorRadii | None = None
    """In use for the latest frames; ``None`` as long as nothing was measured with them."""
    frames: Annotated[int, Field(ge=0)]
    """Probe positions that are filled in so far."""
    descan: Descan | None = None
    """The latest fit; ``None`` as long as there are too few centers for one."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        y0, x0, height, width = self.region
        if y0 + height > self.scan_shape[0] or x0 + width > self.scan_shape[1]:
            raise ValueError(f"region {self.region} lies outside of the scan {self.scan_shape}")
        for spec in self.arrays:
            if tuple(spec.shape) != (len(self.names), height, width):
                raise ValueError(
                    f"values {spec.shape} are not {len(self.names)} maps of {height} × {width}"
                )
        return self


class Event(Header):
    """Something a person should know, in one sentence."""

    type: Literal["event"] = "event"
    level: Literal["info", "warning", "error"]
    code: str
    """Stable name for programs: ``acquisition_started``, ``frame_rejected``, …"""
    message: str
    """The sentence."""
    details: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """The numbers in it, for programs."""


# --- lossless path: receiver ↔ service ----------------------------------------------------------


class Register(Header):
    """A receiver asks for every message of ``topics`` and grants its first credit."""

    type: Literal["register"] = "register"
    name: str
    """Who this is, for people to read."""
    topics: tuple[str, ...]
    """Message types, from the same list as on the stream."""
    credit: Annotated[int, Field(ge=1)]
    """One credit is one message."""


class Registered(Header):
    """The service's answer to ``register``."""

    type: Literal["registered"] = "registered"
    heartbeat_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Silence longer than this means that the other side is gone; each side sends a heartbeat (or
    anything else) every quarter of it."""


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
    """``status``, ``config``, ``freeze``, ``unfreeze``, ``recalibrate``, ``save_calibration``,
    ``load_calibration``, ``set_reference_center``, ``clear_reference_center``, ``set_detectors``,
    ``clear_detectors``, ``maps``, ``snapshot``, ``start_recording`` or ``stop_recording``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """``save_calibration`` may take ``descan``, true: with the fit of the descan;
    ``load_calibration`` takes ``calibration``, a map as ``save_calibration`` returned it;
    ``set_reference_center`` takes ``center``, ``[cy, cx]`` in pixels; ``set_detectors`` takes
    ``bright_field_radius``, ``annular_inner`` and ``annular_outer``, in pixels; ``maps`` may take
    ``newer_than``, the publisher and the sequence number of the answer before, and then answers
    without ``values`` if nothing has changed; ``start_recording`` may take ``name``, of the file,
    without folder and suffix."""


class ControlReply(Header):
    """The answer to the request with the same ``sequence``."""

    LAYOUT: ClassVar = {
        "mean": ArrayRule(
            ("float32",),
            ("h", "w"),
            "``snapshot``: the running mean, if there is one.",
            optional=True,
        ),
        "values": ArrayRule(
            ("float32",),
            ("k", "height", "width"),
            "``maps``: the whole maps; ``result`` holds the fields of a ``maps`` message for them, "
            "with the ``sequence`` of the last one that was published, which they include.",
            optional=True,
        ),
    }
    type: Literal["control_reply"] = "control_reply"
    ok: bool
    """Whether it was done."""
    error: str = ""
    """Where it was not: why, in one sentence."""
    result: dict[str, Any] = Field(default_factory=dict)
    """What the command returns."""


AnyHeader = Annotated[
    AcquisitionStart
    | Frames
    | AcquisitionEnd
    | Telemetry
    | Corrected
    | Aligned
    | Mean
    | Preview
    | Maps
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
    "telemetry", "corrected", "aligned", "mean", "preview", "maps", "event", "acquisition_start",
    "acquisition_end",
)  # fmt: skip
