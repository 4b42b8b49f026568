"""The service: everything put together, started, watched and stopped in order."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Self

import zmq

from prenet4d_client.messages import Counters, Event
from prenet4d_engines.calibration import Calibration
from prenet4d_server import logs
from prenet4d_server.config import Settings
from prenet4d_server.control.commands import Commands
from prenet4d_server.control.socket import Control
from prenet4d_server.correction.correctors import load_correctors
from prenet4d_server.correction.pipeline import Pipeline
from prenet4d_server.errors import ServiceError
from prenet4d_server.ingest.inlet import Inlet
from prenet4d_server.ingest.notices import Remark, Started
from prenet4d_server.monitoring import machine
from prenet4d_server.monitoring.alarms import Alarms, Facts
from prenet4d_server.monitoring.meters import Meters
from prenet4d_server.monitoring.status import AcquisitionStatus, SourceStatus, Status
from prenet4d_server.page.operator_token import OperatorToken
from prenet4d_server.page.settings import PageSettings, ServiceAddress
from prenet4d_server.page.supervisor import PageProcess, listen
from prenet4d_server.publishing.provenance import provenance
from prenet4d_server.publishing.publisher import Publisher
from prenet4d_server.recording.supervisor import Recordings
from prenet4d_server.sockets import KeyPair, knowing_clients, load_keys, within_reach

PUBLISH_TIMEOUT_S = 5.0
LAST_WORD_S = 1.0
"""So long receivers may take what is on its way when the draining is cut short."""
WATCH_S = 0.2
EVENTS_IN_STATUS = 10
log = logging.getLogger(__name__)


class Service:
    """The live service, from entering the context to leaving it.

    ::

        with Service(load_settings()) as service:
            service.run(stop)

    On entering, everything is bound and started: networks are loaded and the source is open. On
    leaving, what has been received is drained, for at most ``drain_s``.

    Args:
        settings: what :func:`~prenet4d_server.config_file.load_settings` returns.
        calibration: begin with it.

    Raises:
        EngineError, ServiceError: on entering, it cannot start; nothing is left running.
    """

    def __init__(self, settings: Settings, calibration: Calibration | None = None) -> None:
        self.settings = settings
        self._calibration = calibration
        self.endpoints: dict[str, str] = {}
        """The addresses in use: ``ingest``, ``stream``, ``lossless``, ``control``, ``http``."""
        self._undo = contextlib.ExitStack()
        self._started = time.monotonic()
        self._meters = Meters()
        self._inlet: Inlet
        self._publisher: Publisher
        self._control: Control
        self._commands: Commands
        self._recordings: Recordings
        self._alarms: Alarms
        self._pipeline: Pipeline
        self._page: PageProcess | None = None
        self._work: Future[None]
        self._engine = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        log.info("Ready. %s %s", self._engine, self._addresses())
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drain, say goodbye, and stop everything; may be called twice."""
        self._undo.close()

    def hasten(self) -> None:
        """Drain no more: what is not corrected yet is shed. Takes no lock, as signals demand."""
        self._pipeline.hasten(0.0)
        self._publisher.hasten(LAST_WORD_S)

    def run(self, stop: threading.Event) -> None:
        """Watch over the service until ``stop`` is set.

        Raises:
            IngestDied: the ingest process died and is not to be started again.
            ServiceError: a part of the service died; its log says why.
        """
        while not stop.wait(WATCH_S):
            if self._work.done():
                self._work.result()
                raise ServiceError("The pipeline has ended.")

    @property
    def acquisition_id(self) -> str:
        """Of the acquisition that is running; empty between acquisitions."""
        started = self._pipeline.view.started
        return started.acquisition_id if started is not None else ""

    def status(self) -> Status:
        """What the service is doing now."""
        pipeline, inlet = self._pipeline, self._inlet
        # Counters first: what frames have told is seen before they are counted.
        started = pipeline.view.started
        counters, total = pipeline.counters(started), pipeline.total.snapshot()
        view = pipeline.view
        threads = (self._publisher, self._control, self._alarms)
        healthy = all(each.alive for each in threads) and not self._work.done()
        return Status(
            version=version("prenet4d"),
            publisher=self._publisher.id,
            healthy=healthy,
            ready=healthy and inlet.ready,
            uptime_s=time.monotonic() - self._started,
            engine=self._engine,
            endpoints=self.endpoints,
            source=SourceStatus(
                kind=self.settings.source.kind,
                address=inlet.address,
                ready=inlet.ready,
                restarts=inlet.restarts,
            ),
            state=view.state,
            ellipticity=view.ellipticity,
            reference_center=view.reference_center,
            patterns_averaged=view.patterns_averaged,
            frames_per_second=self._meters.frames_per_second,
            backlog=pipeline.backlog,
            backlog_limit=started.slots if started is not None else 0,
            latency=self._meters.latencies,
            latency_histograms=self._meters.histograms,
            counters=total,
            acquisition=None
            if started is None or counters is None
            else _acquisition_status(started, counters),
            receivers=self._publisher.receivers,
            receivers_behind_s=dict(self._publisher.behind_s),
            alarms=self._alarms.active,
            maps=pipeline.maps.status,
            recording=self._recordings.status,
            processes=machine.processes(
                {
                    "service": os.getpid(),
                    "ingest": inlet.pid,
                    "recorder": self._recordings.pid,
                    "page": self._page.pid if self._page is not None else None,
                }
            ),
            gpu=machine.gpu(),
            recent_events=tuple(
                f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.message}"
                for event in list(self._publisher.recent_events)[-EVENTS_IN_STATUS:]
            ),
        )

    def _start(self, undo: contextlib.ExitStack) -> None:
        settings = self.settings
        keys = load_keys(settings.security.secret_key_file)
        for what, file in (
            ("secret key", settings.security.secret_key_file),
            ("operator's token", settings.http.operator_token_file),
        ):
            # A token's file that is not there will be made for its owner alone.
            if file is not None and file.exists() and file.stat().st_mode & stat.S_IROTH:
                log.warning("Everybody may read the %s: chmod o= %s", what, file)
        self._engine, make_corrector = load_correctors(
            settings.corrector, lambda: self._publisher.wants("maps")
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        undo.callback(context.term)
        operators, page_keys = settings.security.operator_keys, None
        if operators:
            undo.enter_context(knowing_clients(context))
            # The page commands for who has shown it the token.
            page_keys = zmq.curve_keypair()
            operators = (*operators, page_keys[0].decode())
        self._publisher = Publisher(settings.stream, settings.lossless, context=context, keys=keys)
        self._recordings = Recordings(
            settings.recording,
            lossless=self._publisher.lossless_address,
            server_key=keys[0] if keys else None,
            log=settings.log,
            tell=self._publisher.announce,
        )
        undo.callback(self._recordings.close)
        undo.callback(self._publisher.close, PUBLISH_TIMEOUT_S)
        self._alarms = Alarms(
            settings.alarms,
            patterns_to_lock=settings.corrector.patterns_to_lock,
            tell=self._publisher.announce,
        )
        self._control = Control(
            settings.control.address,
            publisher=self._publisher.id,
            context=context,
            keys=keys,
            operators=operators or None,
        )
        undo.callback(self._control.close)
        self._inlet = Inlet(settings, self._on_remark)
        undo.callback(self._inlet.close)
        self._pipeline = Pipeline(
            settings,
            self._inlet,
            self._publisher,
            make_corrector,
            self._meters,
            self._alarms.see,
            provenance(settings, self._engine),
        )
        if self._calibration is not None:
            self._pipeline.correction.load(self._calibration)
        self._inlet.open()
        worker = ThreadPoolExecutor(1, "pipeline")
        undo.callback(worker.shutdown)
        self._work = worker.submit(self._pipeline.run)
        self._work.add_done_callback(_log_failure)
        undo.callback(self._stop_pipeline)
        self._alarms.start(self._facts)
        undo.callback(self._alarms.close)
        self.endpoints = {
            "ingest": self._inlet.address,
            "stream": self._publisher.stream_address,
            "lossless": self._publisher.lossless_address,
            "control": self._control.address,
        }
        if settings.http.enabled:
            self._start_page(undo, keys, page_keys)
        # Bound early, answering once there is something to tell, and until all is drained.
        self._commands = Commands(settings, self._pipeline, self._recordings, self.status)
        self._control.start(self._commands.table())

    def _start_page(
        self, undo: contextlib.ExitStack, keys: KeyPair | None, page_keys: KeyPair | None
    ) -> None:
        http = self.settings.http
        said = http.operator_token.get_secret_value() if http.operator_token else None
        token = OperatorToken(said, http.operator_token_file)
        listening, self.endpoints["http"] = listen(http.address)
        page = self._page = PageProcess(listening, self._on_page_death)
        undo.callback(page.close)
        service = ServiceAddress(
            stream=within_reach(self.endpoints["stream"]),
            control=within_reach(self.endpoints["control"]),
            server_key=keys[0].decode() if keys else None,
            client_keys=(page_keys[0].decode(), page_keys[1].decode()) if page_keys else None,
        )
        page.start(
            PageSettings(
                service=service,
                operator_token=token.secret,
                updates_per_second=http.updates_per_second,
                gives_way=http.gives_way,
                log=self.settings.log,
            )
        )
        log.info("Operators open the page with %s", token.address(self.endpoints["http"]))

    def _on_page_death(self, status: int) -> None:
        self._publisher.announce(
            Event(
                level="warning",
                code="page_died",
                message=f"The page's process died (exit status {status}); it is started again.",
                details={"exit_status": status},
            )
        )

    def _facts(self) -> Facts:
        pipeline, view = self._pipeline, self._pipeline.view
        return Facts(
            started=view.started,
            state=view.state,
            patterns_averaged=view.patterns_averaged,
            backlog=pipeline.backlog,
            silent_s=pipeline.silent_s,
            counters=pipeline.total.snapshot(),
            acquisition=pipeline.counters(view.started),
            behind_s=self._publisher.behind_s,
        )

    def _on_remark(self, remark: Remark) -> None:
        self._pipeline.on_remark(remark)

    def _stop_pipeline(self) -> None:
        self._publisher.hasten(self.settings.drain_s)
        self._pipeline.stop()

    def _addresses(self) -> str:
        return ", ".join(f"{name} {address}" for name, address in self.endpoints.items())


def _acquisition_status(started: Started, counters: Counters) -> AcquisitionStatus:
    return AcquisitionStatus(
        acquisition_id=started.acquisition_id,
        series=started.series,
        detector=started.detector,
        frame_shape=started.frame_shape,
        dtype=started.dtype,
        scan_shape=started.scan_shape,
        expected_frames=started.expected_frames,
        gain=started.gain,
        saturation_value=started.saturation_value,
        metadata=started.metadata,
        counters=counters,
    )


def _log_failure(work: Future[None]) -> None:
    if (error := work.exception()) is not None:
        log.error("The pipeline has died.", exc_info=error)


class Stop(threading.Event):
    """Set by a signal, whose name it keeps."""

    by = ""
    second: Any = None
    """The handler of a second Ctrl-C; by default the one that was there before."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """An event that Ctrl-C, SIGTERM and a terminal that goes away set; a second Ctrl-C interrupts.

    In the main thread only. Where a second one is to do something else, set ``Stop.second``.
    """
    stop = Stop()
    before: dict[signal.Signals, Any] = {}

    def on_signal(number: int, _frame: object) -> None:
        stop.by = signal.Signals(number).name
        stop.set()
        signal.signal(signal.SIGINT, stop.second or before[signal.SIGINT])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)


def serve(settings: Settings, calibration: Calibration | None = None) -> int:
    """Run the service until Ctrl-C, SIGTERM or SIGHUP, in the main thread.

    Args:
        settings: what :func:`~prenet4d_server.config_file.load_settings` returns.
        calibration: begin with it.

    Returns:
        The process's exit status: 0 after a stop that was asked for.

    Raises:
        EngineError, ServiceError: it cannot start, or a part of it died; nothing is left running.
    """
    logs.configure(settings.log, "service")
    with stopped_by_signals() as stop, Service(settings, calibration) as service:
        stop.second = lambda *_: service.hasten()
        logs.belongs_to(lambda: service.acquisition_id)
        service.run(stop)
        log.info(
            "Stopping on %s: what has been received is finished first, for at most %g s; a further "
            "Ctrl-C gives up the rest.",
            stop.by,
            settings.drain_s,
        )
    return 0
