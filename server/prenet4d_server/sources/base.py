"""What every detector is turned into: a start, blocks of frames, an end, and faults.

A *source* speaks one detector's protocol and knows nothing of rings, batches or corrections. It is
polled by the ingest loop and answers with the events below, in the order in which the detector
said them. Frames stay encoded: ``FrameBlock.read_into`` decodes them straight into the slots of the
ring, on as many threads as the ingest loop likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import FrameError, ServiceError

Indices: TypeAlias = npt.NDArray[np.int64]
Pixels: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class AcquisitionStart:
    """The detector announces an acquisition."""

    series: str
    """The detector's own name for it; its frames and its end carry the same."""
    frame_shape: tuple[int, int]
    """``(h, w)`` in pixels."""
    dtype: np.dtype[Any]
    """uint8, uint16, uint32 or float32, native byte order."""
    scan_shape: tuple[int, int] | None = None
    """``(ny, nx)``, where the detector knows it."""
    expected_frames: int | None = None
    """``None`` where the detector runs until it is stopped."""
    pixel_mask: npt.NDArray[np.bool_] | None = None
    """(h, w), ``True`` where a pixel can be trusted; ``None``: all can."""
    saturation_value: float | None = None
    gain: float = 1.0
    """Counts per electron."""
    detector: str = "unknown"
    acquisition_id: str | None = None
    """A name that no other acquisition has, where the sender gave one; ``None``: make one."""
    metadata: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


class FrameBlock(Protocol):
    """One or many encoded frames of one acquisition, as they came."""

    series: str
    """The acquisition they belong to, as its start named it."""
    indices: Indices
    """(n,) each frame's number within the acquisition, from 0."""

    @property
    def packed(self) -> bool:
        """Whether reading is work that is worth other threads, or but a copy, made at once."""
        ...

    def read_into(self, start: int, out: Pixels) -> Sequence[tuple[int, FrameError]]:
        """Decode the frames ``start … start + len(out)`` of this block into ``out``.

        Safe to call from several threads at once for different parts of the block. Bulk work
        should release the GIL.

        Args:
            start: the first frame to decode, counted within the block.
            out: (m, h, w) of the acquisition's dtype, C-contiguous; every pixel is overwritten,
                except those of frames that fail.

        Returns:
            The frames that cannot be decoded: ``(number within the block, why)``.
        """
        ...


@dataclass(frozen=True, slots=True)
class AcquisitionEnd:
    """The detector says that the acquisition is over."""

    series: str
    aborted: bool = False
    """The sender says that it ended early."""
    reason: str = ""
    """Why it was aborted, for people to read."""
    frames: int | None = None
    """How many the detector has sent, where it says so."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something is wrong with what came, or that nothing can come; ``frames`` count as rejected."""

    error: ServiceError
    frames: int = 0
    refuses_start: bool = False
    """An acquisition would have begun; a ``BadStart`` says so by itself."""
    series: str = ""
    """Of the start that is refused, where it can be read and is the acquisition's id as well."""


SourceEvent: TypeAlias = "AcquisitionStart | FrameBlock | AcquisitionEnd | Fault"


Busy: TypeAlias = Callable[[], bool]


def idle() -> bool:
    """Somebody waits for the events."""
    return False


class Source(Protocol):
    """A detector's protocol, polled by the ingest loop."""

    address: str
    """Where it listens or what it is connected to, for a person to read."""

    def poll(self, timeout_s: float, busy: Busy = idle) -> Sequence[SourceEvent]:
        """Return what came, in order; wait at most ``timeout_s`` for the first of it.

        Returns as soon as anything is there, and takes along what is already waiting (bounded, so
        that a block stays small enough to be decoded at once). While ``busy`` says that nobody
        would look at it yet, it may go on gathering within that bound: fewer, larger blocks. Never
        raises for what a detector sends: that becomes a :class:`Fault`.
        """
        ...

    def close(self) -> None:
        """Give back sockets and files; may be called twice."""
        ...
