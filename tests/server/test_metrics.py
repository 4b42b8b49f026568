"""Counters that balance, latencies, and what HTTP shows of them."""

import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prenet4d_server.counters import Ledger
from prenet4d_server.errors import BindError
from prenet4d_server.http_server import HttpServer
from prenet4d_server.metrics import WINDOW, LatencyWindow, Meters
from prenet4d_server.service import Service
from prometheus_client.parser import text_string_to_metric_families

from .live import balanced, frames, listening, sender, settings


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


def test_the_rate_is_zero_when_nothing_came_lately(monkeypatch):
    meters = Meters()
    now = time.monotonic()
    clock = iter([now, now + 0.5, now + 1.0, now + 60])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meters.done(1000)  # these took time before the first entry
    meters.done(50)
    assert meters.frames_per_second == pytest.approx(50 / 1.0)
    assert meters.frames_per_second == 0


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_http_tells_health_and_metrics_of_a_running_service():
    with Service(settings()) as service, listening(service) as listener:
        with sender(service) as source:
            source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3))
            source.send(frames(6))
            source.send(frames(1), [99])
            source.end()
        listener.wait_for("acquisition_end")
        url = service.endpoints["http"]
        assert get(url + "/healthz")[0] == 200
        assert get(url + "/readyz")[0] == 200
        assert get(url + "/nothing")[0] == 404
        code, page = get(url)
        assert code == 200
        assert "7 received = 6 corrected + 1 rejected" in page
        families = {f.name: f for f in text_string_to_metric_families(get(url + "/metrics")[1])}
        values = {
            sample.labels["outcome"]: sample.value for sample in families["prenet4d_frames"].samples
        }
        assert values == {"received": 7, "corrected": 6, "rejected": 1, "shed": 0}
        rejected = families["prenet4d_frames_rejected"].samples
        assert [(s.labels["reason"], s.value) for s in rejected] == [("index_outside_scan", 1)]
        states = {s.labels["state"]: s.value for s in families["prenet4d_state"].samples}
        assert states == {"calibrating": 0, "locked": 0, "frozen": 1, "lost": 0}
        with pytest.raises(BindError, match=r"http\.address"):
            HttpServer(url.replace("http:", "tcp:"), service.status)
