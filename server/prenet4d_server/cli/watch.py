"""``prenet4d watch``: what the service finds and how it is doing, live in the terminal."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prenet4d_server.cli.arguments import ServerKeyOption, StreamOption
from prenet4d_server.wording import counted, frame_rate

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

HISTORY = 48
SILENT_S = 5.0
"""After so long it is told: a scan may be over, or the service gone."""
_BARS = "▁▂▃▄▅▆▇█"
_STATE_COLORS = {"calibrating": "yellow", "locked": "green", "frozen": "cyan", "lost": "bold red"}
_LEVEL_COLORS = {"info": "dim", "warning": "yellow", "error": "bold red"}
TOPICS = ("telemetry", "event", "acquisition_start", "acquisition_end")


def _history() -> deque[float]:
    return deque(maxlen=HISTORY)


@dataclass(slots=True)
class View:
    """The last of everything that the stream told, and the recent past of what has a trend."""

    telemetry: Any = None
    heard: float = 0.0
    missed: int = 0
    rate: deque[float] = field(default_factory=_history)
    latency: deque[float] = field(default_factory=_history)
    backlog: deque[float] = field(default_factory=_history)
    center_y: deque[float] = field(default_factory=_history)
    center_x: deque[float] = field(default_factory=_history)
    ratio: deque[float] = field(default_factory=_history)
    events: deque[Any] = field(default_factory=lambda: deque(maxlen=6))

    def take(self, message: Any) -> None:
        """Take in one message of the stream."""
        self.heard = time.monotonic()
        if message.type == "event":
            self.events.append(message)
        elif message.type == "telemetry":
            self.telemetry = message
            self.rate.append(message.frames_per_second)
            self.latency.append(message.latency.total.p50)
            self.backlog.append(message.backlog)
            self.ratio.append(message.ellipticity.ratio)
            if len(message.tracked):
                self.center_y.append(float(message.tracked[-1, 0]))
                self.center_x.append(float(message.tracked[-1, 1]))


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last ``width`` values as bars, scaled from their least to their greatest."""
    shown = [value for value in list(values)[-width:] if math.isfinite(value)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high / 2 - low / 2) or 1.0  # halves: the difference itself may overflow
    top = len(_BARS) - 1
    return "".join(_BARS[round((value / 2 - low / 2) / span * top)] for value in shown)


def line(telemetry: Any) -> str:
    """One telemetry message as one line of plain text."""
    counters = telemetry.counters
    of = f"/{telemetry.expected_frames:,}" if telemetry.expected_frames else ""
    return (
        f"{time.strftime('%H:%M:%S', time.localtime(telemetry.time))}  {telemetry.state:<11}  "
        f"{counters.corrected:,}{of} frames  {frame_rate(telemetry.frames_per_second)}  "
        f"latency {telemetry.latency.total.p50:.0f}/{telemetry.latency.total.p99:.0f} ms  "
        f"backlog {telemetry.backlog}  center {_center(telemetry)}  "
        f"ellipse {_ellipse(telemetry)}  rejected {counters.rejected}  shed {counters.shed}"
    )


def event_line(event: Any) -> str:
    """One event as one line of plain text."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock}  {event.level}: {event.message}"


def screen(view: View, address: str) -> RenderableType:
    """The whole view as it stands in the terminal."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    telemetry = view.telemetry
    if telemetry is None:
        body: RenderableType = Text("Waiting for a scan …", style="dim")
        title = f"prenet4d · {address}"
    else:
        ny_nx = telemetry.scan_shape
        scan = f"scan {ny_nx[0]}×{ny_nx[1]} · " if ny_nx else ""
        h, w = telemetry.frame_shape
        title = f"prenet4d · {address} · {scan}frames {h}×{w} · {telemetry.acquisition_id}"
        silent = time.monotonic() - view.heard
        stale = f"Nothing has come for {silent:.0f} s: these are the last figures."
        body = Group(
            Text(stale if silent >= SILENT_S else "", style="yellow"),
            *(_progress(telemetry), Text(), _figures(view), Text(), _counters(view)),
        )
    events = [
        Text(event_line(event), style=_LEVEL_COLORS.get(event.level, "")) for event in view.events
    ]
    return Panel(
        Group(body, Text(), *events), title=Text(title), title_align="left", padding=(1, 2)
    )


def _progress(telemetry: Any) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    counters, expected = telemetry.counters, telemetry.expected_frames
    row = Table.grid(padding=(0, 2))
    state = Text(f" {telemetry.state} ", style=f"reverse {_STATE_COLORS[telemetry.state]}")
    if expected:
        bar = ProgressBar(total=expected, completed=min(counters.corrected, expected), width=40)
        row.add_row(state, bar, f"{counters.corrected:,} of {counted(expected, 'frame')}")
    else:
        row.add_row(state, counted(counters.corrected, "frame"))
    return row


def _figures(view: View) -> Table:
    from rich.table import Table

    telemetry = view.telemetry
    latency = telemetry.latency
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column(min_width=34)
    table.add_column(style="cyan")
    table.add_row("rate", frame_rate(telemetry.frames_per_second), sparkline(view.rate))
    table.add_row(
        "latency",
        f"{latency.total.p50:.0f} ms, p99 {latency.total.p99:.0f} ms  "
        f"(queue {latency.queue.p50:.0f}, compute {latency.compute.p50:.0f})",
        sparkline(view.latency),
    )
    table.add_row("backlog", f"{telemetry.backlog} frames", sparkline(view.backlog))
    table.add_row("center", f"{_center(telemetry)} px", sparkline(view.center_y) + " y")
    table.add_row("", "", sparkline(view.center_x) + " x")
    table.add_row("ellipticity", _ellipse(telemetry), sparkline(view.ratio))
    table.add_row("", f"from {counted(telemetry.patterns_averaged, 'pattern')}", "")
    dose = float(telemetry.dose.mean()) if len(telemetry.dose) else math.nan
    if math.isfinite(dose):
        table.add_row("dose", f"{dose:,.0f} electrons a pattern", "")
    return table


def _counters(view: View) -> RenderableType:
    from rich.text import Text

    counters = view.telemetry.counters
    text = Text(f"received {counters.received:,} = corrected {counters.corrected:,}")
    for name, count in (("rejected", counters.rejected), ("shed", counters.shed)):
        text.append(" + ")
        text.append(f"{name} {count:,}", style="bold red" if count else "")
    text.append(f" + in flight {counters.in_flight:,}")
    if view.missed:
        text.append(f"   (this view missed {counted(view.missed, 'message')})", style="yellow")
    for reason, count in counters.rejected_by_reason.items():
        text.append(f"\n  {reason}: {count:,}", style="red")
    return text


def _center(telemetry: Any) -> str:
    if not len(telemetry.tracked) or not math.isfinite(telemetry.tracked[-1, 0]):
        return "–"
    (cy, cx), (sy, sx) = telemetry.tracked[-1], telemetry.tracked_sigma[-1]
    sigma = max(float(sy), float(sx))
    return f"({cy:.2f}, {cx:.2f})" + (f" ± {sigma:.2f}" if math.isfinite(sigma) else "")


def _ellipse(telemetry: Any) -> str:
    ellipse = telemetry.ellipticity
    if ellipse.ratio_sigma is None:
        return "not read yet" if ellipse.ratio == 1 else f"{ellipse.ratio:.4f}"
    text = f"{ellipse.ratio:.4f} ± {ellipse.ratio_sigma:.4f}"
    if ellipse.ratio > 1.001:
        text += f" at {math.degrees(ellipse.theta):.1f}°"
    return text


def watch(
    stream: StreamOption = "tcp://127.0.0.1:5561",
    once: Annotated[bool, typer.Option("--once", help="Print one line and leave.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of a screen (so too in a pipe).")
    ] = False,
    every: Annotated[float, typer.Option(min=0.05, help="Seconds between plain lines.")] = 1.0,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Give up after so many seconds of silence.")
    ] = None,
    server_key: ServerKeyOption = None,
) -> None:
    """Watch the service: rates, latency, backlog, center, ellipticity, states and events."""
    from prenet4d_client import Subscriber

    if once and timeout is None:
        timeout = 10.0
    with Subscriber(stream, topics=TOPICS, timeout=0.25, server_key=server_key) as subscriber:
        if once:
            for message in _until_silent(subscriber, timeout):
                if message is not None and message.type == "telemetry":
                    print(line(message))
                    return
        elif plain or not sys.stdout.isatty():
            _print_lines(subscriber, every, timeout)
        else:
            _show(subscriber, stream, timeout)


def _until_silent(subscriber: Any, timeout: float | None) -> Iterator[Any]:
    """Messages as they come, ``None`` in every pause; raises when the pause is too long."""
    from prenet4d_client.errors import NoAnswer

    last = time.monotonic()
    while True:
        try:
            message = next(subscriber)
        except NoAnswer:
            if timeout is not None and time.monotonic() - last > timeout:
                raise NoAnswer(
                    f"Nothing came from {subscriber.address} within {timeout:g} s: "
                    "is the service running, and a scan with it, is this its stream address, and "
                    "does it ask for another key?"
                ) from None
            yield None
        else:
            last = time.monotonic()
            yield message


def _print_lines(subscriber: Any, every: float, timeout: float | None) -> None:
    latest, due = None, 0.0
    heard, told = time.monotonic(), False
    for message in _until_silent(subscriber, timeout):
        if message is not None:
            heard, told = time.monotonic(), False
            if message.type == "event":
                print(event_line(message), flush=True)
            elif message.type == "telemetry":
                latest = message
        elif not told and time.monotonic() - heard >= SILENT_S:
            told = True
            print(
                f"Nothing has come for {SILENT_S:.0f} s: no scan is running, or no service.",
                file=sys.stderr,
                flush=True,
            )
        if latest is not None and time.monotonic() >= due:
            print(line(latest), flush=True)
            latest, due = None, time.monotonic() + every


def _show(subscriber: Any, address: str, timeout: float | None) -> None:
    from rich.live import Live

    view = View()
    with Live(get_renderable=lambda: screen(view, address), refresh_per_second=8, screen=True):
        for message in _until_silent(subscriber, timeout):
            if message is not None:
                view.take(message)
                view.missed = subscriber.missed


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(epilog="Example:  [bold]prenet4d watch --stream tcp://127.0.0.1:5561[/bold]")(watch)
