"""How far the beam has moved, beyond what the scan itself moves it by."""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import Float32

_PLACES = 32
"""Along a scan line; the descan moves the center little within one of them."""

_Center: TypeAlias = npt.NDArray[np.float64]


class BeamMoves:
    """Compares tracked centers with those at the same place of earlier scan lines.

    The descan moves the center along every line, and the fly-back moves it back: neither is a move
    of the beam. What is left between one line and another is. Without lines, because the scan's
    shape is not known or it has one row, every center is compared with all of the last seconds.

    Args:
        over_s: a move within so many seconds counts. Lines that take longer are compared with the
            one before.
        scan_shape: ``(ny, nx)``, where it is known.
    """

    def __init__(self, over_s: float, scan_shape: tuple[int, int] | None) -> None:
        self._over_s = over_s
        self._nx = scan_shape[1] if scan_shape is not None and scan_shape[0] > 1 else None
        places = 1 if self._nx is None else min(self._nx, _PLACES)
        # At each place: the line, when it was seen, and the center there.
        self._known: list[deque[tuple[int, float, _Center]]] = [deque() for _ in range(places)]
        self._looks = 0
        self._latest = (0.0, 0.0, 0.0)

    def see(self, now: float, indices: npt.NDArray[np.int64], tracked: Float32) -> None:
        """Take in what came since the last time.

        Args:
            now: seconds, of any clock.
            indices: (n,) frame numbers.
            tracked: (n, 2) ``[cy, cx]`` pixels; NaN where no beam was seen.
        """
        good = np.isfinite(tracked).all(axis=1)
        centers = tracked[good].astype(np.float64)
        self._looks += 1
        lines = np.full(len(centers), self._looks)
        places = np.zeros_like(lines)
        if self._nx is not None:
            lines, columns = np.divmod(indices[good], self._nx)
            places = columns * len(self._known) // self._nx
        moves = []
        for place in np.unique(places):
            here = places == place
            center, line = np.median(centers[here], axis=0), int(lines[here].max())
            known = self._known[place]
            if known and known[-1][0] == line:  # the rest of it comes now
                known.pop()
            # The line before is kept however old it is: it may be all there is to compare with.
            while len(known) > 1 and known[0][1] < now - self._over_s:
                known.popleft()
            if known:
                moves.append(max((float(np.hypot(*(center - c))), now - at) for _, at, c in known))
            known.append((line, now, center))
        if moves:
            moved, since = np.median(moves, axis=0)
            self._latest = (now, float(moved), float(since))

    def latest(self, now: float) -> tuple[float, float]:
        """How far the beam has moved, in pixels, and within how many seconds; 0 where it rests."""
        at, moved, since = self._latest
        return (moved, max(since, self._over_s)) if now - at <= self._over_s else (0.0, 0.0)
