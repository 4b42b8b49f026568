"""The web server: the page at ``/``, metrics and health beside it, and who may do what."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from bokeh.application import Application
from bokeh.application.handlers.handler import Handler
from bokeh.document import Document
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from bokeh.server.views.doc_handler import DocHandler
from bokeh.server.views.ws import WSHandler
from prometheus_client import CONTENT_TYPE_LATEST
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.web import ErrorHandler, RequestHandler, StaticFileHandler
from tornado.websocket import WebSocketHandler

from prenet4d_client.errors import CommandRefused, Prenet4dError
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.calibration_file import to_toml
from prenet4d_server.monitoring.metrics import exposition
from prenet4d_server.monitoring.status import Status
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.session import FOLDER, Session
from prenet4d_server.page.settings import PageSettings
from prenet4d_server.page.theme import THEMES

COMPRESSION_LEVEL = 1
COOKIE_DAYS = 30


class Access:
    """Who may command: who has once opened the page with the token, and has the cookie for it."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    @staticmethod
    def cookie(request: HTTPServerRequest) -> str:
        """The cookie's name: ports share cookies, services must not."""
        return f"prenet4d-operator-{request.host.rpartition(':')[2] or 'http'}"

    def is_token(self, text: str) -> bool:
        """Whether this is the operator's token."""
        return self._token is not None and secrets.compare_digest(
            text.encode(), self._token.encode()
        )

    def is_operator(self, request: HTTPServerRequest) -> bool:
        """Whether the request comes from a browser that has shown the token."""
        cookie = request.cookies.get(self.cookie(request))
        return cookie is not None and self.is_token(cookie.value)


class PageMaker(Handler):  # type: ignore[misc]
    """Makes each browser's document. Its rights travel in the session's signed token."""

    def __init__(self, feed: Feed, access: Access, updates_per_second: float) -> None:
        super().__init__()
        self._feed = feed
        self._access = access
        self._updates_per_second = updates_per_second

    def process_request(self, request: HTTPServerRequest) -> dict[str, Any]:
        """What the session is to know of the request that opens it."""
        theme = request.cookies.get("prenet4d-theme")
        return {
            "operator": self._access.is_operator(request),
            "theme": theme.value if theme and theme.value in THEMES else "dark",
        }

    def modify_document(self, doc: Document) -> None:
        """Fill a new browser's document."""
        said = doc.session_context.token_payload
        Session(
            doc,
            self._feed,
            operator=said["operator"],
            theme=said["theme"],
            updates_per_second=self._updates_per_second,
        )


class PageHandler(DocHandler):  # type: ignore[misc]
    """``/``; ``/?token=…`` makes an operator, ``/?theme=…`` changes the look."""

    def initialize(self, access: Access, **_others: Any) -> None:
        """Tornado's constructor."""
        self._access = access

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Answer with the page, or take what the address says and drop it from there."""
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Cache-Control", "no-store")
        token, theme = self.get_argument("token", None), self.get_argument("theme", None)
        if token is not None:
            if not self._access.is_token(token):
                self.set_status(HTTPStatus.FORBIDDEN)
                self.set_header("Content-Type", "text/html; charset=utf-8")
                self.finish((FOLDER / "wrong_token.html").read_bytes())
                return
            self._remember(Access.cookie(self.request), token, httponly=True)
        if theme in THEMES:
            self._remember("prenet4d-theme", theme)
        if token is not None or theme is not None:
            self.redirect("/")
            return
        await super().get(*args, **kwargs)

    def _request_summary(self) -> str:
        """What the log has of a request: no query, which may hold a token but for a letter."""
        return f"{self.request.method} {self.request.path} ({self.request.remote_ip})"

    def _remember(self, name: str, value: str, **options: Any) -> None:
        self.set_cookie(name, value, expires_days=COOKIE_DAYS, samesite="Strict", **options)


class OwnSocket(WSHandler):  # type: ignore[misc]
    """The page's websocket, for pages that came from this very host."""

    def check_origin(self, origin: str) -> bool:
        """Whether a page from ``origin`` may connect."""
        return WebSocketHandler.check_origin(self, origin)

    def on_close(self) -> None:
        """Part from a browser."""
        with suppress(AssertionError):  # Bokeh's, where it left before its session was there
            super().on_close()


class Asking(RequestHandler):
    """Answers with what the service says just now, or that it does not."""

    def initialize(self, feed: Feed, answer: Callable[[Feed], tuple[int, str, bytes]]) -> None:
        """Tornado's constructor."""
        self._feed = feed
        self._answer = answer

    async def get(self) -> None:
        """Ask, without holding up the page."""
        self.set_header("Cache-Control", "no-store")
        try:
            code, kind, body = await asyncio.to_thread(self._answer, self._feed)
        except Prenet4dError as error:
            refused = isinstance(error, CommandRefused)  # such as a calibration before a scan
            code = HTTPStatus.CONFLICT if refused else HTTPStatus.SERVICE_UNAVAILABLE
            kind = "text/plain; charset=utf-8"
            body = f"{error}\n".encode()
        self.set_status(code)
        self.set_header("Content-Type", kind)
        if not kind.startswith("text/"):
            name = self.request.path.rpartition("/")[2]
            self.set_header("Content-Disposition", f'attachment; filename="{name}"')
        self.finish(body)


def _verdict(good: Callable[[Status], bool]) -> Callable[[Feed], tuple[int, str, bytes]]:
    def answer(feed: Feed) -> tuple[int, str, bytes]:
        if good(feed.ask_status()):
            return HTTPStatus.OK, "text/plain", b"yes\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"no\n"

    return answer


def _metrics(feed: Feed) -> tuple[int, str, bytes]:
    return HTTPStatus.OK, CONTENT_TYPE_LATEST, exposition(feed.ask_status())


def _calibration(feed: Feed) -> tuple[int, str, bytes]:
    with feed.client() as service:
        try:
            document = service.save_calibration(descan=True)
        except CommandRefused:  # too little of a scan was seen for a fit
            document = service.save_calibration()
    return HTTPStatus.OK, "application/toml", to_toml(Calibration.from_document(document)).encode()


def _snapshot(feed: Feed) -> tuple[int, str, bytes]:
    from prenet4d_server.page.snapshot import snapshot  # matplotlib, for those who want one

    with feed.looking():
        return HTTPStatus.OK, "image/png", snapshot(feed)


ANSWERS: dict[str, Callable[[Feed], tuple[int, str, bytes]]] = {
    "/metrics": _metrics,
    "/healthz": _verdict(lambda status: status.healthy),
    "/readyz": _verdict(lambda status: status.ready),
    "/calibration.toml": _calibration,
    "/snapshot.png": _snapshot,
}


def server(settings: PageSettings, feed: Feed, listening: socket.socket) -> BaseServer:
    """The web server on a socket that listens already; to be started on this thread's loop."""
    access = Access(settings.operator_token)
    application = Application(PageMaker(feed, access, settings.updates_per_second))
    tornado = BokehTornado(
        {"/": application},
        extra_patterns=[
            (r"/assets/(.*)", StaticFileHandler, {"path": str(FOLDER / "assets")}),
            *((path, Asking, {"feed": feed, "answer": to}) for path, to in ANSWERS.items()),
        ],
        # Sessions are made here and nowhere else, and say nothing of the browser's cookies.
        secret_key=secrets.token_bytes(32),
        sign_sessions=True,
        include_headers=[],
        include_cookies=[],
        use_index=False,
    )
    context = {"application_context": tornado.applications["/"], "bokeh_websocket_path": "/ws"}
    tornado.add_handlers(
        r".*",
        [
            (r"/?", PageHandler, {**context, "access": access}),
            (r"/ws", OwnSocket, {**context, "compression_level": COMPRESSION_LEVEL}),
            # Bokeh's ways to embed the page elsewhere, which nobody needs; its own patterns, in
            # which the dot stands for any character.
            (r"/autoload.js", ErrorHandler, {"status_code": 404}),
            (r"/metadata", ErrorHandler, {"status_code": 404}),
        ],
    )
    http = HTTPServer(tornado)
    http.add_sockets([listening])
    return BaseServer(IOLoop.current(), tornado, http)
