"""Alarms: raised once, cleared once, in plain words, and shown by a running service."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from prenet4d_client import LosslessReceiver
from prenet4d_client.messages import Counters, Event
from prenet4d_engines.batch import CorrectedBatch
from prenet4d_engines.identity import IdentityCorrector
from prenet4d_server.cli import app
from prenet4d_server.config import AlarmSettings
from prenet4d_server.ingest.notices import Started
from prenet4d_server.monitoring.alarms import Alarms, Facts
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, frames, listening, sender, settings, until

STARTED = Started(
    at=0, acquisition_id="scan", series="1", frame_shape=(16, 24), dtype="uint16", slots=100,
    base=0, scan_shape=None, expected_frames=1000, saturation_value=None, gain=1.0,
    detector="test", metadata={}, packed_mask=None,
)  # fmt: skip
OFF = {name: 0.0 for name in AlarmSettings.model_fields if name != "center_moved_s"}


class Watched:
    """Alarms with one threshold on, and what they told."""

    def __init__(self, **thresholds: float) -> None:
        self.events: list[Event] = []
        chosen = AlarmSettings(**{**OFF, **thresholds})
        self.alarms = Alarms(chosen, patterns_to_lock=256, tell=self.events.append)
        self.now = 1000.0

    def look(self, later_s: float = 0.2, **facts: object) -> list[str]:
        """Look again, some time later; returns the codes that are told by it."""
        before = len(self.events)
        self.now += later_s
        self.alarms.look(Facts(**({"started": STARTED} | facts)), self.now)  # type: ignore[arg-type]
        return [event.code for event in self.events[before:]]

    def see(self, centers: object, flags: int = 0, name: str = "scan", first: int = 0) -> None:
        """A batch that begins with this frame has been corrected just now."""
        self.alarms.see(name, corrected(centers, flags, first))

    @property
    def standing(self) -> list[str]:
        return [alarm.code for alarm in self.alarms.active]


def corrected(centers: object, flags: int = 0, first: int = 0) -> CorrectedBatch:
    tracked = np.array(centers, np.float32)
    n = len(tracked)
    indices = np.arange(first, first + n)
    batch = IdentityCorrector((8, 8)).process(np.ones((n, 8, 8), np.uint16), indices)
    return dataclasses.replace(batch, tracked=tracked, flags=np.full(n, flags, np.uint8))


def test_an_alarm_is_raised_once_and_cleared_once_well_below_its_threshold() -> None:
    watched = Watched(backlog_share=0.8)
    told = [watched.look(backlog=waiting) for waiting in (10, 79, 80, 99, 79, 60, 80, 55, 70)]
    assert told == [[], [], ["backlog_high"], [], [], [], [], ["backlog_high_cleared"], []]
    assert watched.events[0].level == "warning"
    assert watched.events[0].acquisition_id == "scan"
    assert watched.events[0].details == {"value": 0.8, "threshold": 0.8}
    assert watched.events[1].level == "info"


def test_the_standing_alarm_follows_the_value() -> None:
    watched = Watched(backlog_share=0.8)
    watched.look(backlog=85)
    since = watched.alarms.active[0].since
    watched.look(backlog=99)
    (alarm,) = watched.alarms.active
    assert (alarm.value, alarm.since) == (0.99, since)
    assert "99%" in alarm.message
    watched.look(backlog=0)
    assert watched.alarms.active == ()


def test_nothing_is_told_where_all_is_off() -> None:
    watched = Watched()
    watched.see([(0, 0)] * 100, flags=1)
    watched.see([(99, 99)] * 100, flags=1)
    worst = Counters(received=1000, rejected=500, shed=500)
    watched.look(counters=Counters())
    told = watched.look(3600, silent_s=1e3, backlog=100, behind_s={"x": 99.0}, counters=worst)
    assert told == []


def test_a_beam_that_moves_is_told_and_one_that_drifts_slowly_is_not() -> None:
    watched = Watched(center_moved_px=5.0)
    watched.look()
    watched.see([(10, 10), (10, 10), (90, 90)])  # the median counts
    watched.see([(np.nan, np.nan)] * 3)
    assert watched.look(0) == []
    watched.see([(10, 16)] * 3)
    assert watched.look(0) == ["center_moved"]
    assert watched.events[0].message == "Beam center moved 6.0 px in 2 s."
    assert watched.look(0) == []
    assert watched.look(3) == ["center_moved_cleared"]


class Scanned(Watched):
    """Lines of 100 positions, along which the descan moves the center by 12 px and back."""

    scan = dataclasses.replace(STARTED, scan_shape=(100, 100))

    def lines(
        self, first: int, last: int, line_s: float, jump: tuple[float, float] = (0, 0)
    ) -> list[str]:
        """Everything that is told while these lines come, at each look what came since."""
        told = []
        for number in range(round(first * line_s / 0.2), round(last * line_s / 0.2)):
            new = np.arange(round(number * 0.2 / line_s * 100),
                            round((number + 1) * 0.2 / line_s * 100))  # fmt: skip
            along, drift = new % 100 * 0.12, new // 100 * 0.002
            self.see(np.stack([along + drift, drift], axis=1) + jump, first=int(new[0]))
            told += self.look(started=self.scan)
        return told


@pytest.mark.parametrize("line_s", [0.02, 0.4, 1.0, 1.4, 5.0])
def test_the_descan_along_a_line_and_the_fly_back_are_no_move_and_a_jump_is(line_s: float) -> None:
    watched = Scanned(center_moved_px=5.0)
    watched.look(started=watched.scan)
    lines = round(20 / line_s)
    assert watched.lines(0, lines, line_s) == []
    told = watched.lines(lines, 2 * lines, line_s, jump=(-4.0, 4.5))
    assert told == ["center_moved", "center_moved_cleared"]
    moved = float(watched.events[0].message.split("moved ")[1].split()[0])
    assert moved == pytest.approx(6.0, abs=0.5)
    assert watched.events[0].message.endswith(f" px in {max(2.0, line_s):.2g} s.")


def test_a_beam_that_goes_on_moving_over_many_lines_is_told() -> None:
    watched = Scanned(center_moved_px=5.0)
    watched.look(started=watched.scan)
    watched.lines(0, 100, 0.1)
    told = []
    for step in range(10):  # 4 px/s
        told += watched.lines(100 + 2 * step, 102 + 2 * step, 0.1, jump=(0, 0.8 * step))
    assert told == ["center_moved"]


def test_another_acquisition_does_not_count_as_a_move() -> None:
    watched = Watched(center_moved_px=5.0)
    watched.see([(40, 40)] * 3, name="other")
    watched.see([(10, 10)] * 3)
    assert watched.look(0) == []


def test_ellipticity_that_takes_long_is_told_with_how_far_it_is() -> None:
    watched = Watched(ellipticity_s=10)
    assert watched.look(0, state="calibrating") == []
    assert watched.look(9, state="calibrating", patterns_averaged=80) == []
    assert watched.look(2, state="calibrating", patterns_averaged=83) == ["ellipticity_unstable"]
    assert watched.events[0].message == "Ellipticity not stable yet: 83 of 256 patterns."
    assert watched.look(state="locked") == ["ellipticity_unstable_cleared"]
    assert watched.look(100, state="frozen") == []
    assert watched.look(11, state="lost", patterns_averaged=300) == ["ellipticity_unstable"]
    assert "lost" in watched.events[-1].message
    assert watched.look(started=None, state="lost") == ["ellipticity_unstable_cleared"]


def test_a_detector_that_has_sent_everything_is_not_silent() -> None:
    watched = Watched(detector_silent_s=5)
    halfway, all_of_it = Counters(received=500), Counters(received=1000)
    assert watched.look(silent_s=60, acquisition=all_of_it) == []
    assert watched.look(silent_s=60, started=None) == []
    assert watched.look(silent_s=60, acquisition=halfway) == ["detector_silent"]
    assert "for 60 s in mid-acquisition, after 500 frames" in watched.events[0].message
    assert "The next one ends this one." in watched.events[0].message
    assert watched.look(silent_s=0.1, acquisition=halfway) == ["detector_silent_cleared"]


def test_shares_of_flagged_and_rejected_frames_are_of_the_last_ones() -> None:
    watched = Watched(flagged_share=0.5, rejected_share=0.1)
    watched.look(0)
    watched.see([(1, 1)] * 40, flags=3)
    assert watched.look(0) == []  # too few to judge by
    watched.see([(1, 1)] * 40)
    assert watched.look(0) == ["many_flagged"]
    assert watched.events[-1].message == (
        "50% of the last 80 frames are flagged: 40 blank, 40 saturated."
    )
    reasons = {"no_acquisition": 4, "duplicate_index": 8}
    some = Counters(received=100, rejected=12, shed=3, rejected_by_reason=reasons)
    assert watched.look(counters=some) == ["many_rejected"]
    assert watched.events[-1].message == (
        "15% of the last 100 frames were rejected or shed, most often: duplicate index."
    )
    told = [watched.look(6, counters=some) for _ in range(4)]
    assert told == [[], [], [], []]  # none came that would tell otherwise


@pytest.mark.parametrize("frames_per_second", [0.5, 2.0, 10.0])
def test_shares_are_told_truly_at_any_frame_rate(frames_per_second: float) -> None:
    watched = Watched(flagged_share=0.5, rejected_share=0.1)
    came = bad = 0

    def scan(frames: int, flags: int) -> list[str]:
        nonlocal came, bad
        told = []
        for number in range(came, came + frames):
            came, bad = number + 1, bad + (flags > 0)
            watched.see([(1, 1)], flags, first=number)
            counters = Counters(received=came, rejected=bad)
            told += watched.look(1 / frames_per_second, counters=counters)
        return told

    n = max(100, round(30 * frames_per_second))
    watched.look()
    assert scan(n, flags=0) == []
    assert sorted(scan(n, flags=3)) == ["many_flagged", "many_rejected"]
    assert watched.alarms.active[0].value > 0.9
    assert sorted(scan(n, flags=0)) == ["many_flagged_cleared", "many_rejected_cleared"]


def test_a_share_stands_while_too_few_frames_come_and_not_for_ever() -> None:
    watched = Watched(flagged_share=0.5, rejected_share=0.1)
    watched.look()
    watched.see([(1, 1)] * 100, flags=3)
    bad = Counters(received=100, rejected=100)
    assert watched.look(counters=bad) == ["many_flagged", "many_rejected"]
    few = Counters(received=110, rejected=100)
    watched.see([(1, 1)] * 10)
    told = [code for _ in range(280) for code in watched.look(1, counters=few)]
    assert (told, watched.standing) == ([], ["many_flagged", "many_rejected"])
    told = [code for _ in range(40) for code in watched.look(1, counters=few)]
    assert told == ["many_flagged_cleared", "many_rejected_cleared"]
    assert watched.events[-1].message == "Few frames are rejected or shed now, or none come."


def test_flagged_frames_are_of_no_concern_after_their_acquisition() -> None:
    watched = Watched(flagged_share=0.5)
    watched.look()
    watched.see([(1, 1)] * 100, flags=3)
    assert watched.look() == ["many_flagged"]
    assert watched.look(started=None) == ["many_flagged_cleared"]
    watched.see([(1, 1)] * 50, flags=3)
    assert watched.look() == []  # of another acquisition: too few to judge by
    watched.see([(1, 1)] * 50, flags=3)
    assert watched.look() == ["many_flagged"]


def test_flagged_frames_are_not_told_of_in_the_next_slow_acquisition() -> None:
    watched = Watched(flagged_share=0.5)
    watched.look()
    watched.see([(1, 1)] * 100, flags=16)
    assert watched.look() == ["many_flagged"]
    assert watched.events[-1].message.endswith(": 100 without a beam.")
    watched.see([(1, 1)], name="next")
    following = dataclasses.replace(STARTED, acquisition_id="next")
    assert watched.look(started=following) == ["many_flagged_cleared"]
    assert watched.standing == []


def test_a_share_of_rejected_frames_that_hovers_around_its_threshold_is_told_once() -> None:
    watched = Watched(rejected_share=0.02)
    came = bad = 0
    for second in range(120):  # 100 frames each; 3 % and 1 % of them are bad, in turn
        came, bad = came + 100, bad + (3 if second // 10 % 2 == 0 else 1)
        watched.look(1, counters=Counters(received=came, rejected=bad))
    assert [event.code for event in watched.events] == ["many_rejected"]
    for _ in range(30):
        came += 100
        watched.look(1, counters=Counters(received=came, rejected=bad))
    assert watched.events[-1].code == "many_rejected_cleared"
    assert len(watched.events) == 2


def test_each_receiver_has_its_own_alarm_and_one_that_leaves_clears_it() -> None:
    watched = Watched(receiver_behind_s=1.0)
    assert watched.look(behind_s={"recorder": 1.24, "page": 0.0}) == ["receiver_behind"]
    assert watched.events[0].message.startswith("Receiver 'recorder' is 1.2 s behind")
    assert watched.look(behind_s={"recorder": 2.0, "page": 3.0}) == ["receiver_behind"]
    assert [alarm.subject for alarm in watched.alarms.active] == ["recorder", "page"]
    assert watched.look(behind_s={"page": 3.0}) == ["receiver_behind_cleared"]
    assert "'recorder' is gone" in watched.events[-1].message
    assert watched.standing == ["receiver_behind"]


# --- of a running service -------------------------------------------------------------------------


def test_a_silent_detector_is_told_of_and_when_it_sends_again() -> None:
    with (
        Service(settings(alarms={"detector_silent_s": 1.5})) as service,
        listening(service) as listener,
        sender(service) as source,
    ):
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3))
        assert "in mid-acquisition, after" in listener.wait_for_event("detector_silent").message
        until(lambda: [one.code for one in service.status().alarms] == ["detector_silent"])
        asked = ["status", "--control", service.endpoints["control"], "--timeout", str(TIMEOUT_S)]
        shown = CliRunner().invoke(app, asked)
        assert "Detector silent for" in " ".join(shown.output.split())
        source.send(frames(2))
        listener.wait_for_event("detector_silent_cleared")
        until(lambda: "after 2 frames" in " ".join(event.message for event in listener.of("event")))
        source.send(frames(4), range(2, 6))
        source.end()
        assert not listener.wait_for("acquisition_end").aborted
        until(lambda: service.status().alarms == ())

        def told() -> list[str]:
            return [code for code in listener.codes() if code.startswith("detector_silent")]

        until(lambda: told()[-1] == "detector_silent_cleared")
        assert told() == ["detector_silent", "detector_silent_cleared"] * (len(told()) // 2)


def test_a_receiver_that_holds_the_service_back_is_told_of_while_it_does() -> None:
    alarms = {"receiver_behind_s": 0.2}
    n = 2000
    with (
        Service(settings(batch={"size": 8}, alarms=alarms)) as service,
        listening(service) as listener,
        LosslessReceiver(
            service.endpoints["lossless"], name="slow", topics="telemetry", credit=1,
            timeout=TIMEOUT_S,
        ) as receiver,
        sender(service) as source,
    ):  # fmt: skip
        source.start(frame_shape=(16, 24), dtype="uint16", expected_frames=n)
        sending = threading.Thread(
            target=lambda: [source.send(frames(20), range(i, i + 20)) for i in range(0, n, 20)]
        )
        sending.start()
        # Nothing else comes through now: the alarm does.
        event = listener.wait_for_event("receiver_behind")
        assert event.details["subject"] == "slow"
        assert service.status().receivers_behind_s["slow"] > 0.1
        seen = 0
        while seen < n:
            seen += len(receiver.receive().indices)
        sending.join()
        listener.wait_for_event("receiver_behind_cleared")
        source.end()
        listener.wait_for("acquisition_end")


@pytest.mark.parametrize("name", ["center_moved_px", "backlog_share"])
def test_thresholds_make_sense(name: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        AlarmSettings(**{name: -1.0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_service_whose_alarms_ended_by_a_fault_is_not_healthy() -> None:
    with Service(settings()) as service:
        assert service.status().healthy
        service._alarms.look = lambda facts, now: {}["broken"]  # type: ignore[method-assign]
        until(lambda: not service.status().healthy)
