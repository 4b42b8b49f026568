"""Service → subscribers and receivers: what was found, and how the service is doing."""

from __future__ import annotations

from enum import IntFlag
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prenet4d_client.messages.header import INDICES, ArrayRule, Header, Part
from prenet4d_client.messages.ingest import Counters

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


class Ellipticity(Part):
    """The distortion in use: ``ratio`` = a/b ≥ 1, ``theta`` in [0, π) of the major axis.

    A corrected pattern shows at ``p`` what the frame had at ``c + D (p − c_ref)``, where ``c_ref``
    is the reference center, ``c = c_ref − shift`` the frame's center in use, and
    ``D = R(theta) diag(√ratio, 1/√ratio) R(−theta)``, which acts on (x, y).
    """

    ratio: float = 1.0
    theta: float = 0.0
    ratio_sigma: float | None = None
    """One sigma; ``None`` before the first reading, or where a loaded calibration has none."""
    theta_sigma: float | None = None
    """One sigma, in radians; ``None`` likewise."""


class Latency(Part):
    """Milliseconds over the recent frames: median and 99th percentile."""

    p50: float
    p99: float


class Latencies(Part):
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
        "indices": INDICES,
        "center": _per_frame("Center of each frame on its own, [cy, cx], in pixels."),
        "center_sigma": _per_frame("One sigma of ``center``, in pixels."),
        "tracked": _per_frame(
            "Center followed over the scan, [cy, cx], in pixels; NaN before the first beam."
        ),
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
        "indices": INDICES,
        "patterns": ArrayRule(
            ("float32",),
            ("n", "h", "w"),
            "In counts; NaN where there is no source. Beside sharp edges the interpolation, which "
            "keeps sums and centroids, can leave slightly negative ones: before a root or a "
            "logarithm, set these to 0.",
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


class DetectorRadii(Part):
    """The virtual detectors: a disk and a ring around the reference center, radii in pixels."""

    bright_field_radius: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Of the bright field detector's disk."""
    annular_inner: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Of the annular dark field detector's hole."""
    annular_outer: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Of the annular dark field detector."""
    automatic: bool = False
    """Found from the pattern, rather than set by the operator."""


class Descan(Part):
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
    """``(y0, x0, height, width)`` in probe positions: what ``values`` covers. Height and width are
    0 where only the other fields have changed."""
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
