"""One browser's page: its panels, kept up to date while it is open."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from bokeh.document import Document
from bokeh.events import ConnectionLost, DocumentReady
from bokeh.models import CustomJS, Div
from jinja2 import Environment, FileSystemLoader

from prenet4d_server.page import words
from prenet4d_server.page.actions import Actions
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.maps import DESCAN, SCANNED, Maps
from prenet4d_server.page.patterns import Patterns
from prenet4d_server.page.theme import THEMES, look
from prenet4d_server.page.traces import CHARTS, Traces

FOLDER = Path(__file__).parent
_RATE_OVER_S = 5.0
_REMEMBER = """window.prenet4d.remember({
    scale: [scale, "active"], palette: [palette, "value"], contrast: [contrast, "value"],
})"""
TEXTS: dict[str, Callable[[Feed], str]] = {
    "banner": words.banner,
    "title": words.title,
    "state": words.state,
    "beam": words.center,
    "ellipticity": words.ellipticity,
    "rate": words.rate,
    "progress": words.progress,
    "counters": words.counters,
    "calibration": words.calibration,
    "descan": words.descan,
    "events": words.alarms,
}


class Session:
    """Puts the page into a Bokeh document and updates it so many times a second."""

    def __init__(
        self, doc: Document, feed: Feed, *, operator: bool, theme: str, updates_per_second: float
    ) -> None:
        colors = THEMES[theme]
        self._feed = feed
        self._texts = {
            name: Div(name=name, text=tell(feed), **look()) for name, tell in TEXTS.items()
        }
        self._actions = Actions(doc, feed, operator=operator)
        self._patterns = Patterns(colors, self._actions.set_radii if operator else None)
        self._maps = Maps(colors)
        self._traces = Traces(colors)
        self._pulse = Div(name="pulse", **look())
        self._pulse.js_on_change("text", CustomJS(code="window.prenet4d.beat()"))
        self._updates: deque[float] = deque()
        self._images: deque[float] = deque()
        self._preview: object = None
        patterns = self._patterns
        with doc.models.freeze():  # or each root would have the whole document counted again
            for root in (
                *self._texts.values(), *self._actions.roots, *self._maps.figures.values(),
                *self._maps.captions.values(), *self._traces.figures.values(), patterns.raw,
                patterns.corrected, patterns.scale, patterns.palette, patterns.contrast,
                patterns.told, self._pulse,
            ):  # fmt: skip
                doc.add_root(root)
        doc.title = "prenet4d"
        doc.template = _TEMPLATE
        doc.template_variables.update(
            theme=theme, other="light" if theme == "dark" else "dark", operator=operator,
            version=version("prenet4d"), scanned=SCANNED, fitted=DESCAN, charts=CHARTS,
        )  # fmt: skip
        doc.config.update(reconnect_session=False, notify_connection_status=False)
        doc.js_on_event(ConnectionLost, CustomJS(code="window.prenet4d.lose()"))
        kept = {
            "scale": patterns.scale, "palette": patterns.palette, "contrast": patterns.contrast
        }  # fmt: skip
        doc.js_on_event(DocumentReady, CustomJS(args=kept, code=_REMEMBER))
        self._present = True
        feed.arrive()
        doc.on_session_destroyed(lambda _context: self._leave())
        self.update()
        ticking = doc.add_periodic_callback(self.update, round(1000 / updates_per_second))

        def rest(_event: ConnectionLost) -> None:
            doc.remove_periodic_callback(ticking)  # the browser is gone; it will open another page
            self._leave()

        doc.on_event(ConnectionLost, rest)

    def _leave(self) -> None:
        """The browser is gone: its connection is lost, or Bokeh forgets a page that had none."""
        if self._present:
            self._present = False
            self._feed.leave()

    def update(self) -> None:
        """Show what the feed knows now; only what differs goes to the browser."""
        feed = self._feed
        for name, tell in TEXTS.items():
            self._texts[name].text = tell(feed)
        self._patterns.update(feed)
        self._maps.update(feed)
        self._traces.update(feed)
        self._actions.update(feed)
        self._pulse.text = self._tell_rate()

    def _tell_rate(self) -> str:
        now, preview = time.monotonic(), self._feed.preview
        self._updates.append(now)
        if preview is not self._preview:
            self._preview = preview
            self._images.append(now)
        for times in (self._updates, self._images):
            while times and times[0] < now - _RATE_OVER_S:
                times.popleft()
        size = ""
        if preview is not None:
            h, w = preview.raw.shape
            size = f" of {h} × {w} pixels" + (
                f", binned {preview.binning} ×" if preview.binning > 1 else ""
            )
        missed = self._feed.missed
        return (
            f'<span class="muted">{words.clock(time.time())} · this page takes '
            f"{len(self._updates) / _RATE_OVER_S:.1f} updates/s with "
            f"{len(self._images) / _RATE_OVER_S:.1f} frames/s{size}, compressed"
            + (f" · {missed:,} messages came too fast" if missed else "")
            + "</span>"
        )


_TEMPLATE = Environment(
    loader=FileSystemLoader([FOLDER]),
).get_template("page.html")
