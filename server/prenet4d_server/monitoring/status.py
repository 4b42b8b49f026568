"""What the service says about itself: to the operator, the page, programs and Prometheus."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from prenet4d_client.messages import Counters, DetectorRadii, Ellipticity, Latencies, State

Stage = Literal["queue", "compute", "total"]
RecordingState = Literal["idle", "starting", "recording", "stopping"]
ProcessName = Literal["service", "ingest", "recorder", "page"]
AlarmCode = Literal[
    "center_moved", "ellipticity_unstable", "detector_silent", "many_flagged", "many_rejected",
    "backlog_high", "receiver_behind",
]  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class AcquisitionStatus(_Part):
    """The acquisition that is running."""

    acquisition_id: str
    series: str
    detector: str
    frame_shape: tuple[int, int]
    dtype: str
    scan_shape: tuple[int, int] | None
    expected_frames: int | None
    gain: float
    saturation_value: float | None
    metadata: dict[str, str | int | float | bool | None]
    counters: Counters


class SourceStatus(_Part):
    """The detector's side."""

    kind: str
    address: str
    ready: bool
    """Its socket or file is open."""
    restarts: int
    """How often the ingest process had to be started again."""


class AlarmStatus(_Part):
    """An alarm that stands."""

    code: AlarmCode
    """The same as the code of the event that raised it."""
    subject: str
    """Whom it is about, where there are several, such as a receiver's name; else empty."""
    message: str
    """In words, with the value as it is now."""
    since: float
    """When it was raised, in seconds since the epoch."""
    value: float
    threshold: float
    """Of the value; the alarm is cleared well below it."""


class MapsStatus(_Part):
    """The scan maps of the running acquisition, or of the last one."""

    available: bool
    why_not: str
    """In a sentence; empty where there are maps."""
    positions: int
    """Probe positions that are filled in."""
    detectors: DetectorRadii | None
    """The virtual detectors in use; ``None`` before anything was measured with them."""
    descan_px: float | None
    """How far the center drifts over the scan, by the latest fit; ``None`` before the first."""


class RecordingStatus(_Part):
    """The recording that the operator starts and stops."""

    state: RecordingState
    directory: str
    """Where all recordings go."""
    free_bytes: int
    """On its disk."""
    name: str
    """Of the recording that runs, or ran last; empty before the first."""
    files: tuple[str, ...]
    """Their names, in the order in which they were begun."""
    patterns: int
    """Probe positions that have a pattern, over all files."""
    absent: int
    """Patterns that acquisitions announced and that are not in their files, which are closed."""
    started: float | None
    """In seconds since the epoch."""
    complete: bool
    """Whether every acquisition is in its file to its regular end, so far."""
    reason: str
    """Why not."""


class Histogram(_Part):
    """How often something took how long, over the service's life."""

    bounds: tuple[float, ...]
    """Upper bounds of all buckets but the last, in seconds, ascending."""
    counts: tuple[int, ...]
    """Frames in each bucket, bounds included; one more than ``bounds``: the last is what took
    longer."""
    sum: float
    """Of all times, in seconds."""


class ProcessStatus(_Part):
    """One of the service's processes."""

    name: ProcessName
    resident_bytes: int
    cpu_s: float
    """Processor time since it was started."""


class GpuStatus(_Part):
    """The GPU that the networks run on."""

    name: str
    memory_used_bytes: int
    """By everybody."""
    memory_bytes: int
    load: float | None
    """Share of the time in which it worked, over its last sampling period; ``None`` without the
    package nvidia-ml-py."""


class Status(_Part):
    """What the service is doing, for the operator, the status command and the metrics."""

    version: str
    publisher: str
    """This service's life: the same as in its messages."""
    healthy: bool
    """The threads of its own process run."""
    ready: bool
    """Networks loaded, source open: frames are welcome."""
    uptime_s: float
    engine: str
    """What corrects, and where it runs."""
    endpoints: dict[str, str]
    source: SourceStatus
    state: State | None
    """The calibration's; ``None`` before the first batch."""
    ellipticity: Ellipticity | None
    reference_center: tuple[float, float] | None
    patterns_averaged: int
    frames_per_second: float
    backlog: int
    """Frames waiting in the ring."""
    backlog_limit: int
    """How many frames of the running acquisition the ring can hold; 0 between acquisitions."""
    latency: Latencies
    latency_histograms: dict[Stage, Histogram]
    counters: Counters
    """Over the service's life."""
    acquisition: AcquisitionStatus | None
    receivers: tuple[str, ...]
    """Who is registered on the lossless path."""
    receivers_behind_s: dict[str, float]
    """Receiver → how old the oldest message is that waits for its credit, in seconds."""
    alarms: tuple[AlarmStatus, ...]
    """Those that stand, oldest first."""
    maps: MapsStatus
    recording: RecordingStatus | None
    """``None`` where ``recording.directory`` is not configured."""
    processes: tuple[ProcessStatus, ...]
    gpu: GpuStatus | None
    recent_events: tuple[str, ...]
    """The last events, oldest first."""
