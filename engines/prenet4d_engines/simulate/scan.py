"""Whole scans with known truth: from simulated crystals, or drawn from measured patterns.

A scan holds a few expected patterns on a canvas with a margin. Every probe position takes one of
them (its grain), mixed with vacuum as the sample thins, shifts it by the drift, and counts. So a
scan of any length needs the memory of its few canvases and one chunk of frames, and the frame at
a position is the same whatever chunk it is asked for in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from prenet4d_engines.errors import SimulationError
from prenet4d_engines.simulate.draw import draw_optics, draw_pattern
from prenet4d_engines.simulate.materials import MATERIALS
from prenet4d_engines.simulate.pattern import KINDS, Kind
from prenet4d_engines.simulate.render import distortion, render

Array = NDArray[np.float64]
Counts = NDArray[np.uint16] | NDArray[np.uint32]

_FEW_ELECTRONS: Final = 20_000
"""Below this many electrons a frame, throwing each one is cheaper than counting every pixel."""
_MOST_ELECTRONS: Final = 1e9
"""In a frame: all of them fit one pixel of uint32."""
_FARTHEST: Final = 3
"""Centers lie within so many sides of the frame."""
_LARGEST_RATIO: Final = 10
"""No lens distorts like that; beyond, disks find no patch to be drawn on."""
_OVERSHOOT: Final = 1.28125
"""Most that cubic convolution makes of its pixels' largest: half way between them, its positive
weights sum to that."""


@dataclass(frozen=True)
class Drift:
    """How the center moves over a scan, in pixels.

    Attributes:
        plane: Change of the center across the whole scan in each direction, typical size: what
            an imperfect descan leaves.
        walk: Distance that a slow random walk covers over the scan, typical size.
        jump: Standard deviation of the jump at each fly-back, constant over the line.

    Raises:
        SimulationError: One of them is no distance.
    """

    plane: float = 3.0
    walk: float = 1.0
    jump: float = 0.3

    def __post_init__(self) -> None:
        """Refuse what is no distance: it would end as a margin of so many pixels."""
        if not all(np.isfinite(each) and each >= 0 for each in (self.plane, self.walk, self.jump)):
            raise SimulationError(f"A drift is distances in px from 0 up, not {self}.")

    def path(self, scan_shape: tuple[int, int], rng: np.random.Generator) -> Array:
        """Return the displacement (n, 2), [y, x] in px, at each probe position; mean zero."""
        ny, nx = scan_shape
        n = ny * nx
        row, column = np.divmod(np.arange(n), nx)
        slopes = rng.uniform(-1, 1, (2, 2)) * self.plane
        unit = np.stack([row / max(1, ny - 1), column / max(1, nx - 1)], axis=1)
        path = unit @ slopes
        path += np.cumsum(rng.normal(0, self.walk / np.sqrt(n), (n, 2)), axis=0)
        path += rng.normal(0, self.jump, (ny, 2))[row]
        centered: Array = path - path.mean(0)
        return centered


@dataclass(frozen=True)
class Scan:
    """A scan whose truth is known.

    Attributes:
        scan_shape: (ny, nx).
        frame_shape: (h, w).
        centers: (n, 2) float64, the true center (cy, cx) of each frame in px.
        ellipticity: (ratio, theta) of every frame.
        dose: Expected electrons per pattern, before drift moves any out of the frame.
        grains: (n,) int64, which expected pattern each probe position shows.
        material_share: (n,) float64, 1 where the sample is full, 0 in vacuum.
        valid: (h, w) bool, False at pixels known to be bad: they read 0.
        seed: Seed of the counting noise.
        canvases: (k + 1, H, W) float32 expected electrons with a margin; the last one is vacuum.
        origin: (cy, cx) of the direct beam on the canvases.
    """

    scan_shape: tuple[int, int]
    frame_shape: tuple[int, int]
    centers: Array
    ellipticity: tuple[float, float]
    dose: float
    grains: NDArray[np.int64]
    material_share: Array
    valid: NDArray[np.bool_]
    seed: int
    canvases: NDArray[np.float32]
    origin: tuple[float, float]

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.scan_shape[0] * self.scan_shape[1]

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Type of the frames: uint16, or uint32 where counts could exceed it."""
        peak = _OVERSHOOT * float(self.canvases.max())
        return np.dtype(np.uint16) if peak + 10 * peak**0.5 < 65535 else np.dtype(np.uint32)

    def expectation(self, index: int) -> NDArray[np.float32]:
        """Return the expected electrons (h, w) of one frame; bad pixels included, not zeroed."""
        share = np.float32(self.material_share[index])
        canvas = self.canvases[self.grains[index]]
        if share < 1:
            canvas = share * canvas + (1 - share) * self.canvases[-1]
        start = np.asarray(self.origin) - self.centers[index]
        return _shifted(canvas, (float(start[0]), float(start[1])), self.frame_shape)

    def frame(self, index: int) -> Counts:
        """Return one frame (h, w) in electrons."""
        rng = np.random.default_rng([self.seed, index])
        rate = self.expectation(index)
        counts = _count(rate, rng) * self.valid
        return counts.astype(self.dtype)  # type: ignore[return-value]

    def frames(self, start: int = 0, stop: int | None = None, *, threads: int = 1) -> Counts:
        """Return frames start..stop-1 as (n, h, w)."""
        stop = len(self) if stop is None else min(stop, len(self))
        out = np.empty((max(0, stop - start), *self.frame_shape), self.dtype)

        def fill(i: int) -> None:
            out[i] = self.frame(start + i)

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(len(out))))
        else:
            for i in range(len(out)):
                fill(i)
        return out

    def chunks(self, size: int = 64, *, threads: int = 1) -> Iterator[Counts]:
        """Yield the whole scan in order, `size` frames at a time."""
        for start in range(0, len(self), size):
            yield self.frames(start, start + size, threads=threads)


def simulate_scan(
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    *,
    kind: Kind = "cbed",
    material: str = "Au",
    dose: float = 1e4,
    ellipticity: tuple[float, float] = (1.0, 0.0),
    drift: Drift | None = None,
    center: tuple[float, float] | None = None,
    grains: int = 5,
    valid: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Scan:
    """Simulate a scan over a polycrystalline sample with a hole.

    Args:
        scan_shape: (ny, nx) probe positions.
        frame_shape: (h, w) of the frames.
        kind: Content of the patterns.
        material: Name in MATERIALS.
        dose: Expected electrons per pattern.
        ellipticity: (ratio, theta).
        drift: How the center moves; by default as `Drift()`.
        center: Mean center (cy, cx) over the scan; by default the middle of the frame.
        grains: Number of grains, each of its own orientation and thickness.
        valid: (h, w) bool, False at bad pixels; by default there are none.
        seed: Fixes everything.

    Raises:
        SimulationError: Unknown kind or material, or numbers that make no scan.
    """
    if kind not in KINDS:
        raise SimulationError(f"There is no kind of pattern {kind!r}. Known: {', '.join(KINDS)}.")
    if material not in MATERIALS:
        raise SimulationError(f"There is no material {material!r}. Known: {', '.join(MATERIALS)}.")
    _check(scan_shape, frame_shape, dose, ellipticity, grains, seed)
    if center is not None and not (np.abs(center) <= _FARTHEST * max(frame_shape)).all():
        raise SimulationError(f"The center is a pair of pixels in or near the frame, not {center}.")
    rng = np.random.default_rng(seed)
    path = (drift or Drift()).path(scan_shape, rng)
    margin = _margin(path, frame_shape)
    h, w = frame_shape
    if center is None:
        center = ((h - 1) / 2, (w - 1) / 2)
    origin = (center[0] + margin, center[1] + margin)
    crystal = MATERIALS[material]
    optics = draw_optics(rng, kind, crystal, frame_shape)
    kinds: list[Kind] = [kind] * grains + ["vacuum"]
    patterns = [
        draw_pattern(
            rng,
            frame_shape,
            kind=k,
            material=crystal,
            center=origin,
            ellipticity=ellipticity,
            optics=optics,
        )
        for k in kinds
    ]
    canvases = render(patterns, (h + 2 * margin, w + 2 * margin)).numpy()
    middle = canvases[:, margin : margin + h, margin : margin + w]
    canvases = canvases * (dose / middle.sum((1, 2), keepdims=True))
    labels, share = _sample(scan_shape, grains, rng)
    return Scan(
        scan_shape=scan_shape,
        frame_shape=frame_shape,
        centers=np.asarray(center) + path,
        ellipticity=ellipticity,
        dose=dose,
        grains=labels,
        material_share=share,
        valid=_valid(valid, frame_shape),
        seed=seed,
        canvases=canvases.astype(np.float32),
        origin=origin,
    )


def draw_scan(
    expectations: NDArray[np.generic],
    scan_shape: tuple[int, int],
    *,
    dose: float = 1e4,
    ellipticity: tuple[float, float] = (1.0, 0.0),
    drift: Drift | None = None,
    centers: Sequence[tuple[float, float]] | None = None,
    valid: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Scan:
    """Draw a scan from measured patterns: real content, known shift, distortion and dose.

    Each measured pattern is taken as an expectation, distorted once by cubic interpolation,
    shifted to every probe position's center, and counted. The patterns' own center and ellipse
    are whatever they were: `centers` of the scan are exact relative to `centers` given here, and
    `ellipticity` comes on top of the patterns' own.

    Args:
        expectations: (k, h, w) or (h, w), patterns of many counts; negative values count as 0.
        scan_shape: (ny, nx) probe positions; the k patterns are laid over it in smooth domains.
        dose: Expected electrons per pattern.
        ellipticity: (ratio, theta) to add.
        drift: How the center moves; by default as `Drift()`.
        centers: (cy, cx) of the direct beam in each measured pattern; by default the middle of
            the frame. All patterns are brought to the first one's center.
        valid: (h, w) bool, False at bad pixels; by default there are none.
        seed: Fixes everything.

    Raises:
        SimulationError: Patterns that are empty, not finite or of the wrong shape.
    """
    measured = np.asarray(expectations, np.float64)
    if measured.ndim == 2:
        measured = measured[None]
    if measured.ndim != 3 or not len(measured):
        raise SimulationError(
            f"Expectations must be (k, h, w) or (h, w); these are {measured.shape}."
        )
    if not np.isfinite(measured).all():
        raise SimulationError("The measured patterns hold values that are not finite.")
    measured = measured.clip(min=0)
    if (measured.sum((1, 2)) <= 0).any():
        raise SimulationError(
            "A measured pattern holds no positive counts; subtract its offset first."
        )
    k, h, w = measured.shape
    _check(scan_shape, (h, w), dose, ellipticity, k, seed)
    middle = ((h - 1) / 2, (w - 1) / 2)
    at = np.asarray(centers if centers is not None else [middle] * k, np.float64)
    if at.shape != (k, 2):
        raise SimulationError(f"There must be {k} centers (cy, cx), one a pattern.")
    if not np.isfinite(at).all():
        raise SimulationError("The measured patterns' centers hold values that are not finite.")

    rng = np.random.default_rng(seed)
    path = (drift or Drift()).path(scan_shape, rng)
    margin = _margin(path, (h, w))
    origin = at[0] + margin
    inverse = np.linalg.inv(distortion(ellipticity))
    shape = (h + 2 * margin, w + 2 * margin)
    canvases = np.empty((k + 1, *shape))
    for canvas, pattern, place in zip(canvases, measured, at, strict=False):
        # canvas(p) = measured(c + D^-1 (p - origin))
        ndimage.affine_transform(
            pattern,
            inverse,
            offset=place - inverse @ origin,
            output_shape=shape,
            output=canvas,
            order=3,
            mode="nearest",
        )
    canvases[-1] = canvases[0]
    canvases = canvases.clip(min=0)
    inner = canvases[:, margin : margin + h, margin : margin + w]
    canvases *= dose / inner.sum((1, 2), keepdims=True)
    labels, _ = _sample(scan_shape, k, rng)
    return Scan(
        scan_shape=scan_shape,
        frame_shape=(h, w),
        centers=at[0] + path,
        ellipticity=ellipticity,
        dose=dose,
        grains=labels,
        material_share=np.ones(len(labels)),
        valid=_valid(valid, (h, w)),
        seed=seed,
        canvases=canvases.astype(np.float32),
        origin=(float(origin[0]), float(origin[1])),
    )


def _check(
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    dose: float,
    ellipticity: tuple[float, float],
    grains: int,
    seed: int,
) -> None:
    if min(scan_shape) < 1 or min(frame_shape) < 16:
        raise SimulationError(
            f"A scan has at least one position and frames of 16 x 16; asked for {scan_shape} "
            f"positions of {frame_shape}."
        )
    if not 0 < dose <= _MOST_ELECTRONS:
        raise SimulationError(
            f"The dose must be a positive number of electrons up to {_MOST_ELECTRONS:.0e}, not "
            f"{dose}."
        )
    if not (np.isfinite(ellipticity).all() and 1 <= ellipticity[0] <= _LARGEST_RATIO):
        raise SimulationError(
            f"An ellipticity is a ratio a/b from 1 to {_LARGEST_RATIO} and an angle in radians, "
            f"not {ellipticity}."
        )
    if grains < 1:
        raise SimulationError("A scan needs at least one grain.")
    if seed < 0:
        raise SimulationError(f"A seed is a whole number from 0 up, not {seed}.")


def _margin(path: Array, frame_shape: tuple[int, int]) -> int:
    """Return by how many pixels canvases reach beyond the frame on each side."""
    farthest = float(np.abs(path).max())
    if farthest > _FARTHEST * max(frame_shape):
        raise SimulationError(
            f"The center drifts by up to {farthest:.0f} px, far out of frames of {frame_shape}: "
            "give the drift in pixels."
        )
    return int(np.ceil(farthest)) + 4


def _valid(valid: NDArray[np.bool_] | None, frame_shape: tuple[int, int]) -> NDArray[np.bool_]:
    if valid is None:
        return np.ones(frame_shape, np.bool_)
    if valid.shape != frame_shape:
        raise SimulationError(f"The mask is {valid.shape}, the frames are {frame_shape}.")
    return valid.astype(np.bool_)


def _sample(
    scan_shape: tuple[int, int], grains: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Array]:
    """Lay grains over the scan as Voronoi cells, and a hole with a soft edge."""
    ny, nx = scan_shape
    y, x = np.mgrid[:ny, :nx] / max(ny, nx)
    height, width = ny / max(ny, nx), nx / max(ny, nx)
    seeds = rng.uniform(0, 1, (grains, 2)) * (height, width)
    wobble = 0.04 * np.sin(9 * y + rng.uniform(0, 6)), 0.04 * np.sin(9 * x + rng.uniform(0, 6))
    away = (y[..., None] + wobble[1][..., None] - seeds[:, 0]) ** 2 + (
        x[..., None] + wobble[0][..., None] - seeds[:, 1]
    ) ** 2
    labels = away.argmin(-1).ravel().astype(np.int64)
    hole = rng.uniform(0.2, 0.8, 2) * (height, width)
    radius = rng.uniform(0.1, 0.2)
    distance = np.hypot(y - hole[0], x - hole[1]) - radius
    share = np.clip(0.5 + distance / 0.06, 0.0, 1.0).ravel()
    return labels, share


def _shifted(
    canvas: NDArray[np.float32], start: tuple[float, float], shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Cut a window that starts at a fractional place, by cubic convolution (Keys 1981, a=-1/2)."""
    h, w = shape
    (iy, wy), (ix, wx) = _taps(start[0]), _taps(start[1])
    rows = canvas[iy - 1 : iy + h + 2, ix - 1 : ix + w + 2]
    column = wy[0] * rows[:h]
    for k in (1, 2, 3):
        column += wy[k] * rows[k : k + h]
    window = wx[0] * column[:, :w]
    for k in (1, 2, 3):
        window += wx[k] * column[:, k : k + w]
    positive: NDArray[np.float32] = np.maximum(window, 0, out=window)
    return positive


def _taps(start: float) -> tuple[int, NDArray[np.float32]]:
    whole = int(np.floor(start))
    t = start - whole
    taps = (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
    return whole, np.array(taps, np.float32)


def _count(rate: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw Poisson counts of a rate image.

    The two ways are the same distribution: independent Poisson counts in all pixels are a Poisson
    number of electrons, each thrown by the image as its probability.
    """
    total = float(rate.sum(dtype=np.float64))
    if total > _FEW_ELECTRONS:
        return rng.poisson(rate)
    edges = np.cumsum(rate.ravel(), dtype=np.float64)
    thrown = rng.random(rng.poisson(total)) * edges[-1]
    pixels = np.searchsorted(edges, thrown, side="right").clip(max=rate.size - 1)
    return np.bincount(pixels, minlength=rate.size).reshape(rate.shape)
