"""FrameSender → service: an acquisition and its frames.

What the service says of them when it publishes their start and their end is in the same messages.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from prenet4d_client.messages.header import INDICES, ArrayRule, FrameDType, Header, Part

_FRAME_DTYPES: tuple[str, ...] = get_args(FrameDType)


class AcquisitionStart(Header):
    """An acquisition (usually one scan) begins, and ends the one that its sender has not ended.

    Its id has at most 1000 characters; where it is empty, the service publishes it under one of its
    own. One that the service cannot take, because a field is wrong, or its frames do not fit into
    the service's memory or are more than 268,435,456, never begins and has no ``acquisition_end``:
    an ``event`` with the code ``bad_start`` says why, under the same ``acquisition_id``. Where not
    even the id can be read, the ``event`` has the code ``bad_message``.
    """

    LAYOUT: ClassVar = {
        "pixel_mask": ArrayRule(
            ("bool",),
            ("h", "w"),
            "True where a pixel can be trusted; absent: all can. One of another shape than the "
            "frames is left out, which an ``event`` tells.",
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
    saturation_value: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Counts at and above which a pixel is saturated; ``None`` where nobody knows."""
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Counts per electron."""
    detector: str = "native"
    """Where the frames come from, for people to read."""
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Whatever else is to be kept with the acquisition, under names of the sender's choice. Where
    they take more than 256 KiB, the service leaves them out. It adds ``series``, the detector's own
    name for the acquisition, where they have no such name."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """What corrects it; the service fills it in: ``versions`` of programs, ``engine``, ``weights``
    (network → SHA-256), ``machine``, ``configuration``, and the ``calibration`` it began with."""


class Frames(Header):
    """One or many raw frames.

    A message larger than the service's ``source.max_message`` (256 MiB, if it is not set) is
    refused, which an ``event`` tells; a part of more than four times that, and more than 1 GiB, is
    lost with the connection, which nobody tells: send what is large in several messages.
    ``FrameSender`` puts at most 16 MiB of frames into one, or a single larger frame.
    """

    LAYOUT: ClassVar = {
        "indices": INDICES,
        "frames": ArrayRule(_FRAME_DTYPES, ("n", "h", "w"), "Raw detector images, in counts."),
    }
    type: Literal["frames"] = "frames"


class Counters(Part):
    """Every frame is in exactly one place: received = corrected + rejected + shed + in_flight."""

    received: int = 0
    corrected: int = 0
    rejected: int = 0
    """Could not be used."""
    shed: int = 0
    """Dropped because the service could not keep up and was told to drop."""
    in_flight: int = 0
    rejected_by_reason: dict[str, int] = Field(default_factory=dict)
    """``corrupt`` (cannot be read), ``wrong_shape_or_dtype``, ``no_acquisition`` (none with this id
    runs), ``index_outside_scan``, ``duplicate_index``, ``bad_counts`` (NaN, infinite or negative)
    or ``correction_failed``; an ``event`` with the same code says more."""


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
