"""The intake: what every detector's events must go through before they become frames in the ring.

It knows which acquisition is running and which of its frames have come, and refuses what cannot be:
frames of no acquisition, indices outside the scan or seen before, ends without a start. It touches
no pixels and no sockets.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_client.errors import ProtocolError
from prenet4d_client.wire import check_metadata
from prenet4d_server.config import MAX_FRAMES
from prenet4d_server.errors import (
    BadMessage,
    BadStart,
    DuplicateFrame,
    FrameError,
    IndexOutsideScan,
    ScanMismatch,
    SequenceError,
    ServiceError,
    SourceError,
    UnknownAcquisition,
)
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Indices

_REMEMBERED = 16
"""So many series that are over, and so many that were refused, are known by name, to say so of
frames that come."""

Refusal: TypeAlias = tuple[FrameError, int]
"""What is wrong, and how many frames are refused for it."""


@dataclass(slots=True)
class Acquisition:
    """The acquisition that is running."""

    id: str
    """Unique in time and among services: the sender's, or ours."""
    start: AcquisitionStart
    limit: int
    """Indices must be below this."""
    seen: npt.NDArray[np.bool_]
    """Which frames have come; the memory is touched only where they have."""
    came: int = 0
    """How many frames have come."""

    @property
    def complete(self) -> bool:
        """Whether every frame that was expected has come."""
        return self.came == self.start.expected_frames


@dataclass(frozen=True, slots=True)
class Closed:
    """An acquisition that is over."""

    id: str
    aborted: bool
    reason: str = ""
    sent: int | None = None
    """Frames, where the detector says how many it has sent."""


class Intake:
    """The state machine that all detectors share: no acquisition, or one that is running."""

    def __init__(self, scan_shape: tuple[int, int] | None = None) -> None:
        """Begin with no acquisition.

        Args:
            scan_shape: for acquisitions whose detector does not know its scan.
        """
        self.running: Acquisition | None = None
        self._scan_shape = scan_shape
        self._over: deque[str] = deque(maxlen=_REMEMBERED)
        self._refused: dict[str, str] = {}
        """Series → why its start was refused, the last one last; no name: of the last start."""

    def start(self, start: AcquisitionStart) -> tuple[Closed | None, list[SourceError]]:
        """Begin an acquisition, which ends the one that still runs.

        Returns:
            The acquisition that ended by it, and what is to be told.

        Raises:
            BadStart: its frames could not be numbered; nothing changed.
            SequenceError: the running acquisition was announced once more; nothing changed.
        """
        scan_shape = start.scan_shape or self._scan_shape
        limit = _limit(scan_shape, start.expected_frames)
        if limit > MAX_FRAMES:
            raise BadStart(
                f"Series {start.series} announces {limit} frames; at most {MAX_FRAMES} can be "
                "numbered. Check the scan shape."
            )
        told: list[SourceError] = []
        closed: Closed | None = None
        if (old := self.running) is not None:
            if start.series == old.start.series and not old.came:
                raise SequenceError(
                    f"Series {start.series} was started twice before its first frame; "
                    "the second start was ignored."
                )
            if old.complete:
                closed = self._close(aborted=False)
                why = f"Series {old.start.series} was complete, but its end never came."
            else:
                closed = self._close(
                    aborted=True,
                    reason=f"series {start.series} began, from a detector that was restarted or "
                    "from a second one",
                )
                why = (
                    f"Series {start.series} started while series {old.start.series} was running, "
                    "which is given up."
                )
            told.append(SequenceError(why))
        if start.expected_frames and scan_shape and start.expected_frames != limit:
            follows = (
                "frames beyond it are refused"
                if start.expected_frames > limit
                else "the rest of the scan stays empty"
            )
            told.append(
                ScanMismatch(
                    f"Series {start.series} announces {start.expected_frames} frames for a "
                    f"scan of {scan_shape[0]} × {scan_shape[1]} = {limit}. The scan shape "
                    f"counts: {follows}. If that is not meant, give the scan shape that the "
                    "microscope scans (--scan, source.scan_shape)."
                )
            )
        try:
            check_metadata(start.metadata)
        except ProtocolError as error:
            told.append(BadMessage(f"The metadata of series {start.series} are left out. {error}"))
            start = replace(start, metadata={})
        for series in (start.series, ""):
            self._refused.pop(series, None)
        expected = start.expected_frames if scan_shape is None else limit
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.running = Acquisition(
            id=start.acquisition_id or f"{stamp}-{secrets.token_hex(4)}",
            start=replace(start, scan_shape=scan_shape, expected_frames=expected),
            limit=limit,
            seen=np.zeros(limit, np.bool_),
        )
        return closed, told

    def go_on(self, acquisition_id: str, start: AcquisitionStart, came: int) -> None:
        """Take over an acquisition that another intake began, which is not there to be asked.

        Which frames have come is not known: one of them that came again would not be noticed.

        Args:
            acquisition_id: the name it was given.
            start: as it was begun, scan shape and expected frames included.
            came: how many of its frames have come.
        """
        limit = _limit(start.scan_shape, start.expected_frames)
        self.running = Acquisition(acquisition_id, start, limit, np.zeros(limit, np.bool_), came)

    def end(self, end: AcquisitionEnd) -> Closed:
        """End the running acquisition.

        Raises:
            SequenceError: it is not the one that runs; nothing changed.
        """
        if self.running is None or self.running.start.series != end.series:
            raise SequenceError(f"Series {end.series} ended, but {self._not_running(end.series)}.")
        return self._close(aborted=end.aborted, reason=end.reason, sent=end.frames)

    def abort(self, reason: str) -> Closed | None:
        """Give up the running acquisition, if there is one."""
        return None if self.running is None else self._close(aborted=True, reason=reason)

    def refuse(self, why: ServiceError, series: str = "") -> None:
        """Note that a start was refused, to say so of the frames that follow it.

        Args:
            why: what is wrong with it.
            series: of what; empty where that could not be read.
        """
        self._refused.pop(series, None)
        self._refused[series] = str(why).removesuffix(".")
        if len(self._refused) > _REMEMBERED:
            del self._refused[next(iter(self._refused))]

    def admit(self, series: str, indices: Indices) -> tuple[npt.NDArray[np.intp], list[Refusal]]:
        """Check a block of frames against the running acquisition, and note that they have come.

        Args:
            series: the acquisition they belong to.
            indices: (n,) each frame's number within it.

        Returns:
            Which of them are good, as numbers within the block in ascending order, and the
            refusals for the others.
        """
        now = self.running
        if now is None or now.start.series != series:
            error = UnknownAcquisition(
                f"Frames of series {series} came, but {self._not_running(series)}."
            )
            return np.empty(0, np.intp), [(error, len(indices))]
        refusals: list[Refusal] = []
        good = np.arange(len(indices))
        inside = (indices >= 0) & (indices < now.limit)
        if not inside.all():
            first = int(indices[~inside][0])
            error_outside = IndexOutsideScan(
                f"Frame {first} of series {series} lies outside 0 … {now.limit - 1}."
            )
            refusals.append((error_outside, int((~inside).sum())))
            good = good[inside]
        wanted = indices[good]
        new = ~now.seen[wanted]
        if len(wanted) > 1 and not (np.diff(wanted) > 0).all():
            first_of_each = np.zeros(len(wanted), np.bool_)
            first_of_each[np.unique(wanted, return_index=True)[1]] = True
            new &= first_of_each
        if not new.all():
            error_duplicate = DuplicateFrame(
                f"Frame {int(wanted[~new][0])} of series {series} came before."
            )
            refusals.append((error_duplicate, int((~new).sum())))
            good, wanted = good[new], wanted[new]
        now.seen[wanted] = True
        now.came += len(wanted)
        return good, refusals

    def forget(self, indices: Indices) -> None:
        """Frames that were admitted turned out unusable: let them come again."""
        if self.running is not None:
            self.running.seen[indices] = False
            self.running.came -= len(indices)

    def _close(self, *, aborted: bool, reason: str = "", sent: int | None = None) -> Closed:
        assert self.running is not None
        closed = Closed(self.running.id, aborted, reason, sent)
        self._over.append(self.running.start.series)
        self.running = None
        return closed

    def _not_running(self, series: str) -> str:
        if series in self._refused:
            return f"its start was refused: {self._refused[series]}"
        if series in self._over:
            return "that series is over"
        if "" in self._refused:
            return f"the last start was refused: {self._refused['']}"
        if self.running is not None:
            return f"series {self.running.start.series} is running"
        return (
            "its start never came, as happens where the service is started in mid-scan: "
            "start the scan anew"
        )


def _limit(scan_shape: tuple[int, int] | None, expected_frames: int | None) -> int:
    """How many frames an acquisition can have."""
    return prod(scan_shape) if scan_shape else expected_frames or MAX_FRAMES
