"""The status as Prometheus' metrics; whoever has the status can make them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from prenet4d_client.messages import Ellipticity, State
from prenet4d_server.monitoring.status import AlarmCode, RecordingStatus, Status


class _StatusCollector(Collector):
    """Turns a status into Prometheus' families."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        now = self._status
        yield InfoMetricFamily(
            "prenet4d", "The service.", {"version": now.version, "engine": now.engine}
        )
        yield from _frames(now)
        yield from _latencies(now)
        yield from _calibration(now)
        yield from _alarms(now)
        yield from _receivers(now)
        yield from _recording(now.recording)
        yield from _machine(now)
        yield _counter(
            "ingest_restarts",
            "How often the ingest process had to be started again.",
            now.source.restarts,
        )
        yield _gauge("uptime_seconds", "Since the service started.", now.uptime_s)
        yield _gauge("healthy", "1 while its own threads run.", now.healthy)
        yield _gauge("ready", "1 while frames are welcome.", now.ready)
        yield _gauge("source_ready", "1 while the source is open.", now.source.ready)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"prenet4d_{name}", documentation, value=float(value))


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"prenet4d_{name}", documentation, value=float(value))


def _labelled(family: Metric, values: Mapping[str, float]) -> Metric:
    """The family with one sample for each value of its only label."""
    for label, value in values.items():
        family.add_metric([label], float(value))  # type: ignore[attr-defined]
    return family


def _frames(now: Status) -> Iterator[Metric]:
    counted = now.counters
    outcomes = ("received", "corrected", "rejected", "shed")
    yield _labelled(
        CounterMetricFamily(
            "prenet4d_frames", "Frames, by what became of them.", labels=["outcome"]
        ),
        {outcome: getattr(counted, outcome) for outcome in outcomes},
    )
    yield _labelled(
        CounterMetricFamily(
            "prenet4d_frames_rejected", "Frames that could not be used.", labels=["reason"]
        ),
        counted.rejected_by_reason,
    )
    yield _gauge(
        "frames_in_flight", "Frames received and not yet accounted for.", counted.in_flight
    )
    yield _gauge("backlog_frames", "Frames waiting in the ring.", now.backlog)
    yield _gauge(
        "backlog_limit_frames",
        "Frames that find room in the ring; 0 between acquisitions.",
        now.backlog_limit,
    )
    yield _gauge("frames_per_second", "Frames corrected a second, recently.", now.frames_per_second)
    running = now.acquisition
    yield _gauge("acquisition_running", "1 while an acquisition runs.", running is not None)
    if running is not None:
        yield _gauge(
            "acquisition_frames", "Frames received in the acquisition.", running.counters.received
        )
        if running.expected_frames is not None:
            yield _gauge(
                "acquisition_expected_frames",
                "Frames that the acquisition will have.",
                running.expected_frames,
            )


def _latencies(now: Status) -> Iterator[Metric]:
    family = HistogramMetricFamily(
        "prenet4d_frame_latency_seconds",
        "Where a frame's time goes: queue, from its arrival to its batch; compute, its correction; "
        "total, from its arrival to its publication.",
        labels=["stage"],
    )
    for stage, histogram in now.latency_histograms.items():
        bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
        family.add_metric([stage], buckets, sum_value=histogram.sum)
    yield family


def _calibration(now: Status) -> Iterator[Metric]:
    yield _labelled(
        GaugeMetricFamily(
            "prenet4d_calibration_state",
            "1 for the state that the calibration is in.",
            labels=["state"],
        ),
        {name: now.state == name for name in get_args(State)},
    )
    ellipse = now.ellipticity or Ellipticity()
    yield _gauge("ellipticity_ratio", "Distortion in use, a/b.", ellipse.ratio)
    yield _gauge("ellipticity_theta_radians", "Direction of its major axis.", ellipse.theta)
    if ellipse.ratio_sigma is not None:
        yield _gauge("ellipticity_ratio_sigma", "One sigma of the ratio.", ellipse.ratio_sigma)
    yield _gauge("patterns_averaged", "Patterns in the running mean.", now.patterns_averaged)


def _alarms(now: Status) -> Iterator[Metric]:
    standing = Counter(alarm.code for alarm in now.alarms)
    yield _labelled(
        GaugeMetricFamily("prenet4d_alarms", "Alarms that stand.", labels=["code"]),
        {code: standing[code] for code in get_args(AlarmCode)},
    )


def _receivers(now: Status) -> Iterator[Metric]:
    yield _gauge("lossless_receivers", "Registered receivers.", len(now.receivers))
    yield _labelled(
        GaugeMetricFamily(
            "prenet4d_lossless_receiver_behind_seconds",
            "How old the oldest message is that waits for a receiver's credit.",
            labels=["receiver"],
        ),
        now.receivers_behind_s,
    )


def _recording(recording: RecordingStatus | None) -> Iterator[Metric]:
    if recording is not None:
        running = recording.state != "idle"
        yield _gauge("recording_running", "1 while the service records.", running)
        yield _gauge("recording_patterns", "Patterns recorded by it.", recording.patterns)
        yield _gauge(
            "recording_complete", "0 where something is missing from it.", recording.complete
        )
        yield _gauge("recording_disk_free_bytes", "Free where recordings go.", recording.free_bytes)


def _machine(now: Status) -> Iterator[Metric]:
    yield _labelled(
        GaugeMetricFamily(
            "prenet4d_process_resident_memory_bytes",
            "Memory of the service's processes.",
            labels=["process"],
        ),
        {process.name: process.resident_bytes for process in now.processes},
    )
    yield _labelled(
        CounterMetricFamily(
            "prenet4d_process_cpu_seconds",
            "Processor time of the service's processes.",
            labels=["process"],
        ),
        {process.name: process.cpu_s for process in now.processes},
    )
    gpu = now.gpu
    if gpu is not None:
        yield _labelled(
            GaugeMetricFamily(
                "prenet4d_gpu_memory_used_bytes", "Memory in use on the GPU.", labels=["gpu"]
            ),
            {gpu.name: gpu.memory_used_bytes},
        )
        yield _labelled(
            GaugeMetricFamily("prenet4d_gpu_memory_bytes", "Memory of the GPU.", labels=["gpu"]),
            {gpu.name: gpu.memory_bytes},
        )
        if gpu.load is not None:
            yield _labelled(
                GaugeMetricFamily(
                    "prenet4d_gpu_load_ratio", "Share of time in which it worked.", labels=["gpu"]
                ),
                {gpu.name: gpu.load},
            )


def exposition(status: Status) -> bytes:
    """What ``/metrics`` answers: the status in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry)
