"""What a simulated detector shows: a simulated sample, a file as it is, or a scan drawn from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import FileError

if TYPE_CHECKING:
    from prenet4d_engines.simulate import Kind, Scan
    from prenet4d_server.files import ScanFile
    from prenet4d_server.simulators import FrameFeed

MAX_EXPECTATIONS = 16
"""So many of a file's patterns, evenly spread over it, become a drawn scan's domains."""
SIMULATED_GRAINS = 12
_CHUNK = 32


@dataclass(frozen=True)
class Drawing:
    """A scan whose truth is known, drawn from simulated or measured patterns.

    The same values draw the same scan, frame by frame, in every process.

    Attributes:
        scan_shape: ``(ny, nx)``; 64 × 64 by default.
        frame_shape: ``(h, w)`` px of simulated frames; 128 × 128 by default.
        kind: Content of simulated patterns: ``cbed``, ``spots``, ``rings``, ``grains`` or
            ``amorphous``.
        dose: Mean electrons a pattern; 1,000 by default.
        ellipticity: ``(ratio, theta)``, theta in radians; on top of the file's own, where there is
            one.
        drift: Typical drift of the center over the scan, px.
        seed: Of everything that is drawn.
    """

    scan_shape: tuple[int, int] | None = None
    frame_shape: tuple[int, int] | None = None
    kind: Kind = "grains"
    dose: float | None = None
    ellipticity: tuple[float, float] | None = None
    drift: float | None = None
    seed: int = 0

    @property
    def wanted(self) -> bool:
        """Whether anything asks for drawing, rather than for a file's frames as they are."""
        return (self.dose, self.ellipticity, self.drift) != (None, None, None)

    def draw(self, measured: npt.NDArray[Any] | None = None) -> Scan:
        """Draw the scan.

        Args:
            measured: (k, h, w) patterns of many counts to draw from; ``None`` simulates a sample.

        Raises:
            EngineError: these values make no scan.
        """
        from prenet4d_engines.simulate import Drift, draw_scan, simulate_scan

        ny, nx = self.scan_shape or (64, 64)
        h, w = self.frame_shape or (128, 128)
        dose = 1000.0 if self.dose is None else self.dose
        ellipticity = (1.0, 0.0) if self.ellipticity is None else self.ellipticity
        size = 3.0 if self.drift is None else self.drift
        drift = Drift(plane=size, walk=size / 3, jump=size / 10)
        if measured is not None:
            return draw_scan(
                measured,
                (ny, nx),
                dose=dose,
                ellipticity=ellipticity,
                drift=drift,
                seed=self.seed,
            )
        return simulate_scan(
            (ny, nx),
            (h, w),
            kind=self.kind,
            grains=SIMULATED_GRAINS,
            dose=dose,
            ellipticity=ellipticity,
            drift=drift,
            seed=self.seed,
        )


class DrawnFeed:
    """The frames of a drawn scan, as a detector shows them."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.frame_shape = scan.frame_shape
        self.dtype: np.dtype[Any] = scan.dtype
        self.scan_shape: tuple[int, int] | None = scan.scan_shape
        self.n_frames = len(scan)
        self.pixel_mask = None if scan.valid.all() else scan.valid

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the frames in order."""
        yield from self.scan.chunks(_CHUNK)


class LoopedFeed:
    """A file's frames as they are, over and over until the scan is full."""

    def __init__(self, file: ScanFile, scan_shape: tuple[int, int]) -> None:
        self._file = file
        self.frame_shape = file.frame_shape
        self.dtype = file.dtype
        self.scan_shape: tuple[int, int] | None = scan_shape
        self.n_frames = scan_shape[0] * scan_shape[1]
        self.pixel_mask = file.pixel_mask

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the frames in order."""
        left = self.n_frames
        while left:
            for block in self._file.blocks(_CHUNK):
                yield block[:left]
                left -= len(block[:left])
                if not left:
                    return


@contextmanager
def open_feed(path: Path | None, drawing: Drawing) -> Iterator[FrameFeed]:
    """Open what a simulated detector shows.

    Args:
        path: measured patterns; ``None``: a simulated sample.
        drawing: how to draw the scan; a file is drawn from only where the drawing asks for a dose,
            a distortion or a drift.

    Raises:
        FileError: the file cannot be read.
        EngineError: no scan can be drawn like that.
    """
    from prenet4d_server.files import open_scan

    if path is None:
        yield DrawnFeed(drawing.draw())
        return
    if drawing.wanted:
        yield DrawnFeed(drawing.draw(read_expectations(path)))
        return
    with open_scan(path) as file:
        shape = drawing.scan_shape
        if shape is None or shape == file.scan_shape:
            yield file
        else:
            yield LoopedFeed(file, (shape[0], shape[1]))


def read_expectations(path: Path) -> npt.NDArray[np.float32]:
    """Read up to ``MAX_EXPECTATIONS`` patterns of a file, evenly spread.

    What is below zero is treated as :func:`above_zero` does. Pixels that the file says are bad hold
    what those around them do.

    Returns:
        (k, h, w) counts ≥ 0.

    Raises:
        FileError: the file cannot be read, or holds a pattern without counts.
    """
    from prenet4d_server.files import open_scan

    with open_scan(path) as file:
        chosen = np.unique(
            np.linspace(0, file.n_frames - 1, min(file.n_frames, MAX_EXPECTATIONS)).astype(int)
        )
        patterns = np.concatenate([file.read(i, i + 1) for i in map(int, chosen)])
        mask = file.pixel_mask
    counts = above_zero(patterns)
    if mask is not None:
        from prenet4d_engines.simulate import filled

        counts = np.stack([filled(pattern, mask) for pattern in counts]).astype(np.float32)
    if not (counts.sum(axis=(1, 2)) > 0).all():
        raise FileError(f"{path} holds a pattern without counts: nothing can be drawn from it.")
    return counts


def above_zero(patterns: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Make counts of measured values.

    Where most of a pattern is negative, as cameras with an offset leave it, its lowest hundredth is
    taken for zero; what is negative then, or no number, counts as nothing.

    Args:
        patterns: (k, h, w) of any type of numbers.

    Returns:
        (k, h, w) counts ≥ 0.
    """
    counts = np.nan_to_num(patterns.astype(np.float32), posinf=0.0, neginf=0.0)
    for pattern in counts:
        if np.median(pattern) < 0:
            pattern -= np.percentile(pattern, 1)
    return counts.clip(min=0)
