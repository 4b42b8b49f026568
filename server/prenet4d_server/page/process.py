"""The page's process: told on standard input what to show, and where it listens already.

It ends with its standard input, that is, with whoever started it, however suddenly.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading

from tornado.ioloop import IOLoop

from prenet4d_server import logs
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.settings import PageSettings
from prenet4d_server.page.web import server
from prenet4d_server.priority import run_when_idle


def serve_page(settings: PageSettings, listening: socket.socket, stop: threading.Event) -> None:
    """Serve the page until ``stop`` is set; to be called in the main thread."""

    async def serve() -> None:
        loop = IOLoop.current()
        page = server(settings, feed, listening)
        page.start()
        ended = asyncio.Event()

        def pass_on() -> None:
            stop.wait()
            loop.add_callback(ended.set)

        threading.Thread(target=pass_on, daemon=True).start()
        await ended.wait()
        # Browsers that are cut off in the middle of an update are no news.
        logging.getLogger("bokeh").setLevel(logging.CRITICAL)
        page.stop(wait=False)

    tame_bokehs_log()
    listening.setblocking(False)
    with Feed(settings.service) as feed:
        asyncio.run(serve())


def tame_bokehs_log() -> None:
    """Have Bokeh's log written as ours is, and browsers that went away left out of it."""
    bokeh = logging.getLogger("bokeh")
    bokeh.handlers.clear()  # it brings one of its own, with a form of its own
    bokeh.propagate = True
    logging.getLogger("bokeh.server.views.ws").setLevel(logging.ERROR)
    logging.getLogger("bokeh.server.protocol_handler").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Bokeh asserts that a browser whose message it takes up is still there."""
    return record.exc_info is None or not isinstance(record.exc_info[1], AssertionError)


def main() -> None:
    """Read the settings from standard input, and serve on the socket that was handed over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    settings = PageSettings.model_validate_json(told.readline())
    if settings.gives_way:
        run_when_idle()
    logs.configure(settings.log, "page")
    stop = threading.Event()

    def outlive_nobody() -> None:
        told.read()
        stop.set()

    threading.Thread(target=outlive_nobody, daemon=True).start()
    serve_page(settings, socket.socket(fileno=int(sys.argv[1])), stop)


if __name__ == "__main__":
    main()
