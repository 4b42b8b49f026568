"""What the page says in words and figures: pure functions from what is known to HTML.

Everything that comes over the wire is escaped.
"""

from __future__ import annotations

import math
import re
import time
from html import escape

import numpy as np

from prenet4d_client.messages import Counters, Ellipticity
from prenet4d_client.wire import Message
from prenet4d_server.monitoring.status import Status
from prenet4d_server.page.feed import Feed
from prenet4d_server.wording import counted

_STATES = {
    "calibrating": ("Calibrating", "watch"),
    "locked": ("Locked", "good"),
    "frozen": ("Frozen", "held"),
    "lost": ("Lost", "bad"),
}
DASH = "–"
_TAG = re.compile("<[^>]*>")


def clock(seconds: float) -> str:
    """Local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """``1:23`` or ``2:05:00``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float, digits: int = 0) -> str:
    """With thousands apart; a dash for what is not known."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else DASH


def banner(feed: Feed) -> str:
    """What keeps the page from being live, if anything does."""
    since = feed.unanswered_since
    if since is not None:
        return _banner(
            "bad",
            f"{escape(feed.trouble)} since {clock(since)}; trying again. "
            f"What is shown is what it said last. ({escape(feed.service.control)})",
        )
    status = feed.status
    if status is None:
        so_far = f"{escape(feed.trouble)}. " if feed.trouble else ""
        where = escape(feed.service.control)
        return _banner("watch", f"{so_far}Connecting to the service at {where} …")
    if not status.healthy:
        return _banner("bad", "A part of the service has died: see its log, and start it again.")
    if not status.ready:
        return _banner("watch", "The detector's side is being started; frames have to wait.")
    if status.alarms:
        return "".join(_banner("watch", escape(alarm.message)) for alarm in status.alarms)
    if feed.telemetry is None:
        where, frames = escape(status.source.address), status.counters.received
        so_far = (
            f"The last scan has ended; {counted(frames, 'frame')} came since the service was "
            "started."
            if frames
            else "No acquisition yet."
        )
        if status.acquisition is None:
            return _banner("calm", f"{so_far} Waiting for the detector at {where}.")
    return ""


def _banner(kind: str, text: str) -> str:
    return f'<div class="banner {kind}" role="status">{text}</div>'


def title(feed: Feed) -> str:
    """Which acquisition this is."""
    scan = feed.scan
    if scan is None:
        status = feed.status
        if status is not None and status.acquisition is not None:
            return f"<b>{escape(status.acquisition.acquisition_id)}</b>"
        came = status is not None and status.counters.received
        said = "between two scans" if came else "no acquisition yet"
        return f"<span class=muted>{said}</span>"
    h, w = scan.frame_shape
    size = f"{scan.scan_shape[0]} × {scan.scan_shape[1]} positions, " if scan.scan_shape else ""
    over = "" if feed.running else ' <span class="chip">ended</span>'
    return (
        f"<b>{escape(scan.acquisition_id)}</b> <span class=muted>{escape(scan.detector)} · "
        f"{size}{h} × {w} pixels · began {clock(scan.began)}</span>{over}"
    )


def _figure(label: str, value: str, below: str, unit: str = "", kind: str = "") -> str:
    unit = f' <span class="unit">{unit}</span>' if unit else ""
    return (
        f'<div class="figure {kind}"><div class="label">{label}</div>'
        f'<div class="value">{value}{unit}</div><div class="below">{below}</div></div>'
    )


def state(feed: Feed) -> str:
    """The calibration's state, and how far it is."""
    telemetry, status = feed.telemetry, feed.status
    # A command takes effect at once, between scans too: the status knows, telemetry may not.
    now = (status.state if status else None) or (telemetry.state if telemetry else None)
    if now is None:
        return _figure("Calibration", "Waiting", "no frame yet", kind="calm")
    told = _told(feed)
    averaged = told.patterns_averaged if told is not None else 0
    name, kind = _STATES[now]
    needed = f" of {feed.patterns_to_lock:,}" if feed.patterns_to_lock else ""
    below = {
        "calibrating": f"ellipticity not stable yet: {averaged:,}{needed} patterns",
        "locked": f"from {averaged:,} patterns",
        "frozen": "held by the operator",
        "lost": "contradicted, or long without a beam",
    }[now]
    return _figure("Calibration", name, below, kind=kind)


def _told(feed: Feed) -> Message | Status | None:
    """The latest telemetry; for who comes after the scan, the status, which tells as much."""
    return feed.status if feed.telemetry is None else feed.telemetry


def center(feed: Feed) -> str:
    """Where the beam is, and how far it has moved."""
    telemetry = feed.telemetry
    if telemetry is None or not len(telemetry.tracked):
        return _figure("Beam center", DASH, "y, x in pixels")
    if math.isnan(telemetry.tracked[-1, 0]):
        return _figure("Beam center", DASH, "no beam yet", kind="calm")
    (y, x), sigma = telemetry.tracked[-1], telemetry.tracked_sigma[-1]
    one_sigma = float(np.sqrt(np.mean(np.square(sigma))))
    known = f"± {number(one_sigma, 2)} px" if math.isfinite(one_sigma) else "not measured"
    return _figure(
        "Beam center y, x",
        f"{number(float(y), 1)}, {number(float(x), 1)}",
        f"{known} · moved <b>{number(feed.moved, 1)} px</b> since the start",
        "px",
    )


def ellipticity(feed: Feed) -> str:
    """The distortion in use, with one sigma."""
    told = _told(feed)
    now: Ellipticity | None = told.ellipticity if told is not None else None
    if now is None:
        return _figure("Ellipticity", DASH, "ratio of the axes")
    if now.ratio_sigma is None and now.ratio == 1:
        return _figure("Ellipticity", f"{now.ratio:.4f}", "no reading yet", kind="muted")
    sigma = ""  # a calibration that was loaded may have none
    if now.ratio_sigma is not None:
        sigma = f' <span class="sigma">± {now.ratio_sigma:.4f}</span>'
    angle = f"{math.degrees(now.theta):.1f}°"
    if now.theta_sigma is not None and math.isfinite(now.theta_sigma):
        angle += f" ± {min(math.degrees(now.theta_sigma), 90.0):.1f}°"
    return _figure(
        "Ellipticity",
        f"{now.ratio:.4f}{sigma}",
        f"long axis at <b>{angle}</b>",
    )


def rate(feed: Feed) -> str:
    """Frames per second, latency and what waits."""
    telemetry, status = feed.telemetry, feed.status
    if telemetry is None:
        return _figure("Frames per second", DASH, "latency, backlog")
    now = status.frames_per_second if status else telemetry.frames_per_second
    latency = telemetry.latency.total
    backlog = status.backlog if status else telemetry.backlog
    return _figure(
        "Frames per second",
        number(now, 0 if now >= 100 else 1),
        f"{number(latency.p50)} / {number(latency.p99)} ms p50 / p99 · {backlog:,} waiting",
    )


def progress(feed: Feed) -> str:
    """How much of the scan is done, and how long the rest takes."""
    telemetry = feed.telemetry
    if telemetry is None:
        if feed.status is not None and (came := feed.status.counters.received):
            return _figure("Progress", number(came), "frames since the service was started")
        return _figure("Progress", DASH, "time left")
    done, expected = telemetry.counters.received - telemetry.counters.in_flight, None
    expected = telemetry.expected_frames
    if expected is None:
        began = feed.scan.began if feed.scan else telemetry.time
        return _figure("Progress", number(done), f"frames since {clock(began)}, until stopped")
    share = min(1.0, done / expected)
    bar = f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    counted = f"{done:,} of {expected:,}"
    now = feed.status.frames_per_second if feed.status else telemetry.frames_per_second
    if not feed.running:
        below = f"{counted} · scan ended"
    elif now > 0:
        below = f"<b>{duration((expected - done) / now)}</b> left · {counted}"
    else:
        below = f"{counted} · no frames are coming"
    # Rounded down: nothing is complete before it is.
    return _figure("Progress", f"{math.floor(100 * share)}", bar + below, "%")


def counters(feed: Feed) -> str:
    """What became of the frames, of this acquisition and in all."""
    columns: list[tuple[str, Counters]] = []
    if feed.telemetry is not None:
        running = feed.status.acquisition if feed.status else None
        columns.append(("this scan", running.counters if running else feed.telemetry.counters))
    if feed.status is not None:
        columns.append(("since the start", feed.status.counters))
    if not columns:
        return '<p class="muted">No frame has come yet.</p>'
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = "".join(
        f"<tr><th>{outcome}</th>{''.join(_cell(outcome, counted) for _, counted in columns)}</tr>"
        for outcome in _OUTCOMES
    )
    balance = "".join(_balance(counted) for _, counted in columns)
    return (
        f'<table class="counters"><tr><th></th>{head}</tr>{rows}'
        f"<tr><th>balance</th>{balance}</tr></table>{_reasons(feed)}"
    )


_OUTCOMES = ("received", "corrected", "rejected", "shed", "in flight")


def _count(outcome: str, counted: Counters) -> int:
    count: int = getattr(counted, outcome.replace(" ", "_"))
    return count


def _cell(outcome: str, counted: Counters) -> str:
    count = _count(outcome, counted)
    kind = "alert" if count and outcome in ("rejected", "shed") else ""
    return f'<td class="{kind}">{count:,}</td>'


def _balance(counted: Counters) -> str:
    received, *others = (_count(outcome, counted) for outcome in _OUTCOMES)
    if received == sum(others):
        return '<td class="good">✓</td>'
    return f'<td class="alert">{received - sum(others):+,}</td>'


def _reasons(feed: Feed) -> str:
    by_reason = feed.status.counters.rejected_by_reason if feed.status else {}
    if not by_reason:
        return ""
    said = ", ".join(
        f"{count:,} {escape(reason.replace('_', ' '))}" for reason, count in by_reason.items()
    )
    return f'<p class="muted">Rejected: {said}.</p>'


def calibration(feed: Feed) -> str:
    """What the corrector goes by."""
    status = feed.status
    if status is None:
        return '<p class="muted">Nothing is known yet.</p>'
    reference = status.reference_center
    rows = [
        ("Patterns averaged", f"{status.patterns_averaged:,}"),
        (
            "Reference center",
            f"{reference[0]:.2f}, {reference[1]:.2f} px" if reference else DASH,
        ),
        ("Receivers", ", ".join(escape(name) for name in status.receivers) or "none"),
        ("Source", f"{escape(status.source.kind)}, {escape(status.source.address)}"),
        ("Corrects with", escape(status.engine)),
    ]
    return _list(rows)


def _list(rows: list[tuple[str, str]]) -> str:
    said = (f'<dt>{name}</dt><dd title="{_TAG.sub("", what)}">{what}</dd>' for name, what in rows)
    return f"<dl>{''.join(said)}</dl>"


def descan(feed: Feed) -> str:
    """What the fit of the center's drift over the scan says, y and x in pixels."""
    fit = feed.maps.header.descan if feed.maps else None
    if fit is None:
        return (
            '<p class="muted">Not fitted yet: a quarter of the scan must have been seen, '
            "along its rows and its columns.</p>"
        )

    def pair(y: float, x: float, digits: int = 1, sign: str = "+") -> str:
        return f"<b>{y:{sign}.{digits}f}, {x:{sign}.{digits}f} px</b>"

    y, x = fit.coefficients_y, fit.coefficients_x
    rows = [
        ("First to last column, y, x", pair(2 * y[2], 2 * x[2])),
        ("First to last row, y, x", pair(2 * y[1], 2 * x[1])),
        ("Left over, y, x", pair(*fit.residual, digits=2, sign="")),
        ("Frames left out", f"{fit.outliers:.1%}"),
        ("Form", "second order" if len(y) == 6 else "a plane, until half of the scan was seen"),
    ]
    return _list(rows) + '<p class="muted">“Save calibration” keeps it in the file.</p>'


def alarms(feed: Feed) -> str:
    """The alarms that stand, and the last events, latest first."""
    standing = feed.status.alarms if feed.status else ()
    lines = [
        f'<li class="alarm"><time>{clock(alarm.since)}</time> {escape(alarm.message)}</li>'
        for alarm in standing
    ]
    lines += [
        f'<li class="{event.level}"><time>{clock(event.time)}</time> {escape(event.message)}</li>'
        for event in reversed(feed.events)
    ]
    told = {f"{clock(event.time)} {event.message}" for event in feed.events}
    for event in reversed(feed.earlier):
        if event not in told:
            at, _, message = event.partition(" ")
            lines.append(f'<li class="info"><time>{escape(at)}</time> {escape(message)}</li>')
    if not lines:
        return '<p class="muted">Nothing has happened yet.</p>'
    return f'<ul class="events">{"".join(lines[:60])}</ul>'


def telling(preview: Message | None) -> str:
    """Which frame is shown."""
    if preview is None:
        return '<span class="muted">no frame yet</span>'
    place = ""
    if preview.scan_shape is not None:
        y, x = divmod(preview.index, preview.scan_shape[1])
        place = f" at row {y:,}, column {x:,}"
    dose = f" · {number(preview.dose)} e⁻" if math.isfinite(preview.dose) else ""
    binned = f" · binned {preview.binning} ×" if preview.binning > 1 else ""
    return f"frame {preview.index:,}{place}{dose}{binned} · {clock(preview.time)}"
