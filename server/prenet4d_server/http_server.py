"""The HTTP side: a status page, metrics for Prometheus, health checks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST

from prenet4d_server.errors import BindError
from prenet4d_server.metrics import Status, exposition

REQUEST_TIMEOUT_S = 10.0
log = logging.getLogger(__name__)


class HttpServer:
    """Answers on its own threads, from the status as it stands when asked."""

    def __init__(self, address: str, status: Callable[[], Status]) -> None:
        """Listen.

        Args:
            address: ``tcp://host:port``; port ``*`` takes any free one.
            status: tells how the service is doing.

        Raises:
            BindError: the address cannot be bound.
        """
        metrics = exposition(status)

        class Handler(_Handler):
            pages = {  # noqa: RUF012 - one class for each server, never changed
                "/": lambda: _status_page(status()),
                "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, metrics()),
                "/healthz": lambda: _verdict(status().healthy),
                "/readyz": lambda: _verdict(status().ready),
            }

        host, _, port = urlsplit(address).netloc.rpartition(":")
        try:
            self._server = _Server(
                (host.strip("[]").replace("*", ""), 0 if port == "*" else int(port)), Handler
            )
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BindError(
                f"Cannot listen on {address} (http.address): {reason}. "
                "Stop the program that uses the port, or choose another."
            ) from None
        self.address = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]]
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        page = self.pages.get(urlsplit(self.path).path)
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND, f"There are: {', '.join(self.pages)}")
            return
        code, kind, body = page()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug(format, *args)


def _verdict(good: bool) -> tuple[HTTPStatus, str, bytes]:
    if good:
        return HTTPStatus.OK, "text/plain", b"yes\n"
    return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"no\n"


def _status_page(now: Status) -> tuple[HTTPStatus, str, bytes]:
    counted, acquisition = now.counters, now.acquisition
    lines = [
        f"prenet4d {now.version}, up {now.uptime_s:.0f} s, {'ready' if now.ready else 'not ready'}",
        f"corrects with   {now.engine}",
        f"source          {now.source.kind} at {now.source.address}",
        f"acquisition     {acquisition.acquisition_id if acquisition else 'none'}",
        f"state           {now.state or 'no frame yet'}",
        f"ellipticity     {now.ellipticity.ratio:.5f} at {now.ellipticity.theta:.4f} rad"
        if now.ellipticity
        else "ellipticity     none yet",
        f"frames          {counted.received} received = {counted.corrected} corrected"
        f" + {counted.rejected} rejected + {counted.shed} shed + {counted.in_flight} in flight",
        f"rate            {now.frames_per_second:.1f} frames/s, {now.backlog} waiting",
        f"latency         {now.latency.total.p50:.1f} ms (p99 {now.latency.total.p99:.1f} ms)",
        f"receivers       {', '.join(now.receivers) or 'none'}",
        "",
        *now.recent_events,
    ]
    return HTTPStatus.OK, "text/plain; charset=utf-8", ("\n".join(lines) + "\n").encode()
