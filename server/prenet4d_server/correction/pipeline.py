"""The pipeline: one thread that takes batches from the ring through the corrector to the publisher.

Everything that touches the corrector happens on this thread, commands included: they are carried
out between two batches.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from prenet4d_client import messages
from prenet4d_client.messages import Counters, Event, State
from prenet4d_engines.batch import CorrectedBatch, Outcome
from prenet4d_engines.errors import EngineError
from prenet4d_server.config import Settings
from prenet4d_server.correction.batcher import Batch, Batcher
from prenet4d_server.correction.correctors import Correction, CorrectorMaker
from prenet4d_server.correction.errands import Errands
from prenet4d_server.correction.mapping import Mapper
from prenet4d_server.correction.results import Results
from prenet4d_server.errors import (
    CommandFailed,
    DuplicateFrame,
    IndexOutsideScan,
    IngestDied,
    ServiceError,
    UnknownAcquisition,
)
from prenet4d_server.ingest.inlet import Inlet
from prenet4d_server.ingest.notices import Ended, Remark, Started
from prenet4d_server.ingest.remarks import Remarks
from prenet4d_server.monitoring.counters import Ledger
from prenet4d_server.monitoring.meters import Meters
from prenet4d_server.publishing import outgoing
from prenet4d_server.publishing.publisher import Publisher
from prenet4d_server.wording import counted, foremost

log = logging.getLogger(__name__)
STEP_S = 0.2
# What may be raised where a corrector is made: our own errors, and those of torch and the memory.
CORRECTION_ERRORS = (EngineError, RuntimeError, ValueError, ArithmeticError, MemoryError)


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
        self._drain_s = settings.drain_s
        self._inlet = inlet
        self._batcher = Batcher(inlet, settings.batch)
        self._publisher = publisher
        publisher.while_held = inlet.update  # what it says, and its death, cannot wait
        self.correction = Correction(
            make_corrector,
            tell=self._tell_fault,
            center_is_configured=settings.corrector.reference_center is not None,
        )
        self.maps = Mapper(publisher, settings.stream.maps_every_s)
        self._meters = meters
        self._results = Results(publisher, settings.stream, meters)
        self._on_corrected = on_corrected
        self._provenance = provenance
        self._under_way: deque[tuple[Batch, float]] = deque()
        """Batches that the corrector has taken and not returned, and when it took them."""
        self._unpin = make_corrector.pin(inlet.ring.memory)
        self._came = self._looked = time.monotonic()
        self._remarks = Remarks(self.on_remark)
        self.view = View()
        self.total = Ledger()
        """Every frame of the service's life."""
        self._ledgers: defaultdict[str, Ledger] = defaultdict(lambda: Ledger(self.total))
        self._counted = 0
        """Ring positions before this one have been entered as received."""
        self._errands = Errands()
        self.call = self._errands.call
        """Has this thread do something for another, between two batches."""
        self._stopping = threading.Event()
        self._drains_until = math.inf

    @property
    def backlog(self) -> int:
        """Frames that wait in the ring."""
        return self._batcher.backlog

    @property
    def silent_s(self) -> float:
        """How long it has waited in vain for anything to come; not while it is busy or held."""
        return self._looked - self._came

    def counters(self, started: Started | None) -> Counters | None:
        """Of the acquisition that a view shows; ``None`` where it is over, or there is none."""
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
            self._errands.close()
            self._unpin()

    def stop(self) -> None:
        """Ask :meth:`run` to drain and return."""
        self._stopping.set()
        self._errands.wake()

    def hasten(self, drain_s: float) -> None:
        """Drain for no longer than ``drain_s`` from now."""
        self._drains_until = min(self._drains_until, time.monotonic() + drain_s)

    def command(self, action: Callable[[], object], code: str, message: str) -> Future[None]:
        """Have the pipeline's thread carry out what the operator asked for, and publish that.

        Returns:
            Done when it is, or the CommandFailed that says why it could not be carried out.

        Raises:
            CommandFailed: the service is stopping.
        """

        def act() -> None:
            action()
            started = self.view.started
            if self.view.state is not None:  # no batch need come to show what changed
                self.view = replace(self.view, state=self.correction.state)
            self._publisher.event("info", code, message, started.acquisition_id if started else "")

        return self.call(act)

    def step(self, timeout_s: float, *, hurry: bool = False) -> bool:
        """Do the next thing; returns whether there was one."""
        self._errands.run()
        self._remarks.flush()
        self.maps.publish_if_due()
        self._results.show_last_preview()
        # While batches are under way, the next one is looked for and not waited for.
        wait_s = 0.0 if self._under_way else timeout_s
        came = self._batcher.next(wait_s, (self._errands.descriptor,), hurry=hurry)
        self._count_received()
        self._looked = time.monotonic()
        if self._under_way and not isinstance(came, Batch):
            self._take(self.correction.corrector.finish())
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
        """Count and publish what the ingest process has to say, past what waits for a receiver."""
        self._came = time.monotonic()
        numbers = {"rejected": remark.rejected, "shed": remark.shed}
        counts = {name: count for name, count in numbers.items() if count}
        # An acquisition that was refused has no ledger, and nothing to count.
        known = bool(remark.acquisition_id and counts)
        ledger = self._ledgers[remark.acquisition_id] if known else self.total
        if remark.rejected:
            ledger.receive(remark.rejected)
            ledger.reject(remark.rejected, remark.code)
        if remark.shed:
            ledger.receive(remark.shed)
            ledger.shed(remark.shed)
        self._publisher.announce(
            Event(
                level=remark.level,
                code=remark.code,
                message=remark.message,
                acquisition_id=remark.acquisition_id,
                details=counts | remark.details,
            )
        )

    # --- the data's way --------------------------------------------------------------------------

    def _begin(self, started: Started) -> None:
        self._ledgers[started.acquisition_id]  # made now: who sees the acquisition looks for it
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
        self.maps.begin(started)
        self.view = View(started)
        h, w = started.frame_shape
        scan = (
            started.expected_frames or "an unknown number of"
            if started.scan_shape is None
            else "{} × {}".format(*started.scan_shape)
        )
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
        self.correction.end()
        self._publish_mean(ended.acquisition_id)
        self.maps.end()
        counters = self._ledgers.pop(ended.acquisition_id, Ledger()).snapshot()
        expected = self.view.started.expected_frames if self.view.started else None
        self.view = replace(self.view, started=None)
        how = f"was aborted: {ended.reason}" if ended.aborted else "ended"
        if expected:
            absent = max(0, expected - counters.received + _not_expected(counters))
            never_came = f" {absent:,} of {counted(expected, 'expected frame')} never came."
        else:
            absent = max(0, (ended.sent or 0) - counters.received)
            never_came = f" {absent:,} of {counted(ended.sent or 0, 'sent frame')} never came."
        in_vain = counters.received > 0 and not counters.corrected
        reason = foremost(counters.rejected_by_reason)
        self._publisher.event(
            "warning" if ended.aborted or absent or in_vain else "info",
            "acquisition_aborted" if ended.aborted else "acquisition_ended",
            f"The acquisition {how}; {counted(counters.received, 'frame')} received, "
            f"{counters.corrected:,} corrected, {counters.rejected:,} rejected"
            + (f" (most often: {reason})" if reason else "")
            + f", {counters.shed:,} shed."
            + (" None of its frames was corrected." if in_vain else "")
            + (never_came if absent else ""),
            ended.acquisition_id,
        )
        # The last word on it: recorders close its file with this, and want the event in it.
        self._publisher.publish(outgoing.acquisition_end(ended, counters))

    def _process(self, batch: Batch) -> None:
        self._under_way.append((batch, time.monotonic()))
        try:
            outcomes = self.correction.corrector.submit(batch.frames, batch.indices.copy())
        except EngineError as error:  # there is no corrector
            outcomes = [error]
        self._take(outcomes)

    def _take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            batch, taken = self._under_way.popleft()
            self._conclude(batch, taken, outcome)

    def _conclude(self, batch: Batch, taken: float, outcome: Outcome) -> None:
        """Publish what became of a batch, and release it."""
        n, started = len(batch), batch.acquisition
        ledger = self._ledgers[started.acquisition_id]
        try:
            result = _corrected(outcome)
            shown = self._results.take(result, batch)
        except Exception as error:  # whatever it was, the scan goes on
            if error is not outcome:  # an outcome has been logged where it came from
                log.exception("A corrected batch cannot be told of.")
            ledger.reject(n, "correction_failed")
            self._complain(error, started.acquisition_id, n)
            return
        finally:
            self._batcher.release(batch)
        done = time.monotonic()
        self._see(result, started)
        self.maps.add(result, automatic=self.correction.detectors is None)
        self._meters.done(n)
        self._meters.latency("queue", taken - shown.arrived)
        self._meters.latency("compute", np.full(n, done - taken))
        ledger.correct(n)  # last: who reads that they are done finds what they told
        self._results.publish(shown, backlog=self.backlog, counters=ledger.snapshot())
        if self._results.mean_is_due():
            self._publish_mean(started.acquisition_id)

    def _tell_fault(self, level: Literal["warning", "error"], code: str, message: str) -> None:
        """What the corrector runs on failed; nothing is lost by it, or batches will tell."""
        started = self.view.started
        self._publisher.event(level, code, message, started.acquisition_id if started else "")

    def _complain(self, error: Exception, acquisition_id: str, frames: int) -> None:
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

    def _see(self, result: CorrectedBatch, started: Started) -> None:
        """Show the other threads what this batch has told."""
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
            self._results.tell_state(result, started.acquisition_id)

    def _publish_mean(self, acquisition_id: str) -> None:
        if self._publisher.wants("mean") and (mean := self.correction.mean()) is not None:
            ellipticity = self.view.ellipticity or messages.Ellipticity()
            self._results.publish_mean(acquisition_id, mean, ellipticity)

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
        self.hasten(self._drain_s)
        self._inlet.stop()
        while time.monotonic() < self._drains_until:
            waiting = bool(self._batcher.backlog or self._inlet.marks or self._under_way)
            if self._inlet.stopped and not waiting:
                return
            self.step(0.05, hurry=True)
        self._inlet.kill()
        if self._under_way:
            self._take(self.correction.corrector.finish())
        lost = 0
        while (came := self._batcher.next(0.0, hurry=True)) is not None:
            self._count_received()
            match came:
                case Batch():
                    lost += len(came)
                    self._ledgers[came.acquisition.acquisition_id].shed(len(came))
                case Started():
                    self._begin(came)
                case Ended():
                    self._end(came)
        if lost:
            self._publisher.event(
                "warning",
                "drain_incomplete",
                f"The service stopped before {counted(lost, 'received frame')} could be corrected.",
                shed=lost,
            )


def _not_expected(counters: Counters) -> int:
    """Frames that came and are none of the acquisition's own: refused for their numbers."""
    kinds = (DuplicateFrame, IndexOutsideScan, UnknownAcquisition)
    return sum(counters.rejected_by_reason.get(kind.code, 0) for kind in kinds)


def _corrected(outcome: Outcome) -> CorrectedBatch:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
