"""The pipeline: one thread that takes batches from the ring through the corrector to the publisher.

Everything that touches the corrector happens on this thread, commands included: they are carried
out between two batches.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from prenet4d_client import messages
from prenet4d_client.messages import Counters, State
from prenet4d_engines.batch import CorrectedBatch, Float32
from prenet4d_engines.errors import EngineError

from prenet4d_server import outgoing
from prenet4d_server.batcher import Batch, Batcher
from prenet4d_server.config import Settings
from prenet4d_server.correctors import Correction, CorrectorMaker
from prenet4d_server.counters import Ledger
from prenet4d_server.errors import CommandFailed, IngestDied, ServiceError
from prenet4d_server.inlet import Inlet
from prenet4d_server.mapping import Mapper
from prenet4d_server.meters import Meters
from prenet4d_server.notices import Ended, Remark, Started
from prenet4d_server.publisher import Publisher
from prenet4d_server.remarks import Remarks

STEP_S = 0.2
COMMAND_TIMEOUT_S = 4.0
# What a corrector may raise for one batch: our own errors, and those of torch and the memory.
CORRECTION_ERRORS = (EngineError, RuntimeError, ValueError, ArithmeticError, MemoryError)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class View:
    """What the pipeline shows to other threads: made anew for each batch, never changed."""

    started: Started | None = None
    ellipticity: messages.Ellipticity | None = None
    state: State | None = None
    reference_center: tuple[float, float] | None = None
    patterns_averaged: int = 0


class Pipeline:
    """Takes what the batcher gives until it is told to stop; then finishes what is in the ring."""

    def __init__(
        self,
        settings: Settings,
        inlet: Inlet,
        publisher: Publisher,
        make_corrector: CorrectorMaker,
        meters: Meters,
        on_corrected: Callable[[str, CorrectedBatch], None],
        provenance: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._inlet = inlet
        self._batcher = Batcher(inlet, settings.batch)
        self._publisher = publisher
        self.correction = Correction(
            make_corrector,
            center_is_configured=settings.corrector.reference_center is not None,
        )
        self.maps = Mapper(publisher, settings.stream.maps_every_s)
        self._meters = meters
        self._on_corrected = on_corrected
        self._provenance = provenance
        self._came = self._looked = time.monotonic()
        self._remarks = Remarks(self.on_remark)
        self.view = View()
        self.total = Ledger()
        """Every frame of the service's life."""
        self._ledgers: defaultdict[str, Ledger] = defaultdict(lambda: Ledger(self.total))
        self._counted = 0
        """Ring positions before this one have been entered as received."""
        self._batches = 0
        self._next_mean = 0.0
        self._next_preview = 0.0
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()

    @property
    def backlog(self) -> int:
        """Frames that wait in the ring."""
        return self._batcher.backlog

    @property
    def silent_s(self) -> float:
        """How long it has waited in vain for anything to come; not while it is busy or held."""
        return self._looked - self._came

    def counters(self) -> Counters | None:
        """The running acquisition's; ``None`` between acquisitions."""
        started = self.view.started
        ledger = self._ledgers.get(started.acquisition_id) if started is not None else None
        return None if ledger is None else ledger.snapshot()

    def run(self) -> None:
        """Work until :meth:`stop`, then drain.

        Raises:
            IngestDied: the ingest process died and is not to be started again.
            ServiceError: the publisher's thread died.
        """
        try:
            while not self._stopping.is_set():
                self.step(STEP_S)
                if self._inlet.stopped and not self._batcher.backlog and not self._inlet.marks:
                    raise IngestDied("The ingest process died; the service cannot go on.")
                if not self._publisher.alive:
                    raise ServiceError("The publisher died; the service cannot go on.")
            self._drain()
        finally:
            self._inlet.kill()
            self._refuse_commands()

    def stop(self) -> None:
        """Ask :meth:`run` to drain and return."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)

    def call(self, command: Callable[[], T], timeout_s: float = COMMAND_TIMEOUT_S) -> T:
        """Have the pipeline's thread carry out a command between two batches.

        Raises:
            CommandFailed: it could not be carried out, or not in time.
        """
        answer: Future[T] = Future()
        self._commands.put((command, answer))
        os.eventfd_write(self._wake, 1)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise CommandFailed(
                "The pipeline is busy: a batch takes long, or a lossless receiver holds it back. "
                "Ask again."
            ) from None

    def command(self, action: Callable[[], object], code: str, message: str) -> None:
        """Have the pipeline's thread carry out what the operator asked for, and publish that.

        Raises:
            CommandFailed: it could not be carried out, or not in time.
        """

        def act() -> None:
            action()
            started = self.view.started
            if self.view.state is not None:  # no batch need come to show what changed
                self.view = replace(self.view, state=self.correction.state)
            self._publisher.event("info", code, message, started.acquisition_id if started else "")

        self.call(act)

    def step(self, timeout_s: float, *, hurry: bool = False) -> bool:
        """Do the next thing; returns whether there was one."""
        self._carry_out_commands()
        self._remarks.flush()
        self.maps.publish_if_due()
        came = self._batcher.next(timeout_s, (self._wake,), hurry=hurry)
        self._count_received()
        self._looked = time.monotonic()
        if came is None:
            return False
        self._came = self._looked
        match came:
            case Started():
                self._begin(came)
            case Ended():
                self._end(came)
            case Batch():
                self._process(came)
        return True

    def on_remark(self, remark: Remark) -> None:
        """Count and publish what the ingest process has to say."""
        self._came = time.monotonic()
        ledger = self._ledgers[remark.acquisition_id] if remark.acquisition_id else self.total
        if remark.rejected:
            ledger.receive(remark.rejected)
            ledger.reject(remark.rejected, remark.code)
        if remark.shed:
            ledger.receive(remark.shed)
            ledger.shed(remark.shed)
        counts = {"rejected": remark.rejected, "shed": remark.shed}
        details = {name: count for name, count in counts.items() if count} | remark.details
        self._publisher.event(
            remark.level, remark.code, remark.message, remark.acquisition_id, **details
        )

    def _carry_out_commands(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while not self._commands.empty():
            command, answer = self._commands.get()
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(command())
                except (CommandFailed, EngineError) as error:
                    answer.set_exception(CommandFailed(str(error)))

    def _refuse_commands(self) -> None:
        while not self._commands.empty():
            _, answer = self._commands.get()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(CommandFailed("The service is stopping."))

    # --- the data's way --------------------------------------------------------------------------

    def _begin(self, started: Started) -> None:
        self.view = View(started)
        self.maps.begin(started)
        try:
            self.correction.begin(started)
        except CORRECTION_ERRORS as error:
            self._publisher.event(
                "error",
                "no_corrector",
                f"This acquisition cannot be corrected: {error}",
                started.acquisition_id,
            )
        self._publisher.publish(outgoing.acquisition_start(started, self._known_of_it()))
        h, w = started.frame_shape
        scan = "an unknown number of" if started.scan_shape is None else "{} × {}".format(
            *started.scan_shape
        )  # fmt: skip
        self._publisher.event(
            "info",
            "acquisition_started",
            f"Series {started.series} of {started.detector} began: "
            f"{scan} frames of {h} × {w} {started.dtype}.",
            started.acquisition_id,
        )

    def _known_of_it(self) -> dict[str, Any]:
        """The provenance of the acquisition that begins."""
        try:
            calibration = self.correction.calibration().model_dump(mode="json")
        except (CommandFailed, EngineError):
            calibration = None
        return {**self._provenance, "calibration": calibration}

    def _end(self, ended: Ended) -> None:
        self._remarks.flush(everything=True)
        self.correction.end(self.view.state)
        self._publish_mean(ended.acquisition_id)
        self.maps.end()
        counters = self._ledgers.pop(ended.acquisition_id, Ledger()).snapshot()
        self._publisher.publish(outgoing.acquisition_end(ended, counters))
        how = f"was aborted: {ended.reason}" if ended.aborted else "ended"
        self._publisher.event(
            "warning" if ended.aborted else "info",
            "acquisition_aborted" if ended.aborted else "acquisition_ended",
            f"The acquisition {how}; {counters.received} frames received, {counters.corrected} "
            f"corrected, {counters.rejected} rejected, {counters.shed} shed.",
            ended.acquisition_id,
        )
        self.view = replace(self.view, started=None)

    def _process(self, batch: Batch) -> None:
        n, acquisition_id = len(batch), batch.acquisition.acquisition_id
        ledger = self._ledgers[acquisition_id]
        taken = time.monotonic()
        arrived = batch.slots.arrived.copy()
        try:
            result = self.correction.corrector.process(batch.frames, batch.indices.copy())
            patterns = self._patterns(result, batch)
            preview = self._preview(result, batch)
        except CORRECTION_ERRORS as error:
            ledger.reject(n, "correction_failed")
            self._publisher_remark(error, acquisition_id, n)
            return
        finally:
            self._batcher.release(batch)
        done = time.monotonic()
        ledger.correct(n)
        self._meters.done(n)
        self._meters.latency("queue", taken - arrived)
        self._meters.latency("compute", np.full(n, done - taken))
        if self._batches == 0:  # later ones are entered once they are sent
            self._meters.latency("total", done - arrived)
        self._publish(batch.acquisition, result, patterns, arrived)
        if preview is not None:
            self._publisher.publish(preview)

    def _publisher_remark(self, error: Exception, acquisition_id: str, frames: int) -> None:
        """A batch failed: say so, at a bounded rate; its frames have been counted already."""
        self._remarks.add(
            Remark(
                "error",
                "correction_failed",
                f"A batch cannot be corrected: {error}",
                acquisition_id,
                details={"frames": frames},
            )
        )

    def _publish(
        self,
        started: Started,
        result: CorrectedBatch,
        patterns: tuple[Float32 | None, Float32 | None],
        arrived: npt.NDArray[np.float64],
    ) -> None:
        number, indices = self._batches, result.indices
        self._batches += 1

        def enter_latency() -> None:
            self._meters.latency("total", time.monotonic() - arrived)

        self._publisher.publish(
            outgoing.telemetry(
                started,
                result,
                number,
                latencies=self._meters.latencies,
                frames_per_second=self._meters.frames_per_second,
                backlog=self.backlog,
                counters=self._ledgers[started.acquisition_id].snapshot(),
            ),
            outgoing.patterns(messages.Corrected, started, number, indices, patterns[0]),
            outgoing.patterns(messages.Aligned, started, number, indices, patterns[1]),
            on_sent=enter_latency if number else None,
        )
        before = self.view.state
        self.view = View(
            started=started,
            ellipticity=outgoing.ellipticity_of(result),
            state=result.state,
            reference_center=result.reference_center,
            patterns_averaged=result.patterns_averaged,
        )
        self._on_corrected(started.acquisition_id, result)
        if result.state != before:
            self._tell_state(result, started.acquisition_id)
        if time.monotonic() >= self._next_mean:
            self._next_mean = time.monotonic() + self._settings.stream.mean_every_s
            self._publish_mean(started.acquisition_id)
        self.maps.add(result, automatic=self.correction.detectors is None)

    def _patterns(
        self, result: CorrectedBatch, batch: Batch
    ) -> tuple[Float32 | None, Float32 | None]:
        """The batch's corrected and aligned patterns, in memory of their own.

        A corrector that corrects nothing returns the frames as they lie in the ring; they are
        converted and copied only if somebody wants them.
        """
        if not np.may_share_memory(result.corrected, batch.frames):
            return result.corrected, result.aligned
        if not (self._publisher.wants("corrected") or self._publisher.wants("aligned")):
            return None, None
        copied = batch.frames.astype(np.float32)
        return copied, copied

    def _preview(self, result: CorrectedBatch, batch: Batch) -> outgoing.Outgoing | None:
        """The batch's last frame for people to look at, where one is due and somebody looks."""
        now, stream = time.monotonic(), self._settings.stream
        if now < self._next_preview or not self._publisher.wants("preview"):
            return None
        self._next_preview = now + stream.preview_every_s
        return outgoing.preview(batch.acquisition, result, batch.frames[-1], stream.preview_pixels)

    def _tell_state(self, result: CorrectedBatch, acquisition_id: str) -> None:
        state = "under way" if result.state == "calibrating" else result.state
        self._publisher.event(
            "warning" if result.state == "lost" else "info",
            f"calibration_{result.state}",
            f"The calibration is {state}: ratio {result.ellipticity.ratio:.5f}, "
            f"theta {result.ellipticity.theta:.4f} rad.",
            acquisition_id,
        )

    def _publish_mean(self, acquisition_id: str) -> None:
        if self._publisher.wants("mean") and (mean := self.correction.mean()) is not None:
            ellipticity = self.view.ellipticity or messages.Ellipticity()
            self._publisher.publish(outgoing.mean(acquisition_id, *mean, ellipticity))

    def _count_received(self) -> None:
        """Enter what has come for the acquisition that is running; later ones' when they begin."""
        started = self.view.started
        if started is None:
            self._counted = self._batcher.position
        elif (arrived := self._batcher.arrived) > self._counted:
            self._ledgers[started.acquisition_id].receive(arrived - self._counted)
            self._counted = arrived

    def _drain(self) -> None:
        """Finish what has been received, for a bounded time; give up the rest and say so."""
        deadline = time.monotonic() + self._settings.drain_s
        self._inlet.stop()
        while time.monotonic() < deadline:
            waiting = bool(self._batcher.backlog or self._inlet.marks)
            if self._inlet.stopped and not waiting:
                return
            self.step(0.05, hurry=True)
        self._inlet.kill()
        lost = 0
        while (came := self._batcher.next(0.0, hurry=True)) is not None:
            self._count_received()
            match came:
                case Batch():
                    lost += len(came)
                    self._ledgers[came.acquisition.acquisition_id].shed(len(came))
                case Started():
                    self.view = View(came)
                case Ended():
                    self._end(came)
        self._publisher.event(
            "warning",
            "drain_incomplete",
            f"The service stopped before {lost} received frames were corrected.",
            shed=lost,
        )
