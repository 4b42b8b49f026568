"""The ingest process: detector in, frames in the ring out.

It runs as ``python -m prenet4d_server.ingest.process PIPE`` beside the main process, which hands it
its settings over the pipe, and the ring as open file descriptors. A process of its own, because the
corrector's pauses must not stall the receiving of frames, nor the decoding of frames the corrector.
It imports no torch. When the pipe closes, whatever became of the main process, it ends.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from prenet4d_server import logs
from prenet4d_server.config import Settings, SourceSettings
from prenet4d_server.errors import BadStart, SequenceError, ServiceError
from prenet4d_server.ingest.decoder import Decoder, Decoding
from prenet4d_server.ingest.intake import Closed, Intake
from prenet4d_server.ingest.introduction import Introduction
from prenet4d_server.ingest.notices import (
    Ended,
    Failed,
    Notice,
    Ready,
    Remark,
    Started,
    pack,
)
from prenet4d_server.ingest.remarks import Remarks
from prenet4d_server.ingest.ring import Layout, RingWriter, Slots, wait_readable
from prenet4d_server.memory import keep_freed_memory
from prenet4d_server.sockets import KeyPair, load_keys
from prenet4d_server.sources import compression
from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    Fault,
    FrameBlock,
    Source,
    SourceEvent,
)

POLL_S = 0.1
END_PATIENCE_S = 30.0
"""How long the end of an acquisition is waited for, once all of its frames have come."""
_GIL_S = 0.0005
"""How long the receiving thread may hold the GIL while a decoding thread wants it: ten times less
than Python's default, which is as long as a whole block takes to decode."""


class MainProcessGone(Exception):
    """The pipe closed: there is nobody left to work for."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Frames on their way into claimed slots."""

    slots: Slots
    decoding: Decoding


class Ingest:
    """Takes what the source says through the intake and the decoder into the ring."""

    def __init__(
        self, source: Source, ring: RingWriter, pipe: Connection, settings: Settings
    ) -> None:
        self._source = source
        self._ring = ring
        self._pipe = pipe
        self._intake = Intake(settings.source.scan_shape)
        self._decoder = Decoder(settings.ring.decode_threads)
        self._sheds = settings.ring.policy == "shed"
        self._remarks = Remarks(self._tell)
        self._job: _Job | None = None
        self._stopping = False

    def run(self) -> None:
        """Work until the main process says stop; what was taken from the source is finished."""
        heard = time.monotonic()
        while not self._stopping:
            events = self._source.poll(POLL_S if self._job is None else 0.0, self._decoding)
            for event in events:
                self._take(event)
            if events:
                heard = time.monotonic()
            else:
                self._finish()
                if time.monotonic() - heard > END_PATIENCE_S:
                    self._end_if_complete()
            self._remarks.flush()
            self._listen()
        self._finish()
        if closed := self._intake.abort("the service was stopped"):
            self._end(closed)
        self._remarks.flush(everything=True)
        self._decoder.close()

    def go_on(self, begun: Started) -> None:
        """Take over an acquisition whose first frames another ingest process has committed."""
        came = self._ring.position - begun.at
        self._intake.go_on(begun.acquisition_id, begun.start, came)

    def _decoding(self) -> bool:
        return self._job is not None and not self._job.decoding.done

    def _take(self, event: SourceEvent) -> None:
        if isinstance(event, AcquisitionStart | AcquisitionEnd | Fault):
            self._finish()
        match event:
            case AcquisitionStart():
                self._start(event)
            case AcquisitionEnd():
                try:
                    self._end(self._intake.end(event))
                except SequenceError as error:
                    self._remark(error)
            case Fault():
                if event.refuses_start or isinstance(event.error, BadStart):
                    self._refuse(event.error, event.series, event.series)
                else:
                    self._remark(event.error, rejected=event.frames)
            case _:
                self._frames(event)

    def _start(self, event: AcquisitionStart) -> None:
        try:
            closed, troubles = self._intake.start(event)
        except BadStart as error:
            self._refuse(error, event.series, event.acquisition_id)
            return
        except SequenceError as error:
            self._remark(error)
            return
        if closed is not None:
            self._end(closed)
        for trouble in troubles:
            self._remark(trouble)
        running = self._intake.running
        layout = self._ring.fit(event.frame_shape, event.dtype)
        if layout is None or running is None:
            self._intake.abort("its frames do not fit the ring")
            h, w = event.frame_shape
            why = f"Frames of {h} × {w} {event.dtype} are too large for the ring"
            too_large = BadStart(f"{why}: make ring.size larger.")
            self._refuse(too_large, event.series, event.acquisition_id)
            return
        self._lay(layout)
        self._tell(Started.of(running.start, running.id, self._ring.position, layout))

    def _refuse(self, error: ServiceError, series: str, acquisition_id: str | None) -> None:
        self._intake.refuse(error, series)
        self._remarks.add(Remark("warning", error.code, str(error), acquisition_id or ""))

    def _lay(self, layout: Layout) -> None:
        """Divide the ring anew; where slots move, only after the reader has let go of all."""
        now = self._ring.layout
        if now is not None and (now.slots, now.base) != (layout.slots, layout.base):
            while not self._ring.empty():
                self._wait_for_room()
        self._ring.lay(layout)

    def _end(self, closed: Closed) -> None:
        self._remarks.flush(everything=True)
        self._tell(
            Ended(self._ring.position, closed.id, closed.aborted, closed.reason, closed.sent)
        )

    def _end_if_complete(self) -> None:
        """So that recordings are closed and calibrations kept though the detector does not end."""
        running = self._intake.running
        if running is None or not running.complete:
            return
        series = running.start.series
        why = f"All frames of series {series} have come, and for {END_PATIENCE_S:g} s not its end"
        self._remark(SequenceError(f"{why}: it is taken to have ended."))
        self._end(self._intake.end(AcquisitionEnd(series)))

    def _frames(self, block: FrameBlock) -> None:
        arrived = time.monotonic()
        good, refusals = self._intake.admit(block.series, block.indices)
        for error, frames in refusals:
            self._remark(error, rejected=frames)
        while len(good):
            self._finish()
            room = self._room()
            if room == 0:
                self._shed(block, good)
                return
            slots = self._ring.claim(min(room, len(good)))
            taken, good = good[: len(slots.indices)], good[len(slots.indices) :]
            slots.indices[:] = block.indices[taken]
            slots.arrived[:] = arrived
            self._job = _Job(slots, self._decoder.decode(block, taken, slots.frames))
            if self._job.decoding.done:
                self._finish()

    def _finish(self) -> None:
        """Commit what was being decoded while the source was asked for more."""
        if self._job is None:
            return
        slots, failed = self._job.slots, self._job.decoding.result()
        self._job = None
        n = len(slots.indices)
        if failed:
            keep = np.ones(n, np.bool_)
            keep[[place for place, _ in failed]] = False
            self._intake.forget(slots.indices[~keep])
            kept = int(keep.sum())
            slots.frames[:kept] = slots.frames[keep]
            slots.indices[:kept] = slots.indices[keep]
            for _, error in failed:
                self._remark(error, rejected=1)
        self._ring.commit(n - len(failed))

    def _room(self) -> int:
        """Free slots; waits for one unless frames are to be shed."""
        while (room := self._ring.free()) == 0 and not self._sheds:
            self._remarks.add(
                Remark("warning", "ring_full", "The ring is full: the detector is held back.")
            )
            self._remarks.flush()
            self._wait_for_room()
        return room

    def _wait_for_room(self) -> None:
        wait_readable([self._ring.freed_fd, self._pipe.fileno()], POLL_S)
        self._listen()

    def _shed(self, block: FrameBlock, numbers: np.ndarray[tuple[int], np.dtype[np.intp]]) -> None:
        self._intake.forget(block.indices[numbers])
        self._remarks.add(
            Remark(
                "warning",
                "frames_shed",
                "The ring is full: frames are dropped.",
                self.acquisition_id,
                shed=len(numbers),
            )
        )

    @property
    def acquisition_id(self) -> str:
        """Of the acquisition that is running; empty between acquisitions."""
        return self._intake.running.id if self._intake.running else ""

    def _remark(self, error: ServiceError, rejected: int = 0) -> None:
        self._remarks.add(
            Remark("warning", error.code, str(error), self.acquisition_id, rejected=rejected)
        )

    def _tell(self, notice: Notice) -> None:
        try:
            self._pipe.send_bytes(pack(notice))
        except OSError:
            raise MainProcessGone from None

    def _listen(self) -> None:
        """The main process says one thing only, stop; or it is gone."""
        try:
            # Connection.poll would take as long as receiving several frames.
            while wait_readable([self._pipe.fileno()], 0):
                self._pipe.recv_bytes()
                self._stopping = True
        except (EOFError, OSError):
            raise MainProcessGone from None


def make_source(settings: SourceSettings, keys: KeyPair | None) -> Source:
    """Open the source that the settings describe.

    Raises:
        BindError: its address cannot be bound.
        FileError: its file cannot be read.
    """
    if settings.kind in ("dectris1", "dectris2"):
        compression.prepare()
    match settings.kind:
        case "native":
            from prenet4d_server.sources.native import NativeSource

            return NativeSource(settings.endpoint, max_bytes=settings.max_message, curve=keys)
        case "dectris1":
            from prenet4d_server.sources.dectris_v1 import DectrisV1Source

            return DectrisV1Source(
                settings.endpoint,
                scan_shape=settings.scan_shape,
                gain=settings.gain,
                max_bytes=settings.max_message,
            )
        case "dectris2":
            from prenet4d_server.sources.dectris_v2 import DectrisV2Source

            return DectrisV2Source(
                settings.endpoint,
                channel=settings.channel,
                scan_shape=settings.scan_shape,
                gain=settings.gain,
                max_bytes=settings.max_message,
            )
        case "replay":
            from prenet4d_server.sources.replay import ReplaySource

            assert settings.path is not None
            return ReplaySource(
                settings.path,
                rate=settings.rate,
                repeat=settings.repeat,
                dataset=settings.dataset,
                scan_shape=settings.scan_shape,
                gain=settings.gain,
            )


def main(open_source: Callable[[SourceSettings, KeyPair | None], Source] = make_source) -> int:
    """Run the ingest process; the number of its pipe's descriptor is the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process decides, and says it here
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    sys.setswitchinterval(_GIL_S)
    pipe = Connection(int(sys.argv[1]))
    told = Introduction.unpack(pipe.recv_bytes())
    settings = told.settings
    logs.configure(settings.log, "ingest")
    try:
        source = open_source(settings.source, load_keys(settings.security.secret_key_file))
    except ServiceError as error:
        pipe.send_bytes(pack(Failed(error.code, str(error))))
        return 1
    ring = RingWriter(told.ring)
    if told.layout is not None:
        ring.lay(told.layout)
    gc.freeze()  # what was imported stays: frames should not wait while it is searched for garbage
    try:
        pipe.send_bytes(pack(Ready(source.address)))
        ingest = Ingest(source, ring, pipe, settings)
        if told.running is not None:
            ingest.go_on(told.running)
        logs.belongs_to(lambda: ingest.acquisition_id)
        ingest.run()
    except (MainProcessGone, BrokenPipeError):
        return 1
    finally:
        source.close()
        ring.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
