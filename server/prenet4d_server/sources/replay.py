"""A file played as if a detector sent it: for trying things out, and for correcting old scans."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from prenet4d_server.errors import CorrectedTwice, CorruptFrame, FileError, FrameError
from prenet4d_server.files import ScanFile, open_scan
from prenet4d_server.files.base import as_text
from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    Busy,
    Fault,
    Indices,
    Pixels,
    SourceEvent,
    idle,
)

_BLOCK_FRAMES = 256
_BLOCK_BYTES = 16 << 20


@dataclass(slots=True)
class FileBlock:
    """Some frames of a file, not read yet."""

    series: str
    indices: Indices
    scan: ScanFile
    packed: ClassVar[bool] = True

    def read_into(self, start: int, out: Pixels) -> Sequence[tuple[int, FrameError]]:
        """Read the frames ``start … start + len(out)`` of this block; see ``FrameBlock``."""
        try:
            self.scan.read_into(int(self.indices[start]), out)
        except FileError:
            return self._read_one_by_one(start, out)
        return ()

    def _read_one_by_one(self, start: int, out: Pixels) -> Sequence[tuple[int, FrameError]]:
        """Save what can be saved: one damaged frame must not cost its neighbors."""
        faults: list[tuple[int, FrameError]] = []
        for i in range(len(out)):
            try:
                self.scan.read_into(int(self.indices[start + i]), out[i : i + 1])
            except FileError as error:
                faults.append((start + i, CorruptFrame(str(error))))
        return faults


class ReplaySource:
    """Plays a file once or several times, then stays silent.

    Args:
        path: what :func:`prenet4d_server.files.open_scan` reads.
        rate: frames per second; ``None`` is as fast as they are taken.
        repeat: how many times; each is a new acquisition.
        dataset: which array of the file, where it holds several.
        scan_shape: ``(ny, nx)`` where the file does not know it.
        gain: counts per electron.

    Raises:
        FileError: the file cannot be read; the message says what to do.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rate: float | None = None,
        repeat: int = 1,
        dataset: str | None = None,
        scan_shape: tuple[int, int] | None = None,
        gain: float = 1.0,
    ) -> None:
        self.address = as_text(str(path))
        self._scan = open_scan(path, dataset=dataset, scan_shape=scan_shape)
        self._rate = rate
        self._repeat = repeat
        self._gain = gain
        frame_bytes = int(np.prod(self._scan.frame_shape)) * self._scan.dtype.itemsize
        self._most = max(1, min(_BLOCK_FRAMES, _BLOCK_BYTES // frame_bytes))
        self._run = 0
        """Acquisitions that have been begun."""
        self._next: int | None = None
        """The next frame's index; ``None`` between acquisitions."""
        self._begun = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last acquisition has ended."""
        return self._next is None and self._run == self._repeat

    def poll(self, timeout_s: float, busy: Busy = idle) -> Sequence[SourceEvent]:  # noqa: ARG002
        """Return what is due by now; wait at most ``timeout_s`` for the first of it."""
        if self.finished:
            time.sleep(timeout_s)
            return []
        if self._next is None:
            self._run += 1
            self._next = 0
            self._begun = time.monotonic()
            told = self._scan.warning if self._run == 1 else ""
            return [*([Fault(CorrectedTwice(told))] if told else []), self._start()]
        series = self._series()
        if self._next == self._scan.n_frames:
            self._next = None
            return [AcquisitionEnd(series)]
        due = self._due(timeout_s)
        if due <= self._next:
            return []
        stop = min(due, self._next + self._most)
        block = FileBlock(series, np.arange(self._next, stop, dtype=np.int64), self._scan)
        self._next = stop
        return [block]

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._scan.close()

    def __enter__(self) -> ReplaySource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _due(self, timeout_s: float) -> int:
        """How many frames of this acquisition are due, after waiting for one that is not yet."""
        n_frames = self._scan.n_frames
        if self._rate is None:
            return n_frames
        assert self._next is not None
        early = self._begun + (self._next + 1) / self._rate - time.monotonic()
        if early > 0:
            time.sleep(min(early, timeout_s))
        return int(min(n_frames, (time.monotonic() - self._begun) * self._rate))

    def _series(self) -> str:
        return f"{Path(self.address).name}-{self._run}"

    def _start(self) -> AcquisitionStart:
        scan = self._scan
        return AcquisitionStart(
            series=self._series(),
            frame_shape=scan.frame_shape,
            dtype=scan.dtype,
            scan_shape=scan.scan_shape,
            expected_frames=scan.n_frames,
            pixel_mask=scan.pixel_mask,
            saturation_value=scan.saturation_value,
            gain=self._gain,
            detector="file",
            metadata={**scan.metadata, "file": self.address},
        )
