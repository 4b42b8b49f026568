"""Counters that balance, latencies, and what Prometheus gets of them."""

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from prenet4d_client import ControlClient
from prenet4d_server.monitoring import machine
from prenet4d_server.monitoring.counters import Ledger
from prenet4d_server.monitoring.meters import BOUNDS_S, WINDOW, LatencyWindow, Meters
from prenet4d_server.monitoring.metrics import exposition
from prenet4d_server.monitoring.status import GpuStatus, RecordingStatus, Status
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, balanced, frames, sender, settings, until


@given(
    entries=st.lists(
        st.tuples(st.sampled_from(["correct", "reject", "shed"]), st.integers(0, 5)), max_size=30
    )
)
def test_ledgers_balance_and_add_up(entries):
    total = Ledger()
    scans = [Ledger(total), Ledger(total)]
    for number, (outcome, n) in enumerate(entries):
        ledger = scans[number % 2]
        ledger.receive(n + 1)
        getattr(ledger, outcome)(n, *(["torn"] if outcome == "reject" else []))
        assert balanced(ledger.snapshot())
    snapshots = [ledger.snapshot() for ledger in scans]
    everything = total.snapshot()
    assert balanced(everything)
    for name in ("received", "corrected", "rejected", "shed", "in_flight"):
        assert getattr(everything, name) == sum(getattr(one, name) for one in snapshots)
    assert everything.in_flight == len(entries)


def test_latencies_are_of_the_last_frames():
    window = LatencyWindow()
    assert window.read().p99 == 0
    window.add(np.full(3 * WINDOW, 1e6))
    window.add(np.arange(WINDOW, dtype=float))
    summary = window.read()
    assert summary.p50 == pytest.approx((WINDOW - 1) / 2)
    assert summary.p99 == pytest.approx(0.99 * (WINDOW - 1))


@given(st.lists(st.floats(0, 1e5), max_size=50))
def test_the_histogram_counts_every_frame_once(milliseconds):
    window = LatencyWindow()
    for part in (milliseconds[:7], milliseconds[7:]):
        window.add(np.array(part, float))
    histogram = window.histogram
    edges = [-1.0, *BOUNDS_S, np.inf]
    for low, high, count in zip(edges[:-1], edges[1:], histogram.counts, strict=True):
        # A value at a bound belongs below it.
        assert count == sum(low * 1e3 < value <= high * 1e3 for value in milliseconds)
    assert histogram.sum == pytest.approx(sum(milliseconds) / 1e3)


class Clock(NamedTuple):
    """What the meters look at; other threads may go on looking at the real one."""

    monotonic: Callable[[], float]


def test_the_rate_is_zero_when_nothing_came_lately(monkeypatch):
    meters = Meters()
    now = time.monotonic()
    clock = iter([now, now + 0.5, now + 1.0, now + 60])
    monkeypatch.setattr("prenet4d_server.monitoring.meters.time", Clock(lambda: next(clock)))
    meters.done(1000)  # these took time before the first entry
    meters.done(50)
    assert meters.frames_per_second == pytest.approx(50 / 1.0)
    assert meters.frames_per_second == 0


def test_the_rate_of_slow_frames_is_no_zero_while_they_come(monkeypatch):
    meters = Meters()
    now = 1000.0
    monkeypatch.setattr("prenet4d_server.monitoring.meters.time", Clock(lambda: now))
    for _ in range(10):
        now += 4.0
        meters.done(1)
    for _ in range(39):
        now += 0.1
        assert meters.frames_per_second == pytest.approx(0.25, rel=0.5)
    now += 10.0
    assert meters.frames_per_second == 0


def scraped(status: Status) -> dict[str, dict[tuple[str, ...], float]]:
    """What Prometheus makes of a status: sample's name → values of its labels → value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(exposition(status).decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


@pytest.fixture(scope="module")
def status():
    """Of a service that is in the middle of a scan, as it comes over the control socket."""
    alarms = {"backlog_share": 0.001, "detector_silent_s": 0.1}
    with (
        Service(settings(alarms=alarms)) as service,
        ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
        sender(service) as source,
    ):
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(4, 5))
        source.send(frames(10))
        until(lambda: sum(client.status()["latency_histograms"]["total"]["counts"]) == 10)
        until(lambda: "detector_silent" in [one["code"] for one in client.status()["alarms"]])
        yield Status.model_validate(client.status())


def test_every_frame_is_in_the_latency_histograms(status):
    found = scraped(status)
    for stage in ("queue", "compute", "total"):
        assert found["prenet4d_frame_latency_seconds_count"][(stage,)] == 10
        assert found["prenet4d_frame_latency_seconds_bucket"][("+Inf", stage)] == 10
        buckets = [
            count
            for (_, of), count in found["prenet4d_frame_latency_seconds_bucket"].items()
            if of == stage
        ]
        assert buckets == sorted(buckets)
    assert found["prenet4d_frame_latency_seconds_sum"][("total",)] > 0


def test_what_stands_is_in_the_metrics(status):
    found = scraped(status)
    assert found["prenet4d_alarms"][("detector_silent",)] == 1
    assert found["prenet4d_alarms"][("center_moved",)] == 0
    assert found["prenet4d_acquisition_running"][()] == 1
    assert found["prenet4d_acquisition_expected_frames"][()] == 20
    assert found["prenet4d_backlog_limit_frames"][()] > 100
    memory = found["prenet4d_process_resident_memory_bytes"]
    assert memory.keys() == {("service",), ("ingest",)}
    assert min(memory.values()) > 1 << 20
    assert found["prenet4d_process_cpu_seconds_total"][("service",)] > 0


def test_what_is_not_there_has_no_metric(status):
    without = scraped(status.model_copy(update={"gpu": None, "recording": None}))
    assert not any(name.startswith(("prenet4d_gpu", "prenet4d_recording")) for name in without)
    gpu = GpuStatus(name="H100", memory_used_bytes=1, memory_bytes=2, load=None)
    found = scraped(status.model_copy(update={"gpu": gpu}))
    assert found["prenet4d_gpu_memory_bytes"] == {("H100",): 2}
    assert "prenet4d_gpu_load_ratio" not in found
    found = scraped(status.model_copy(update={"gpu": gpu.model_copy(update={"load": 0.5})}))
    assert found["prenet4d_gpu_load_ratio"] == {("H100",): 0.5}


@pytest.mark.gpu
def test_a_gpu_that_is_used_tells_its_memory():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    block = torch.zeros(1 << 20, device="cuda")
    found = machine.gpu()
    assert found.name == torch.cuda.get_device_name()
    assert block.nbytes < found.memory_used_bytes < found.memory_bytes


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is missing")
def test_prometheus_own_tool_finds_nothing_wrong(status):
    recording = RecordingStatus(
        state="recording", directory="/data", free_bytes=1, name="a", files=("a.h5",), patterns=1,
        started=0.0, complete=True, absent=0, reason="",
    )  # fmt: skip
    gpu = GpuStatus(name="H100", memory_used_bytes=1, memory_bytes=2, load=0.5)
    full = status.model_copy(
        update={
            "gpu": gpu,
            "recording": recording,
            "receivers": ("a",),
            "receivers_behind_s": {"a": 1.0},
        }
    )
    text = exposition(full)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
