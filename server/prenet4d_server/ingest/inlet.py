"""The inlet: the main process's end of the ingest process.

It starts the process, reads the ring's counter and the notices, and notices when the process dies:
what it had committed is kept, and a new process goes on in the same ring with the acquisition that
was running.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

from prenet4d_server import errors
from prenet4d_server.config import Settings
from prenet4d_server.errors import IngestDied, ServiceError
from prenet4d_server.ingest.introduction import Introduction
from prenet4d_server.ingest.notices import (
    Details,
    Ended,
    Failed,
    Notice,
    Ready,
    Remark,
    Started,
    unpack,
)
from prenet4d_server.ingest.ring import Layout, RingReader, wait_readable
from prenet4d_server.restarts import Pauses

START_TIMEOUT_S = 180.0
"""On a slow machine, the first start of all compiles for longer than anything else takes."""
RESTART_PAUSE_S = 0.5
"""A detector may be sending: frames wait in its own memory meanwhile."""


class Inlet:
    """The ingest process, its ring and what it says."""

    def __init__(self, settings: Settings, on_remark: Callable[[Remark], None]) -> None:
        """Make the ring; :meth:`open` starts the process.

        Args:
            settings: the service's.
            on_remark: called, from within :meth:`update`, with what applies at once.

        Raises:
            ServiceError: there is not enough memory for the ring.
        """
        self._settings = settings
        self._on_remark = on_remark
        self.ring = RingReader(settings.ring.size)
        self.marks: deque[Started | Ended] = deque()
        """Starts and ends not yet reached, in order of their positions."""
        self.address = settings.source.endpoint
        """Where the source listens, or what it is connected to."""
        self.ready = False
        """The source is open."""
        self.restarts = 0
        self.stopped = False
        """The process has ended and will not be started again."""
        self._opened = False
        self._stopping = False
        self._failure: Failed | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._started_at = 0.0
        self._restart_at = 0.0
        """When the process that died is started again."""
        self._pauses = Pauses(RESTART_PAUSE_S)
        self._running: Started | None = None
        """The acquisition that the process has last begun and not ended."""
        self._layout: Layout | None = None
        """How the process divides the ring; those who read it may not have come to that yet."""

    @property
    def pid(self) -> int | None:
        """The process's id, while it lives; for any thread."""
        process = self._process
        return None if process is None else process.pid

    def open(self) -> None:
        """Start the process and wait until its source is open.

        Raises:
            BindError, FileError, …: the source cannot be opened.
            IngestDied: the process died before it said so.
            ServiceError: it has not said so in ``START_TIMEOUT_S``.
        """
        self._start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready:
            if self._pipe is None:
                raise IngestDied("The ingest process died at its start; its log says why.")
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The ingest process is not ready after {START_TIMEOUT_S:g} s, and was ended: "
                    "start the service again when this machine and its disks are less busy."
                )
            wait_readable(self.descriptors, 0.5)
            self._read()
            if self._failure is not None:
                raise _error_of(self._failure)
        self._opened = True

    @property
    def descriptors(self) -> list[int]:
        """Readable when :meth:`update` has something to find."""
        pipe = [] if self._pipe is None else [self._pipe.fileno()]
        return [self.ring.committed_fd, *pipe]

    def update(self) -> None:
        """Look what came: the ring's counter first, so that every mark before it is known."""
        self.ring.update()
        self._read()
        restart_due = time.monotonic() >= self._restart_at
        if self._process is None and not self.stopped and restart_due:
            self.restarts += 1
            self._start()

    def stop(self) -> None:
        """Ask the process to finish what it has in hand and to end."""
        self._stopping = True
        if self._pipe is None:
            self._give_up("the service was stopped")
            return
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(b"stop")

    def kill(self) -> None:
        """End the process, whatever it does; what it has committed and said stays to be taken."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()
        while self._pipe is not None:
            wait_readable(self.descriptors, 0.5)
            self._read()
        self._give_up("the service was stopped")

    def close(self) -> None:
        """End the process and give the ring back."""
        self.kill()
        self.ring.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        handle = self.ring.handle()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prenet4d_server.ingest.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), handle.memory, handle.committed, handle.freed),
                process_group=0,  # Ctrl-C is for the main process, which then says stop
            )
        self._started_at = time.monotonic()
        self.ready = False
        self._failure = None
        self._pipe = Connection(ours.detach())
        told = Introduction(self._settings, handle, self._layout, self._running)
        with contextlib.suppress(OSError):  # it died at once: the pipe will say so
            self._pipe.send_bytes(told.pack())

    def _keep_address(self) -> None:
        """Have a process that is started again listen where the first one did."""
        if self._settings.source.kind == "native":  # the others' address is not ours to choose
            source = self._settings.source.model_copy(update={"address": self.address})
            self._settings = self._settings.model_copy(update={"source": source})

    def _read(self) -> None:
        while self._pipe is not None:
            try:
                if not self._pipe.poll():
                    return
                notice = unpack(self._pipe.recv_bytes())
            except (EOFError, OSError):
                self._gone()
                return
            self._take(notice)

    def _take(self, notice: Notice) -> None:
        match notice:
            case Ready():
                self.address = notice.address
                self.ready = True
                self._keep_address()
            case Failed():
                self._failure = notice
            case Started():
                self._running, self._layout = notice, notice.layout
                self.marks.append(notice)
            case Ended():
                self._running = None
                self.marks.append(notice)
            case Remark():
                self._on_remark(notice)

    def _gone(self) -> None:
        """The pipe closed: the process ended, as it was asked to or not."""
        assert self._pipe is not None
        self._pipe.close()
        self._pipe = None
        code = self._reap()
        self.ready = False
        self.ring.update()
        died = self._opened and not self._stopping
        now = time.monotonic()
        pause_s = self._pauses.after(now - self._started_at)
        self._restart_at = now + pause_s
        soon = f" in {pause_s:.0f} s" if pause_s > 1 else ""
        if not died or not self._settings.ring.restart_ingest:
            what_now = "it is not started again"
            self._give_up(
                "the service was stopped" if self._stopping else "the ingest process died"
            )
        elif self._running is None:
            what_now = f"it is started again{soon}"
        else:
            what_now = f"it is started again{soon}, and the acquisition goes on"
        if died:
            why = self._failure.message if self._failure else f"exit status {code}"
            message = f"The ingest process died ({why}). Frames in its hands are lost; {what_now}."
            details: Details = {"exit_status": code}
            self._on_remark(Remark("error", IngestDied.code, message, details=details))

    def _give_up(self, reason: str) -> None:
        """No process will come any more: what runs ends here."""
        self.stopped = True
        if self._running is not None:
            ended = Ended(self.ring.committed, self._running.acquisition_id, True, reason)
            self.marks.append(ended)
            self._running = None

    def _reap(self) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        try:
            return process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _error_of(failure: Failed) -> ServiceError:
    """The named error again that the other process met."""
    found = [kind for kind in vars(errors).values() if getattr(kind, "code", "") == failure.code]
    kind: type[ServiceError] = found[0] if found else ServiceError
    return kind(failure.message)
