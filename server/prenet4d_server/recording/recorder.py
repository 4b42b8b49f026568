"""The recorder: a lossless receiver's messages into files, one for each acquisition."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from prenet4d_client.errors import ConnectionRefused, NoAnswer, Prenet4dError, ProtocolError
from prenet4d_client.lossless import LosslessReceiver
from prenet4d_client.messages import (
    AcquisitionEnd,
    AcquisitionStart,
    Aligned,
    Corrected,
    Counters,
    Event,
    Telemetry,
)
from prenet4d_client.wire import Message
from prenet4d_server.errors import FileError
from prenet4d_server.recording.file import HDF5, ZARR, Recording, check_kind
from prenet4d_server.recording.layout import Acquisition, Compression, Fill
from prenet4d_server.recording.room import NEEDED_BYTES, reserve, want_of_room
from prenet4d_server.wording import counted

__all__ = ["STOPPED", "Recorder", "Summary", "record"]

_log = logging.getLogger(__name__)
STOPPED = "it was stopped before the acquisition's end"
"""The reason where nothing but the user's stop made a recording incomplete."""
_FLUSH_S = 1.0
_STOP_LOOK_S = 0.1
KEEP_FREE_BYTES = 256 << 20
"""So much of the disk is left free unless told."""
_broken: list[Recording] = []
"""What could not be closed, and is never let go of: that would bring the process down with HDF5."""


@dataclass(slots=True)
class Summary:
    """What has been recorded so far."""

    files: list[Path] = field(default_factory=list)
    """In the order in which they were begun."""
    finished: int = 0
    """Files that are closed."""
    patterns: int = 0
    """Probe positions that have a pattern, over all files."""
    absent: int = 0
    """Patterns that the closed files' acquisitions announced, and that are not in them."""
    refused: int = 0
    """Patterns and telemetry with no place: outside the scan, of another shape, too late."""
    missed: int = 0
    """Messages that the service sent and that did not come, or could not be read."""
    complete: bool = True
    """Whether every acquisition is in its file to its regular end, early or not."""
    reason: str = ""
    """The first thing that made it incomplete."""
    lost: str = ""
    """Why the service was lost, where that ended the recording."""


class Recorder:
    """Writes what a :class:`LosslessReceiver` delivers; used as a context manager.

    One file for each acquisition: a Zarr store where its name ends in ``.zarr``, else HDF5
    (``hdf5`` and ``zarr`` beside this module show what is where). ``path`` names the first; the
    next ones get ``_002``, ``_003``, … before their suffix. A ``{n}`` in its name, as in
    ``scan_{n:03d}.h5``, numbers all of them, from 0 and past those that exist. Nothing is
    overwritten unless asked for. While a file is being written, other programs read it, HDF5 with
    ``h5py.File(path, swmr=True)``; they see everything up to the last second.

    Args:
        path: the file, or the pattern of the files' names.
        overwrite: replace existing files.
        content: which patterns: ``corrected`` (denoised), ``aligned`` (raw counts) or both.
        compression: ``bslz4`` needs the package hdf5plugin where HDF5 is read (py4DSTEM brings it
            along, HyperSpy and LiberTEM use it where it is installed), and nothing more where Zarr
            is; ``gzip`` opens everywhere and is slow; ``none`` is fastest.
        fill: what pixels without a source become: ``zero``, beside which the dataset ``coverage``
            tells where that is so, or ``nan``.
        keep_free: stop recording when the disk has fewer bytes than this left.

    Raises:
        FileError: the file exists, or cannot be made there, or the disk has no room for it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        content: tuple[str, ...] = ("corrected",),
        compression: Compression = "bslz4",
        fill: Fill = "zero",
        keep_free: int = KEEP_FREE_BYTES,
    ) -> None:
        if not content or not set(content) <= {"corrected", "aligned"}:
            raise FileError(f"Patterns are corrected or aligned; {content} were asked for.")
        self.summary = Summary()
        self.topics = ("acquisition_start", "acquisition_end", "telemetry", "event", *content)
        """What to ask a :class:`LosslessReceiver` for."""
        self._path = Path(path)
        self._overwrite = overwrite
        self._content = content
        self._compression = compression
        self._fill = fill
        self._keep_free = max(keep_free, NEEDED_BYTES)
        self._number = 0
        self._recording: Recording | None = None
        self._reserve: IO[bytes] | None = None
        self._unclosed = ""
        self._finished: set[str] = set()
        self._flushed = time.monotonic()
        self._check_place()
        self._check_space(NEEDED_BYTES)

    @property
    def acquisition_id(self) -> str:
        """Of the acquisition that is being recorded; empty between acquisitions."""
        return self._recording.acquisition.id if self._recording is not None else ""

    def write(self, message: Message) -> None:
        """Record one message.

        Raises:
            FileError: the disk is full or fails. The file is closed, as far as the disk lets it be,
                with all patterns that were written before.
        """
        try:
            self._write(message)
            if time.monotonic() - self._flushed >= _FLUSH_S:
                self.flush()
        except (OSError, RuntimeError) as error:  # the latter is h5py's where it flushes
            reason = f"{self._path.parent} cannot be written to: {_why(error)}"
            self.close(reason)
            raise FileError(f"{reason}. {self._what_is_there()}") from error

    def flush(self) -> None:
        """Let readers of the file see everything up to here; ``write`` does it every second."""
        self._flushed = time.monotonic()
        if self._recording is not None:
            self._check_space(0)
            self._recording.flush()

    def close(self, reason: str = STOPPED) -> None:
        """Close the file that is being written, if one is, as incomplete; may be called twice."""
        self._finish(complete=False, reason=reason)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, message: Message) -> None:
        header, arrays = message.header, message.arrays
        if message.gap:
            self.summary.missed += message.gap
            self._tell_incomplete(f"{counted(message.gap, 'message')} missed")
        if isinstance(header, Event):
            if self._recording is not None:
                self._recording.write_event(header)
            return
        if isinstance(header, AcquisitionStart):
            self._finished.discard(header.acquisition_id)  # a sender may use a name again
            self._begin(
                Acquisition(
                    header.acquisition_id,
                    header.frame_shape,
                    header.scan_shape,
                    header,
                    arrays.get("pixel_mask"),
                )
            )
        elif header.acquisition_id in self._finished:
            self.summary.refused += len(arrays.get("indices", ()))
        elif isinstance(header, Telemetry):
            recording = self._recording_of(header, header.frame_shape)
            recording.write_telemetry(header, arrays)
        elif isinstance(header, Corrected | Aligned) and header.type in self._content:
            patterns = arrays["patterns"]
            h, w = patterns.shape[1:]
            recording = self._recording_of(header, (h, w))
            self._check_space(patterns.nbytes)
            self.summary.patterns += recording.write_patterns(
                header.type, arrays["indices"], patterns
            )
        elif isinstance(header, AcquisitionEnd) and self._is_current(header.acquisition_id):
            reason = self._lacks(header)
            if header.aborted:  # "stopped by the user" means the sender's, not the recorder's
                reason = f"the acquisition was aborted{header.reason and f': {header.reason}'}"
            self._finish(complete=not reason, reason=reason, counters=header.counters)

    def _lacks(self, end: AcquisitionEnd) -> str:
        assert self._recording is not None
        have = self._recording.patterns
        if end.counters is None or end.counters.corrected <= have:
            return ""
        return (
            f"{end.counters.corrected - have} of its {end.counters.corrected} patterns are not here"
        )

    # --- files ---------------------------------------------------------------------------------

    def _recording_of(
        self, header: Telemetry | Corrected | Aligned, frame_shape: tuple[int, int]
    ) -> Recording:
        if not self._is_current(header.acquisition_id):
            # Registered after its start: what the message says of it has to do.
            self._begin(Acquisition(header.acquisition_id, frame_shape, header.scan_shape))
        assert self._recording is not None
        return self._recording

    def _is_current(self, acquisition_id: str) -> bool:
        return self._recording is not None and self._recording.acquisition.id == acquisition_id

    def _begin(self, acquisition: Acquisition) -> None:
        if self._is_current(acquisition.id):
            return
        self._finish(complete=False, reason="another acquisition began before its end")
        self._check_space(NEEDED_BYTES)
        self._reserve = self._reserve or reserve(self._path.parent)
        path = self._next_path()
        self._recording = Recording(
            path,
            acquisition,
            content=self._content,
            compression=self._compression,
            fill=self._fill,
            overwrite=self._overwrite,
        )
        self.summary.files.append(path)

    def _finish(self, *, complete: bool, reason: str, counters: Counters | None = None) -> None:
        recording, self._recording = self._recording, None
        if recording is None:
            return
        self._finished.add(recording.acquisition.id)
        self.summary.finished += 1
        self.summary.absent += recording.absent
        self.summary.refused += recording.refused
        self._release()  # the room is for this; where another file follows, it is held anew
        try:
            recording.close(complete=complete, reason=reason, counters=counters)
        except (OSError, RuntimeError) as error:  # the latter is h5py's where an object is let go
            _broken.append(recording)
            self._unclosed = f"{recording.path} could not be closed properly: {_why(error)}"
            self._tell_incomplete(self._unclosed)
            _log.error("%s", self._unclosed)
        if not complete:
            self._tell_incomplete(reason)

    def _release(self) -> None:
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None

    def _tell_incomplete(self, reason: str) -> None:
        self.summary.complete = False
        self.summary.reason = self.summary.reason or reason

    def _check_place(self) -> None:
        try:
            numbered = self._name(0) != self._name(1)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise FileError(
                f"{self._path.name!r} is no pattern for file names ({error}). "
                "Write the number as {n} or {n:03d}."
            ) from None
        if self._path.suffix not in (ZARR, *HDF5):
            raise FileError(
                f"{self._path.name!r} is no name for a recording: let it end in .h5, or in .zarr "
                "for a Zarr store."
            )
        if not self._path.parent.is_dir():
            raise FileError(f"There is no folder {self._path.parent}. Make it first.")
        check_kind(self._path)
        try:
            tempfile.TemporaryFile(dir=self._path.parent).close()
        except OSError as error:
            raise FileError(
                f"{self._path.parent} cannot be written to: {error.strerror or error}. "
                "Record to another folder, or see to it that this one can be."
            ) from None
        if self._path.suffix == ZARR:
            if self._path.exists() and not (self._path / "zarr.json").is_file():
                raise FileError(f"{self._path} exists and is no Zarr store. Choose another name.")
        elif self._path.is_dir():
            raise FileError(f"{self._path} is a folder. Name a file in it.")
        if not numbered and self._path.exists() and not self._overwrite:
            raise FileError(
                f"{self._path} exists. Choose another name, put {{n}} in it to number the files, "
                "or ask for it to be overwritten."
            )

    def _name(self, n: int) -> Path:
        return self._path.with_name(self._path.name.format(n=n))

    def _next_path(self) -> Path:
        numbered = self._name(0) != self._name(1)
        while True:
            n, self._number = self._number, self._number + 1
            path = self._name(n)
            if not numbered and n:
                path = path.with_stem(f"{path.stem}_{n + 1:03d}")
            if self._overwrite or not path.exists():
                return path

    def _check_space(self, more: int) -> None:
        file = self._recording.path if self._recording is not None else None
        want = want_of_room(self._path.parent, file, more, self._keep_free)
        if want is not None:
            self.close(want.reason)
            raise FileError(
                f"Recording was stopped: {want.reason}, and {want.kept}. {self._what_is_there()} "
                f"{want.remedy}"
            )

    def _what_is_there(self) -> str:
        if not self.summary.files:
            return "Nothing was recorded."
        last = self.summary.files[-1]
        if not last.exists():
            return f"{last} is gone, with what came before."
        if self._unclosed:
            return f"{last} could not be closed, and may lack what came last."
        return f"{last} is closed and holds what came before."


def _why(error: OSError | RuntimeError) -> str:
    """What the system says of it, out of all that HDF5 makes of that."""
    text = getattr(error, "strerror", None) or str(error)
    told = re.search("error message = '(.+?)'", text)
    return told[1] if told else text


def record(
    receiver: LosslessReceiver,
    recorder: Recorder,
    stop: threading.Event,
    *,
    on_progress: Callable[[Summary], None] | None = None,
    acquisitions: int | None = None,
) -> Summary:
    """Record until told to stop, until enough was recorded, or until the service is gone.

    Args:
        receiver: subscribed to ``recorder.topics``; it is closed when ``stop`` is set.
        recorder: where to; the file it is writing is closed in the end.
        stop: set it (from a signal handler, say) to end within a tenth of a second.
        on_progress: called after every message.
        acquisitions: end after so many.

    Returns:
        What was recorded. Where the service went away, ``lost`` says so; that makes it incomplete
        only in the middle of an acquisition.

    Raises:
        FileError: the disk is full or fails.
    """
    done = threading.Event()

    def close_when_stopped() -> None:
        while not done.is_set():
            if stop.wait(_STOP_LOOK_S):
                receiver.close()
                return

    watcher = threading.Thread(target=close_when_stopped, name="stop recording", daemon=True)
    watcher.start()
    summary = recorder.summary
    try:
        while acquisitions is None or summary.finished < acquisitions:
            try:
                recorder.write(receiver.receive())
            except ProtocolError as error:
                summary.missed += 1
                _log.warning("A message could not be read: %s", error)
            except (NoAnswer, ConnectionRefused) as error:
                recorder.close(f"the connection was lost: {error}")
                summary.lost = str(error)
                break
            except Prenet4dError:
                if not stop.is_set():
                    raise
                break
            if on_progress is not None:
                on_progress(summary)
    finally:
        done.set()
        watcher.join()
        recorder.close()
    return summary
