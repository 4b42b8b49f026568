"""Scan maps: one figure for each probe position, filled in while the scan is running."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import CorrectedBatch, Float32, FrameFlag
from prenet4d_engines.checks import checked_scan_shape
from prenet4d_engines.descan import Descan, fit_descan
from prenet4d_engines.errors import FrameError
from prenet4d_engines.virtual import VIRTUAL_NAMES

MAP_NAMES = (*VIRTUAL_NAMES, "center_y", "center_x", "center_sigma", "flags")
"""The virtual detectors' figures; the center in use and one sigma of it (root mean square of both
axes), pixels; sums of ``FrameFlag``."""

MAX_POSITIONS = 1 << 22
"""Probe positions of the largest scan that maps are made for: 2048 × 2048, 220 MB."""

_NOT_MEASURED = FrameFlag.BLANK | FrameFlag.OUTLIER | FrameFlag.NO_BEAM

Index: TypeAlias = npt.NDArray[np.int64]


class Region(NamedTuple):
    """A rectangle of probe positions."""

    y0: int
    x0: int
    height: int
    width: int


class MapAccumulator:
    """The maps of one acquisition.

    Args:
        scan_shape: ``(ny, nx)``; frame ``i`` belongs to probe position ``(i // nx, i % nx)``.

    Raises:
        FrameError: the shape is none, or the scan has more than ``MAX_POSITIONS``.
    """

    def __init__(self, scan_shape: tuple[int, int]):
        ny, nx = checked_scan_shape(scan_shape)
        if ny * nx > MAX_POSITIONS:
            raise FrameError(
                f"Scan maps are made for up to {MAX_POSITIONS:,} probe positions; "
                f"{ny} × {nx} are more."
            )
        self.scan_shape = (ny, nx)
        # The maps, and what the descan is fitted to: each frame's own center and its sigma.
        self._everything: Float32 = np.full((len(MAP_NAMES) + 4, ny * nx), np.nan, np.float32)
        planes = self._everything.reshape(-1, ny, nx)
        self.values: Float32 = planes[: len(MAP_NAMES)]
        """(k, ny, nx) in the order of ``MAP_NAMES``; NaN where no frame came yet."""
        self._centers: Float32 = planes[len(MAP_NAMES) :]
        self._filled = np.zeros((ny, nx), dtype=np.bool_)
        self._changed: tuple[int, int, int, int] | None = None

    @property
    def frames(self) -> int:
        """Probe positions that are filled in."""
        return int(np.count_nonzero(self._filled))

    @property
    def changed(self) -> Region | None:
        """The smallest rectangle around what came since :meth:`mark`; ``None``: nothing did."""
        if self._changed is None:
            return None
        top, left, bottom, right = self._changed
        return Region(top, left, bottom - top + 1, right - left + 1)

    def mark(self) -> None:
        """What came so far is known to everybody."""
        self._changed = None

    def add(self, batch: CorrectedBatch) -> None:
        """Enter corrected frames; those beyond the end of the scan are left out."""
        ny, nx = self.scan_shape
        inside = (batch.indices >= 0) & (batch.indices < ny * nx)
        if not inside.any():
            return
        at = batch.indices[inside]
        center = np.asarray(batch.reference_center, np.float32) - batch.shift
        sigma = np.sqrt(np.square(batch.shift_sigma).sum(axis=1) / 2)
        virtual = np.full(len(VIRTUAL_NAMES), np.nan) if batch.virtual is None else batch.virtual
        rows = np.empty((len(inside), len(MAP_NAMES) + 4), np.float32)
        rows[:, :5], rows[:, 5:7], rows[:, 7], rows[:, 8] = virtual, center, sigma, batch.flags
        rows[:, 9:11], rows[:, 11:] = batch.center, batch.center_sigma
        rows[(batch.flags & _NOT_MEASURED) != 0, 9:] = np.nan
        self._everything[:, at] = rows[inside].T
        self._filled.ravel()[at] = True
        self._change(at)

    def descan(self) -> Descan | None:
        """Fit the drift of the center; ``None`` where too little of the scan was seen."""
        return fit_descan(self._centers[:2], self._centers[2:])

    def _change(self, at: Index) -> None:
        """What lies at these probe positions has changed."""
        nx = self.scan_shape[1]
        (top, left), (bottom, right) = divmod(int(at.min()), nx), divmod(int(at.max()), nx)
        if top != bottom:
            columns = at % nx
            left, right = int(columns.min()), int(columns.max())
        if self._changed is not None:
            before = self._changed
            top, left = min(top, before[0]), min(left, before[1])
            bottom, right = max(bottom, before[2]), max(right, before[3])
        self._changed = (top, left, bottom, right)
