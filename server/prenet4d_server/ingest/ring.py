"""The ring: the one place where frames wait, shared between the ingest and the main process.

One block of anonymous shared memory (a memfd) and two eventfds, handed to the ingest process as
open file descriptors. There is no name to leak and no lock to hang on: the kernel frees the memory
with the last process that has it, however it died.

Frames are numbered by *position*, from 0 over the ring's life. The writer claims free slots, fills
them and commits them: an eventfd adds up how many were committed since the reader last looked. The
reader releases slots in order, told the other way by the second eventfd. Both are counting
semaphores that can be waited for with poll(2), and since the counts pass through the kernel, the
memory they speak of is visible to who reads them, on every processor.

For each acquisition the memory is laid out as ``slots`` × (frame, index, arrival time). The layout
changes only while the ring is empty, and only if the frame's size does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_server import memory
from prenet4d_server.errors import ServiceError

Pixels: TypeAlias = npt.NDArray[Any]
MINIMUM_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How the memory is divided: which slots there are, and which position slot 0 holds."""

    frame_shape: tuple[int, int]
    dtype: np.dtype[Any]
    slots: int
    base: int
    """The position that slot 0 held when the ring was laid out this way."""

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return self.frame_shape[0] * self.frame_shape[1] * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Slots:
    """Neighbouring slots, as views into the shared memory."""

    frames: Pixels
    """(n, h, w)"""
    indices: npt.NDArray[np.int64]
    """(n,) each frame's number within the acquisition."""
    arrived: npt.NDArray[np.float64]
    """(n,) when each frame arrived, on the clock of ``time.monotonic``, common to all processes."""


@dataclass(frozen=True, slots=True)
class RingHandle:
    """What the other process needs to join a ring; the descriptors must have been inherited."""

    memory: int
    size: int
    committed: int
    freed: int
    head: int
    """The position that is committed next."""
    tail: int
    """The oldest position not released."""


class _Ring:
    """The memory and its two counters, seen from either side."""

    def __init__(self, handle: RingHandle) -> None:
        # All pages at once: a fault on the first touch of each costs more than a frame's copy.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory = mmap.mmap(handle.memory, handle.size, flags=flags)
        self._handle = handle
        self._layout: Layout | None = None
        self._frames: Pixels = np.empty(0)
        self._indices: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._arrived: npt.NDArray[np.float64] = np.empty(0, np.float64)

    @property
    def layout(self) -> Layout | None:
        """How the memory is divided now; ``None`` before the first acquisition."""
        return self._layout

    def lay(self, layout: Layout) -> None:
        """Divide the memory; both sides do it at the same position."""
        slots, (h, w) = layout.slots, layout.frame_shape
        self._layout = layout
        self._indices = np.ndarray(slots, np.int64, self._memory)
        self._arrived = np.ndarray(slots, np.float64, self._memory, offset=8 * slots)
        self._frames = np.ndarray((slots, h, w), layout.dtype, self._memory, offset=16 * slots)

    def _view(self, position: int, n: int) -> Slots:
        """Up to ``n`` slots from ``position`` on, fewer where the ring's end comes first."""
        assert self._layout is not None
        first = (position - self._layout.base) % self._layout.slots
        part = slice(first, min(first + n, self._layout.slots))
        return Slots(self._frames[part], self._indices[part], self._arrived[part])

    def _unmap(self) -> None:
        self._frames, self._indices, self._arrived = np.empty(0), np.empty(0, np.int64), np.empty(0)
        # Views still in someone's hands keep the mapping alive until they are gone.
        with contextlib.suppress(BufferError):
            self._memory.close()


class RingWriter(_Ring):
    """The ingest process's side."""

    def __init__(self, handle: RingHandle) -> None:
        super().__init__(handle)
        self.position = handle.head
        """The position that is committed next."""
        self._freed = handle.tail

    @property
    def freed_fd(self) -> int:
        """Readable when slots became free."""
        return self._handle.freed

    def fit(self, frame_shape: tuple[int, int], dtype: np.dtype[Any]) -> Layout | None:
        """The layout for frames of this kind; ``None`` if the memory is too small for it.

        It differs from the present layout in ``slots`` or ``base`` only if the ring must be empty
        before it can be used.
        """
        frame_bytes = frame_shape[0] * frame_shape[1] * dtype.itemsize
        slots = self._handle.size // (frame_bytes + 16)
        if slots < MINIMUM_SLOTS:
            return None
        now = self._layout
        base = now.base if now and now.frame_bytes == frame_bytes else self.position
        return Layout(frame_shape, dtype, slots, base)

    def empty(self) -> bool:
        """Whether everything committed has been released."""
        self._freed += _take(self._handle.freed)
        return self._freed == self.position

    def free(self) -> int:
        """How many slots can be claimed."""
        assert self._layout is not None
        self._freed += _take(self._handle.freed)
        return self._layout.slots - (self.position - self._freed)

    def claim(self, n: int) -> Slots:
        """Up to ``n`` free slots to write to, fewer at the ring's end; at most ``free()``."""
        return self._view(self.position, n)

    def commit(self, n: int) -> None:
        """Hand the first ``n`` claimed slots to the reader."""
        if n:
            self.position += n
            os.eventfd_write(self._handle.committed, n)

    def close(self) -> None:
        """Let go of the memory."""
        self._unmap()


class RingReader(_Ring):
    """The main process's side, which makes the ring and owns it."""

    def __init__(self, size: int) -> None:
        """Make a ring of ``size`` bytes.

        Raises:
            ServiceError: this machine has not so much memory free.
        """
        self.committed = 0
        """Positions below this one are committed."""
        self._released = 0
        file = os.memfd_create("prenet4d-ring", os.MFD_CLOEXEC)
        try:
            _check_memory(size)
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            os.close(file)
            raise ServiceError(
                f"The ring of {size >> 20} MiB cannot be allocated: {error.strerror}. "
                "Make ring.size smaller."
            ) from None
        except ServiceError:
            os.close(file)
            raise
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        committed, freed = os.eventfd(0, flags), os.eventfd(0, flags)
        super().__init__(RingHandle(file, size, committed, freed, 0, 0))

    @property
    def committed_fd(self) -> int:
        """Readable when frames were committed."""
        return self._handle.committed

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """(size,) all of the ring's memory, byte by byte."""
        return np.frombuffer(self._memory, np.uint8)

    def handle(self) -> RingHandle:
        """What a new writer needs to go on where the last one, now dead, stopped.

        What that one had claimed and not committed is forgotten.
        """
        self.update()
        _take(self._handle.freed)  # told to the new writer by ``tail``
        own = self._handle
        return RingHandle(
            own.memory, own.size, own.committed, own.freed, self.committed, self._released
        )

    def update(self) -> int:
        """Look what was committed since; returns ``committed``."""
        self.committed += _take(self._handle.committed)
        return self.committed

    def view(self, position: int, n: int) -> Slots:
        """Up to ``n`` committed slots from ``position`` on, fewer at the ring's end."""
        return self._view(position, n)

    def release(self, n: int) -> None:
        """Free the ``n`` oldest slots; views of them must not be used any more."""
        if n:
            self._released += n
            os.eventfd_write(self._handle.freed, n)

    def close(self) -> None:
        """Let go of the memory and the counters."""
        self._unmap()
        for descriptor in (self._handle.memory, self._handle.committed, self._handle.freed):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def wait_readable(descriptors: Sequence[int], timeout_s: float) -> list[int]:
    """Wait until one of the descriptors can be read; returns those that can, or none."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [ready for ready, _ in poller.poll(max(0.0, timeout_s) * 1000)]


def _take(counter: int) -> int:
    try:
        return os.eventfd_read(counter)
    except BlockingIOError:
        return 0


def _check_memory(size: int) -> None:
    """Refuse what the kernel would promise and then kill us for."""
    free, _ = memory.available()
    if size > 0.8 * free:
        raise ServiceError(
            f"The ring of {size >> 20} MiB does not fit: {free >> 20} MiB of memory are free. "
            "Make ring.size smaller."
        )
