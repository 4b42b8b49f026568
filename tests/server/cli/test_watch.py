"""The live view shows what the stream says, in every state it can be in."""

import io
import math
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from prenet4d_client import ControlClient, Message, Subscriber, messages
from prenet4d_client.errors import NoAnswer
from prenet4d_server.cli import app, watch
from prenet4d_server.cli.control import _table
from prenet4d_server.cli.watch import View, event_line, line, screen, sparkline
from prenet4d_server.processes import reserved_addresses
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, settings


def telemetry(n=3, state="locked", expected=100, **changed):
    latency = messages.Latency(p50=12.0, p99=34.0)
    header = messages.Telemetry(
        acquisition_id="20260101T000000-abcdef",
        batch=7,
        frame_shape=(32, 48),
        scan_shape=(10, 10) if expected else None,
        expected_frames=expected,
        reference_center=(15.5, 23.5),
        ellipticity=messages.Ellipticity(
            ratio=1.0312, theta=math.radians(25), ratio_sigma=0.0004, theta_sigma=0.01
        ),
        state=state,
        patterns_averaged=512,
        latency=messages.Latencies(queue=latency, compute=latency, total=latency),
        frames_per_second=312.0,
        backlog=4,
        counters=messages.Counters(
            received=60, corrected=50, rejected=6, shed=0, in_flight=4,
            rejected_by_reason={"corrupt": 6},
        ),
    ).model_copy(update=changed)  # fmt: skip
    pair = np.tile(np.float32([63.12, 64.9]), (n, 1))
    arrays = {"tracked": pair, "tracked_sigma": np.full((n, 2), 0.11, np.float32)}
    return Message(header, {**arrays, "dose": np.full(n, 1000, np.float32)})


def shown(view):
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    console.print(screen(view, "tcp://127.0.0.1:5561"))
    return console.file.getvalue()


def test_waits_for_a_scan():
    assert "Waiting for a scan" in shown(View())


@pytest.mark.parametrize("state", ["calibrating", "locked", "frozen", "lost"])
@pytest.mark.parametrize("expected", [100, None])
def test_screen_shows_the_figures(state, expected):
    view = View()
    for _ in range(5):
        view.take(telemetry(state=state, expected=expected))
    view.take(Message(messages.Event(level="warning", code="x", message="The beam is off."), {}))
    view.missed = 3
    text = shown(view)
    for figure in (
        *(state, "312 frames/s", "12 ms, p99 34 ms", "(63.12, 64.90) ± 0.11", "1.0312 ± 0.0004"),
        *("at 25.0°", "received 60 = corrected 50 + rejected 6 + shed 0 + in flight 4"),
        *("corrupt: 6", "missed 3 messages", "warning: The beam is off.", "1,000 electrons"),
    ):
        assert figure in text
    assert ("of 100 frames" in text) == (expected is not None)


def test_a_slow_scan_does_not_look_like_one_that_stands_still():
    slow = telemetry(frames_per_second=0.3)
    view = View()
    view.take(slow)
    assert "0.3 frames/s" in shown(view)
    assert "0.3 frames/s" in line(slow)


def test_figures_that_are_no_longer_live_say_so():
    view = View()
    view.take(telemetry())
    assert "Nothing has come" not in shown(view)
    view.heard -= 60
    assert "Nothing has come for 60 s: these are the last figures." in shown(view)


def test_the_status_for_people_has_units_and_times_of_day(tmp_path):
    with Service(settings(recording={"directory": tmp_path})) as service:
        control = service.endpoints["control"]
        with ControlClient(control, timeout=TIMEOUT_S) as client:
            started = client.start_recording("night")["started"]
        shown = CliRunner().invoke(app, ["status", "--control", control], env={"COLUMNS": "200"})
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    output = " ".join(shown.output.split())
    for figure in (f"started {began}", "reference center px", "detectors px"):
        assert figure in output


def test_what_looks_like_markup_is_shown_as_it_came():
    view = View()
    view.take(telemetry(acquisition_id="scan [/x] of [a3]"))
    assert "scan [/x] of [a3]" in shown(view)
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    told = {"address": "tcp://[fd00::5]:5561", "metadata": {"[b]comment": "see [/data/x]"}}
    console.print(_table(told))
    for part in ("tcp://[fd00::5]:5561", "[b]comment", "see [/data/x]"):
        assert part in console.file.getvalue()


def test_line_says_the_same():
    text = line(telemetry())
    assert "locked" in text
    assert "50/100 frames" in text
    assert "rejected 6  shed 0" in text
    assert "center –" in line(telemetry(n=0))
    unread = messages.Ellipticity()
    assert "not read yet" in line(telemetry(ellipticity=unread))


def test_what_is_not_known_is_not_shown():
    unsure = telemetry()
    unsure.arrays["tracked_sigma"][:] = np.inf
    unsure.arrays["dose"][:] = np.nan
    view = View()
    view.take(unsure)
    assert "(63.12, 64.90) px" in shown(view)
    assert "inf" not in line(unsure)
    assert "nan" not in shown(view)


def test_event_is_one_line():
    event = messages.Event(level="error", code="x", message="The disk is full.")
    assert event_line(event).endswith("error: The disk is full.")


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True)), st.integers(1, 60))
@example([4.3e293, -1.7976931348623115e308], 2)
def test_sparkline_takes_anything(values, width):
    text = sparkline(values, width)
    assert len(text) <= min(width, len(values))
    assert set(text) <= set("▁▂▃▄▅▆▇█")


def test_sparkline_rises():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5, 5]) == "▁▁▁"


def test_silence_is_said_once_where_lines_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(watch, "SILENT_S", 0.05)
    with (
        reserved_addresses(1) as (nobody,),
        Subscriber(nobody, topics=watch.TOPICS, timeout=0.02) as subscriber,
        pytest.raises(NoAnswer),
    ):
        watch._print_lines(subscriber, 1.0, timeout=0.5)
    said, complained = capsys.readouterr()
    assert said == ""
    assert complained == "Nothing has come for 0 s: no scan is running, or no service.\n"
