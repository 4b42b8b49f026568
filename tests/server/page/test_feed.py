"""What the page keeps: an hour of curves and no more, the last of everything else."""

import math
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from prenet4d_client.messages import Ellipticity
from prenet4d_server.page import feed as feed_module
from prenet4d_server.page import words
from prenet4d_server.page.feed import EVENTS, Feed
from prenet4d_server.page.history import GAP_S, ROWS, History
from prenet4d_server.page.settings import ServiceAddress
from prenet4d_server.page.theme import DARK
from prenet4d_server.page.traces import Traces
from prenet4d_server.processes import RunningService
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, frames, sender, settings, until
from .telling import event, start, telemetry


@pytest.fixture
def feed():
    """Not connected: it is told by hand."""
    return Feed(ServiceAddress(stream="tcp://127.0.0.1:1", control="tcp://127.0.0.1:1"))


def test_a_second_of_telemetry_becomes_one_row_of_means():
    history = History()
    history.add(telemetry(1000.1, tracked=np.full((4, 2), 7.0, np.float32)))
    history.add(telemetry(1000.9, tracked=np.full((4, 2), 9.0, np.float32), backlog=5))
    assert history.count == 0

    history.add(telemetry(1001.2))

    rows, count = history.after(0)
    assert count == 1
    assert (rows["time"][0], rows["center_y"][0], rows["backlog"][0]) == (1000, 8, 4)
    assert rows["theta"][0] == pytest.approx(math.degrees(0.5))
    assert history.after(count) == ({name: pytest.approx([]) for name in rows}, 1)


def test_what_is_not_known_is_nan_and_hides_nothing_else():
    history = History()
    center = np.array([[np.nan, np.nan], [5.0, 6.0]], np.float32)
    unknown = Ellipticity()
    history.add(telemetry(1000, 2, tracked=center, ellipticity=unknown))
    history.add(telemetry(1001, dose=np.full(4, np.nan, np.float32)))
    history.flush()
    rows, _ = history.after(0)
    assert (rows["center_y"][0], rows["center_x"][0], rows["ratio"][0]) == (5, 6, 1)
    assert math.isnan(rows["ratio_sigma"][0])
    assert math.isnan(rows["dose"][1])


def test_a_silence_breaks_the_curves():
    history = History()
    history.add(telemetry(1000))
    history.add(telemetry(1001 + GAP_S))
    history.add(telemetry(1050))
    rows, _ = history.after(0)
    known = np.isfinite(rows["frames_per_second"])
    assert known.tolist() == [True, False, False, True]
    history.flush()
    known = np.isfinite(history.after(0)[0]["frames_per_second"])
    assert known.tolist() == [True, False, False, True, False, False, True]
    assert (np.diff(history.after(0)[0]["time"]) > 0).all()


@pytest.mark.parametrize("at_once", [True, False])
def test_no_sigma_is_drawn_across_a_silence(feed, at_once):
    """What is between the band's edges is filled, also where only NaN stands between them."""
    traces = Traces(DARK)
    for second in (1000, 1001, 2000, 2001):
        feed.take(telemetry(second))
        if not at_once:
            traces.update(feed)
    feed.history.flush()
    traces.update(feed)
    drawn = traces.source.data
    thick = np.array(drawn["ratio_high"]) - drawn["ratio_low"]
    assert np.isfinite(thick).all()
    assert (thick > 0).tolist() == [True, True, False, False, True, True]
    assert np.isnan(drawn["ratio"]).tolist() == [False, False, True, True, False, False]


def test_an_hours_curves_grow_no_further(feed):
    traces, hour = Traces(DARK), ROWS
    message = telemetry()
    for second in range(2 * hour + 10):
        header = message.header.model_copy(update={"time": 1000.0 + second})
        feed.take(replace(message, header=header))
        if second % 500 == 0:
            traces.update(feed)
    feed.history.flush()
    traces.update(feed)

    assert feed.history.count == 2 * hour + 10
    assert {len(column) for column in traces.source.data.values()} == {hour}
    rows, _ = feed.history.after(0)
    assert {len(column) for column in rows.values()} == {hour}
    assert rows["time"][-1] - rows["time"][0] == hour - 1

    late = Traces(DARK)
    late.update(feed)
    assert len(late.source.data["time"]) == hour


def test_the_last_of_everything_is_kept_and_events_roll_over(feed):
    for number in range(EVENTS + 20):
        feed.take(event(f"number {number}"))
    assert len(feed.events) == EVENTS
    assert feed.events[-1].message == f"number {EVENTS + 19}"

    feed.take(start())
    feed.take(telemetry(1000.0, tracked=np.full((4, 2), 3.0, np.float32)))
    feed.take(telemetry(1001.0))
    assert feed.running
    assert feed.scan.detector == "<camera>"


def test_the_descan_along_a_line_is_no_move_since_the_start(feed):
    along = np.array([[7.0, 7.0], [7.0, 9.0], [7.0, 11.0], [7.0, 13.0]], np.float32)
    feed.take(telemetry(1000.0, tracked=along, scan_shape=(5, 4)))
    assert feed.moved == 0
    moved = along + np.array([3, 4], np.float32)
    feed.take(telemetry(1001.0, tracked=moved, scan_shape=(5, 4)))
    assert feed.moved == pytest.approx(5)
    without_lines = {"scan_shape": None, "acquisition_id": "another"}
    feed.take(telemetry(1002.0, tracked=along, **without_lines))
    assert feed.moved == 0
    feed.take(telemetry(1003.0, frames=2, tracked=along[:2], **without_lines))
    assert feed.moved == pytest.approx(4)


def test_a_scan_that_begins_without_a_beam_has_not_moved(feed):
    nothing, along = np.full((4, 2), np.nan, np.float32), np.full((4, 2), 9, np.float32)
    feed.take(start())
    for at, tracked in ((1000.0, nothing), (1001.0, along), (1002.0, along)):
        feed.take(telemetry(at, tracked=tracked, scan_shape=(5, 4)))
        assert ("no beam yet" in words.center(feed)) == (at == 1000)
        assert feed.moved == 0
    np.testing.assert_array_equal(feed.history.after(0)[0]["center_y"], [np.nan, 9])


def test_who_comes_after_the_start_knows_the_scan_all_the_same(feed):
    feed.take(telemetry(1234.0))
    assert (feed.scan.acquisition_id, feed.scan.scan_shape) == ("scan", (4, 5))
    assert feed.running


def test_the_detector_is_known_once_the_status_tells_it():
    with Service(settings()) as service, sender(service) as source:
        address = ServiceAddress(
            stream=service.endpoints["stream"], control=service.endpoints["control"]
        )
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3), detector="Camera")
        source.send(frames(1))
        until(lambda: service.status().counters.corrected == 1)
        with Feed(address) as late:
            until(lambda: service._publisher.wants("telemetry"))
            source.send(frames(1), [1])
            until(lambda: late.telemetry is not None)
            until(lambda: late.scan is not None and late.scan.detector == "Camera")
        source.end()


def test_maps_and_previews_are_asked_for_only_while_somebody_looks():
    with Service(settings()) as service:
        address = ServiceAddress(
            stream=service.endpoints["stream"], control=service.endpoints["control"]
        )
        wants = service._publisher.wants
        with Feed(address) as feed:
            until(lambda: wants("telemetry"))
            assert not wants("maps")
            assert not wants("preview")
            feed.arrive()
            feed.arrive()
            until(lambda: wants("maps") and wants("preview"))
            feed.leave()
            feed.leave()
            until(lambda: not wants("maps") and not wants("preview"))
            assert wants("telemetry")


def test_a_service_that_is_late_once_is_not_said_to_be_gone(tmp_path, monkeypatch):
    late_by_s = 3.5
    assert late_by_s < feed_module.STATUS_TIMEOUT_S
    monkeypatch.setattr(feed_module, "STATUS_TIMEOUT_S", TIMEOUT_S)  # this machine may stand still
    with RunningService(tmp_path, corrector={"backend": "identity"}, ring={"size": "8MiB"}) as late:
        address = ServiceAddress(stream=late.stream, control=late.control)
        with Feed(address) as feed:
            until(lambda: feed.status is not None)
            late.process.send_signal(signal.SIGSTOP)
            time.sleep(late_by_s)
            before = feed.status  # what was on its way has come
            assert feed.trouble == ""
            late.process.send_signal(signal.SIGCONT)
            until(lambda: feed.status is not before or feed.trouble)
            assert (feed.trouble, feed.unanswered_since) == ("", None)
