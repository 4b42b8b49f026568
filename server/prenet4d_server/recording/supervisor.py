"""Recordings that the operator starts and stops: the service's end of the recorder process."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

from pydantic import ValidationError

from prenet4d_client.messages import Event
from prenet4d_server.config import LogSettings, RecordingSettings
from prenet4d_server.errors import CommandFailed
from prenet4d_server.ingest.notices import Level
from prenet4d_server.monitoring.status import RecordingState, RecordingStatus
from prenet4d_server.recording.process import Order, Report
from prenet4d_server.sockets import within_reach
from prenet4d_server.wording import counted, counted_of

ANSWER_S = 3.0
"""How long a command may go without an answer; after that its answer says how far it is."""
CLOSE_S = 20.0
_NAME = re.compile(r"\w[\w .+=-]*")
_NAME_BYTES = 120


class Recordings:
    """At most one recording at a time, made by a process of its own.

    Args:
        settings: where recordings go, and what is in them.
        lossless: the service's lossless address, as it is bound.
        server_key: the service's public CURVE key, where it has one.
        log: how the process writes its log.
        tell: takes events.
    """

    def __init__(
        self,
        settings: RecordingSettings,
        *,
        lossless: str,
        server_key: bytes | None,
        log: LogSettings,
        tell: Callable[[Event], None],
    ) -> None:
        self._settings = settings
        self._lossless = within_reach(lossless)
        self._server_key = server_key.decode() if server_key else None
        self._log = log
        self._tell = tell
        self._changed = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._name = ""
        self._started: float | None = None
        self._report: Report | None = None
        self._stopping = False
        self._begun: Future[None] = Future()
        self._ended: Future[None] = Future()
        if settings.directory is not None and not _writable(settings.directory):
            self._say(
                "warning",
                "no_recording_folder",
                f"{settings.directory} is no folder that the service may write to: nothing can be "
                "recorded until it is (recording.directory).",
            )

    @property
    def status(self) -> RecordingStatus | None:
        """How the recording stands; ``None`` where no directory is configured."""
        directory = self._settings.directory
        if directory is None:
            return None
        with self._changed:
            report = self._report or Report()
            return RecordingStatus(
                state=self._state(),
                directory=str(directory),
                free_bytes=_free(directory),
                name=self._name,
                files=report.files,
                patterns=report.patterns,
                absent=report.absent,
                started=self._started,
                complete=report.complete and not report.lost,
                reason=report.error or report.reason or report.lost,
            )

    @property
    def pid(self) -> int | None:
        """The recorder's process id, while it runs."""
        process = self._process
        return None if process is None else process.pid

    def start(self, name: str | None) -> Future[None]:
        """Start a recording; once it is done, nothing is missed any more.

        Where the process takes long to start, it counts as done before that, and the status says
        ``starting``. Where it does not start, a CommandFailed says why.

        Args:
            name: of the file, without a suffix; the time of day by default.

        Raises:
            CommandFailed: one is running already, the name is taken or is no plain file name, the
                disk is full, or nothing may be recorded.
        """
        name = time.strftime("%Y-%m-%d_%H%M%S") if name is None else name
        with self._changed:
            if self._process is not None:
                raise CommandFailed(f"{self._name} is being recorded already. Stop it first.")
            path = self._path(name)
            order = Order(
                path=path,
                lossless=self._lossless,
                server_key=self._server_key,
                content=("corrected", "aligned")
                if self._settings.content == "both"
                else (self._settings.content,),
                compression=self._settings.compression,
                keep_free=self._settings.keep_free,
                log=self._log,
            )
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prenet4d_server.recording.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,  # Ctrl-C is for the service, which drains first
            )
            self._name, self._started = path.stem, time.time()
            self._report, self._stopping = None, False
            self._begun, self._ended = Future(), Future()
            _write(self._process, order.model_dump_json())
            self._reader = threading.Thread(
                target=self._read, args=(self._process, path), name="recording", daemon=True
            )
            self._reader.start()
            return _patient(self._begun)

    def stop(self) -> Future[None]:
        """Stop the recording; once it is done, its files are closed, unless the disk is slow.

        Raises:
            CommandFailed: there is none.
        """
        with self._changed:
            if self._process is None:
                raise CommandFailed("Nothing is being recorded.")
            self._stopping = True
            _write(self._process, "stop")
            return _patient(self._ended)

    def close(self) -> None:
        """Wait for the end of the recording, which the service's farewell to receivers brings."""
        with self._changed:
            reader, process = self._reader, self._process
        if reader is None:
            return
        reader.join(CLOSE_S)
        if reader.is_alive() and process is not None:
            process.kill()
            reader.join()

    def _state(self) -> RecordingState:
        if self._process is None:
            return "idle"
        if self._stopping:
            return "stopping"
        return "starting" if self._report is None else "recording"

    def _path(self, name: str) -> Path:
        directory = self._settings.directory
        if directory is None:
            raise CommandFailed(
                "Recordings cannot be started here: set recording.directory in the configuration."
            )
        suffix = f".{self._settings.format}"
        stem = name.removesuffix(suffix)
        if not _NAME.fullmatch(stem) or len(stem.encode()) > _NAME_BYTES:
            raise CommandFailed(
                f"{name!r} cannot be the name of a recording: use letters, digits, spaces and "
                "_ . + = -, beginning with a letter or digit."
            )
        if not _writable(directory):
            raise CommandFailed(f"{directory} is no folder that the service may write to.")
        path = directory / f"{stem}{suffix}"
        if os.path.lexists(path):
            raise CommandFailed(f"There is a recording {path.name} already. Choose another name.")
        free = _free(directory)
        if free < self._settings.keep_free:
            raise CommandFailed(
                f"The disk of {directory} has only {_size(free)} left, and "
                f"{_size(self._settings.keep_free)} are kept free. Make room."
            )
        return path

    def _read(self, process: subprocess.Popen[str], path: Path) -> None:
        """Follow the process's reports to its end; on a thread of its own."""
        assert process.stdout is not None
        # It may have died with the last command unread, which closing its pipe would raise.
        with contextlib.suppress(OSError), process:
            for line in process.stdout:
                report = _parse(line)
                with self._changed:
                    first, self._report = self._report is None, report
                if first and not report.error:
                    _settle(self._begun)
                    self._say("info", "recording_started", f"Recording {path.name} began.")
        with self._changed:
            last = self._report or Report()
            if process.returncode and not last.error:
                died = _obituary(process.returncode, path, last)
                last = last.model_copy(update={"error": died, "complete": False})
            self._report, self._process = last, None
            begun, ended = self._begun, self._ended
        _settle(begun, last.error or "The recorder did not start; the log says why.")
        _settle(ended)
        if last.error:
            self._say("error", "recording_failed", f"Recording {path.name} failed: {last.error}")
        else:
            patterns = counted_of(last.patterns, last.absent, "pattern")
            what = f"{patterns} in {counted(len(last.files), 'file')}"
            why = "" if last.complete else f"; incomplete: {last.reason.removesuffix('.')}"
            lost = f" {last.lost}" if last.lost not in last.reason else ""
            self._say("info", "recording_stopped", f"Recording ended with {what}{why}.{lost}")

    def _say(self, level: Level, code: str, message: str) -> None:
        self._tell(Event(level=level, code=code, message=message))


def _patient(done: Future[None]) -> Future[None]:
    """The same, done after ``ANSWER_S`` at the latest."""
    patience = threading.Timer(ANSWER_S, _settle, [done])
    patience.daemon = True
    patience.start()
    done.add_done_callback(lambda _: patience.cancel())
    return done


def _settle(done: Future[None], failure: str = "") -> None:
    """It is done, or it failed, unless that was said before."""
    with contextlib.suppress(InvalidStateError):
        if failure:
            done.set_exception(CommandFailed(failure))
        else:
            done.set_result(None)


def _parse(line: str) -> Report:
    try:
        return Report.model_validate_json(line)
    except ValidationError:
        return Report(error=f"the recorder said {line.strip()[:200]!r}", complete=False)


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended; its status and its last report say why
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _obituary(status: int, path: Path, last: Report) -> str:
    """How the recorder died, and what it leaves."""
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    said = f"The recorder died {how}, and is not started again: what comes now is not recorded."
    if not last.files:
        return said
    name = last.files[-1]
    if path.suffix == ".h5":
        try:
            with path.with_name(name).open("rb") as file:
                head = file.read(12)
        except OSError as error:
            return f"{said} {name} cannot be read: {error.strerror}."
        # The superblock's last byte of these says whether somebody has the file open for writing.
        if head and not head[-1] & 1:
            return f"{said} {name} is closed and holds what came before."
        name += ", which opens as usual after h5clear -s (HDF5's tool, in hdf5-tools),"
    return f"{said} {name} holds what came until about a second before."


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _writable(directory: Path) -> bool:
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _free(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0
