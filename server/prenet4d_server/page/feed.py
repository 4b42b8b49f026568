"""What the service says, received once for all who look at the page."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from prenet4d_client import ControlClient, Subscriber
from prenet4d_client.errors import NoAnswer, Prenet4dError, ProtocolError
from prenet4d_client.maps import ScanMaps
from prenet4d_client.messages import Event, Maps
from prenet4d_client.wire import Message
from prenet4d_engines.descan import Descan
from prenet4d_server.monitoring.status import Status
from prenet4d_server.page.history import History
from prenet4d_server.page.settings import ServiceAddress
from prenet4d_server.sockets import unknown_host

log = logging.getLogger(__name__)

TOPICS = ("telemetry", "event", "acquisition_start", "acquisition_end")
EVENTS = 100
MAP_SIDE = 384
"""Larger scan maps are thinned out to at most so many probe positions a side."""
STATUS_EVERY_S = 1.0
STATUS_TIMEOUT_S = 5.0
"""The page runs only while nobody else wants the processor, so that an answer may be read late."""
MAPS_TIMEOUT_S = 1.0
COMMAND_TIMEOUT_S = 6.0
LOOK_S = 2.0
"""The longest that a single look waits for a pattern and the maps."""
_LOOK_AGAIN_S = 0.05
_WAKE_S = 0.5

Image: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MapsView:
    """The scan maps at one moment."""

    header: Maps
    step: int
    """Every so-many-th probe position is shown."""
    images: dict[str, Image]
    """Name → (ny, nx) values; NaN where no frame came yet. Where the descan was fitted, ``fit_y``
    and ``fit_x`` are the fitted centers."""

    @classmethod
    def of(cls, header: Maps, maps: Mapping[str, Image]) -> Self:
        """The maps by name, thinned out, and the descan where it was fitted."""
        step = -(-max(header.scan_shape) // MAP_SIDE)
        images = {name: values[::step, ::step].copy() for name, values in maps.items()}
        if header.descan is not None:
            fit = Descan.model_validate(header.descan.model_dump())
            images["fit_y"], images["fit_x"] = fit.centers(header.scan_shape, step).astype("f4")
        return cls(header, step, images)


@dataclass(frozen=True, slots=True)
class Scan:
    """The acquisition that is running, or the last one."""

    acquisition_id: str
    detector: str
    frame_shape: tuple[int, int]
    scan_shape: tuple[int, int] | None
    expected_frames: int | None
    began: float
    """Seconds since the epoch."""


class Feed:
    """Keeps up with the service on four threads; what they find is replaced, never changed.

    What costs the service something, the maps and the preview, is asked for only while somebody
    looks: between :meth:`arrive` and :meth:`leave`.

    Attributes that are read by the page's sessions: ``telemetry`` (the last batch's), ``preview``
    (the last frame and what became of it), ``maps``, ``status``, ``scan``, ``running``, ``events``,
    ``history``; ``None`` stands for not yet. ``unanswered_since`` tells when the service last
    answered, as long as it does not.
    """

    def __init__(self, service: ServiceAddress) -> None:
        self.service = service
        self.telemetry: Message | None = None
        self.preview: Message | None = None
        self.maps: MapsView | None = None
        self.status: Status | None = None
        self.patterns_to_lock: int | None = None
        """How many the calibration needs."""
        self.scan: Scan | None = None
        self.running = False
        self.moved = math.nan
        """How far the center is from where it was in the first line, at the same column, in pixels:
        the descan along a line is no move. NaN where that is not known."""
        self._first_line: npt.NDArray[np.float64] = np.empty((0, 2))
        self.history = History()
        self.missed = 0
        """Messages that came too fast for the page."""
        self.unanswered_since: float | None = None
        self.trouble = ""
        """Why the service gives no good answer, in a sentence without its full stop."""
        self.earlier: tuple[str, ...] = ()
        """Events from before the page's time, each with its time of day, oldest first."""
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._viewers = 0
        self._counting = threading.Lock()
        self._watched = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"page-{name}", daemon=True)
            for name, work in (
                ("stream", self._listen), ("preview", self._follow_preview),
                ("maps", self._follow_maps), ("status", self._watch),
            )
        ]  # fmt: skip

    @property
    def events(self) -> tuple[Event, ...]:
        """The last events, oldest first."""
        return tuple(self._events)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def arrive(self) -> None:
        """Somebody opened the page."""
        with self._counting:
            self._viewers += 1
            self._watched.set()

    def leave(self) -> None:
        """Somebody closed it."""
        with self._counting:
            self._viewers -= 1
            if self._viewers == 0:
                self._watched.clear()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Somebody takes one look: wait for what is asked for only then, if nobody else does."""
        before, watched = (self.preview, self.maps), self._watched.is_set()
        self.arrive()
        try:
            deadline = time.monotonic() + LOOK_S
            while not watched and time.monotonic() < deadline and not self._renewed(*before):
                time.sleep(_LOOK_AGAIN_S)
            yield
        finally:
            self.leave()

    def _renewed(self, preview: Message | None, maps: MapsView | None) -> bool:
        settled = not self.running and preview is not None
        return self.maps is not maps and (settled or self.preview is not preview)

    def client(self, timeout: float = COMMAND_TIMEOUT_S) -> ControlClient:
        """A connection to the service's control socket, with the page's own rights."""
        return ControlClient(
            self.service.control,
            timeout=timeout,
            server_key=self.service.server_key,
            keys=self.service.client_keys,
        )

    def ask_status(self) -> Status:
        """What the service says about itself now.

        Raises:
            NoAnswer, ProtocolError: it does not answer, or not so that it can be read.
        """
        with self.client(STATUS_TIMEOUT_S) as client:
            try:
                return Status.model_validate(client.status())
            except ValidationError as error:
                raise ProtocolError(f"{self._why(error)}.") from None

    def take(self, message: Message) -> None:
        """Take in one message of the stream."""
        self.missed += message.gap if message.header.type != "preview" else 0
        match message.header.type:
            case "telemetry":
                self._take_telemetry(message)
            case "preview":
                self.preview = message
            case "event":
                if isinstance(message.header, Event):
                    self._events.append(message.header)
            case "acquisition_start":
                self._begin(message)
            case "acquisition_end":
                self.running = False
                self.history.flush()

    def _begin(self, start: Message) -> None:
        self.scan = Scan(
            start.acquisition_id,
            start.detector,
            start.frame_shape,
            start.scan_shape,
            start.expected_frames,
            start.time,
        )
        self.running = True
        self._first_line, self.moved = np.empty((0, 2)), 0.0

    def _take_telemetry(self, telemetry: Message) -> None:
        if self.scan is None or self.scan.acquisition_id != telemetry.acquisition_id:
            # The page came after the start.
            self._first_line, self.moved = np.empty((0, 2)), 0.0
            self.running = True
            status = self.status
            self.scan = Scan(
                telemetry.acquisition_id,
                status.acquisition.detector if status and status.acquisition else "",
                telemetry.frame_shape,
                telemetry.scan_shape,
                telemetry.expected_frames,
                telemetry.time,
            )
        self.moved = self._compare(telemetry)
        self.telemetry = telemetry
        self.history.add(telemetry)

    def _compare(self, telemetry: Message) -> float:
        """How far the last frame's center is from the first line's, which it may belong to."""
        if not len(telemetry.tracked):
            return self.moved
        if not len(self._first_line):
            nx = telemetry.scan_shape[1] if telemetry.scan_shape else 1
            self._first_line = np.full((nx, 2), math.nan)
        columns = telemetry.indices % len(self._first_line)
        new = np.isnan(self._first_line[columns]).any(axis=1)
        self._first_line[columns[new]] = telemetry.tracked[new]
        moved = float(np.hypot(*(telemetry.tracked[-1] - self._first_line[columns[-1]])))
        return self.moved if math.isnan(moved) else moved

    def _listen(self) -> None:
        with Subscriber(
            self.service.stream, TOPICS, timeout=_WAKE_S, server_key=self.service.server_key
        ) as stream:
            while not self._stop.is_set():
                try:
                    self.take(stream.receive())
                except NoAnswer:
                    self.history.flush_if_over()

    def _follow_preview(self) -> None:
        while self._wait_for_viewers():
            with Subscriber(
                self.service.stream, "preview", timeout=_WAKE_S, server_key=self.service.server_key
            ) as stream:
                while self._watched.is_set() and not self._stop.is_set():
                    with contextlib.suppress(NoAnswer):
                        self.take(stream.receive())

    def _follow_maps(self) -> None:
        while self._wait_for_viewers():
            with ScanMaps(
                self.service.stream,
                self.service.control,
                timeout=MAPS_TIMEOUT_S,
                server_key=self.service.server_key,
            ) as maps:
                while self._watched.is_set() and not self._stop.is_set():
                    with contextlib.suppress(NoAnswer):
                        update = next(maps)
                        self.maps = MapsView.of(update, {name: maps[name] for name in maps.names})

    def _wait_for_viewers(self) -> bool:
        """Wait until somebody looks; false where the feed is stopped before."""
        while not self._stop.is_set():
            if self._watched.wait(_WAKE_S):
                return True
        return False

    def _watch(self) -> None:
        answered: float | None = None
        with self.client(STATUS_TIMEOUT_S) as client:
            while not self._stop.is_set():
                try:
                    status = Status.model_validate(client.status())
                    if self.status is None or self.status.publisher != status.publisher:
                        corrector = client.config()["corrector"]
                        self.patterns_to_lock = corrector["patterns_to_lock"]
                except (Prenet4dError, ValidationError, LookupError, TypeError) as error:
                    self.unanswered_since = answered
                    self._tell(self._why(error))
                    self._stop.wait(STATUS_EVERY_S)
                    continue
                answered, self.unanswered_since = time.time(), None
                self._tell("")
                self._take_status(status)
                self._stop.wait(STATUS_EVERY_S)

    def _why(self, error: Exception) -> str:
        if isinstance(error, NoAnswer):
            unknown = unknown_host(self.service.control)
            return unknown.removesuffix(".") or "The service does not answer"
        if isinstance(error, Prenet4dError):
            return "The service refuses to tell this page how it is"
        return "The service is of another version of prenet4d than this page"

    def _tell(self, trouble: str) -> None:
        """Keep the trouble for the page; write into the log what is new about it."""
        if trouble and trouble != self.trouble:
            log.warning("%s (%s). Trying again and again.", trouble, self.service.control)
        elif self.trouble and not trouble:
            log.info("The service at %s answers.", self.service.control)
        self.trouble = trouble

    def _take_status(self, status: Status) -> None:
        known = self.status
        if known is None:
            self.earlier = status.recent_events
        if known is not None and known.publisher != status.publisher:
            self.running = False  # another life of the service
        if status.acquisition is None and known is not None and known.acquisition is not None:
            self.running = False  # its end may have been missed
        scan, running = self.scan, status.acquisition
        if scan and running and not scan.detector and scan.acquisition_id == running.acquisition_id:
            self.scan = replace(scan, detector=running.detector)  # the page came after the start
        self.status = status
