"""Decoding blocks of frames straight into the ring, on a few threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import BadCounts, FrameError
from prenet4d_server.sources.base import FrameBlock, Pixels

Failure: TypeAlias = tuple[int, FrameError]
"""A frame's place among those that are decoded, and why it cannot be used."""

SMALLEST_PART = 1 << 19
"""Bytes below which handing a part to another thread costs more than it saves."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring frames of a block, and where they go."""

    first: int
    """Number of the first frame within the block."""
    offset: int
    """Its place among the frames that are decoded."""
    out: Pixels


class Decoding:
    """Frames that are being decoded, perhaps on other threads."""

    def __init__(self, parts: list[Future[list[Failure]]], found: list[Failure]) -> None:
        self._parts = parts
        self._found = found

    @property
    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return all(part.done() for part in self._parts)

    def result(self) -> list[Failure]:
        """Wait for it; returns the frames that cannot be used: ``(place in out, why)``."""
        for part in self._parts:
            self._found += part.result()
        self._parts = []
        return self._found


class Decoder:
    """Unpacks large blocks on ``threads`` threads of its own; all else on the caller's."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode")

    def decode(self, block: FrameBlock, numbers: npt.NDArray[np.intp], out: Pixels) -> Decoding:
        """Decode some frames of a block and check that their counts are counts.

        Args:
            block: the encoded frames.
            numbers: (n,) ascending: which of them.
            out: (n, h, w): where they go; not to be touched before the result is there.
        """
        parts = list(self._parts(numbers, out))
        if not block.packed or out.nbytes < SMALLEST_PART:
            return Decoding([], [failure for part in parts for failure in _decode(block, part)])
        return Decoding([self._pool.submit(_decode, block, part) for part in parts], [])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _parts(self, numbers: npt.NDArray[np.intp], out: Pixels) -> Iterator[_Part]:
        """Runs of neighbours, none so long that the other threads would have nothing to do."""
        threads = min(self._threads, out.nbytes // SMALLEST_PART) or 1
        longest = -(-len(numbers) // threads)
        gaps = np.flatnonzero(np.diff(numbers) != 1) + 1
        for begin, end in zip([0, *gaps], [*gaps, len(numbers)], strict=True):
            for offset in range(begin, end, longest):
                upto = min(offset + longest, end)
                yield _Part(int(numbers[offset]), offset, out[offset:upto])


def _decode(block: FrameBlock, part: _Part) -> list[Failure]:
    place = part.offset - part.first
    found = [(number + place, error) for number, error in block.read_into(part.first, part.out)]
    if part.out.dtype.kind == "f":
        failed = {offset for offset, _ in found}
        found += [
            (offset, BadCounts("A frame has NaN, infinite or negative counts."))
            for offset in (np.flatnonzero(~_are_counts(part.out)) + part.offset).tolist()
            if offset not in failed
        ]
    return found


def _are_counts(frames: Pixels) -> npt.NDArray[np.bool_]:
    """(n,) whether every pixel of a frame is finite and not negative; NaN compares as neither."""
    flat = frames.reshape(len(frames), -1)
    with np.errstate(invalid="ignore"):
        good: npt.NDArray[np.bool_] = (flat.min(axis=1) >= 0) & (flat.max(axis=1) < np.inf)
    return good
