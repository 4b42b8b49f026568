"""Patterns to evaluate on: crystals that training never saw, seeds that training never uses.

Training draws from `prenet4d_engines.simulate.materials.TRAINING` and seeds below ten million;
everything here from `HELD_OUT` and seeds from there up. Nothing may be tuned on these sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from prenet4d_engines.evaluate.metrics import beam_limits
from prenet4d_engines.simulate import (
    HELD_OUT,
    KINDS,
    Detector,
    Drift,
    Kind,
    Multislice,
    Pattern,
    draw_center,
    draw_detector,
    draw_difficult,
    draw_ellipticity,
    draw_optics,
    draw_pattern,
    draw_scan,
    draw_wide_beam,
    draw_without_beam,
    expose,
    filled,
    ideal_detector,
    render,
    speckled,
)
from prenet4d_engines.simulate.multislice import draw_zoom
from prenet4d_engines.simulate.pattern import RADIUS, X, Y

FIRST_SEED: Final = 10_000_000
"""Seeds from here up belong to the evaluation."""

MOVE: Final = 0.1
"""Distance in px by which patterns are moved to see how they change."""
_STEPS: Final = ((-MOVE, 0.0), (MOVE, 0.0), (0.0, -MOVE), (0.0, MOVE))
_FLOOR: Final = np.float32(0.003)
_DIRECT: Final = 0.5
"""Disks within so many px of the direct beam belong to it."""
COMPUTED: Final = Path(__file__).with_name("multislice.npz")
"""Multislice patterns of held-out materials, computed once, by ``prenet4d simulate --multislice
multislice.npz --held-out --patterns 144 --seed 10000000``."""

Array = NDArray[np.float64]

ODD_SHAPE: Final = (107, 150)
"""(h, w) in px of frames that fill no whole number of the networks' cells."""
_LEAST_GROUP: Final = 24
"""Patterns drawn from one measured one: each group's own median is taken off its errors, which
makes them smaller where a group is small."""


@dataclass(frozen=True)
class Exposure:
    """The patterns of a set at one dose.

    Attributes:
        frames: (n, h, w) float32 counts; masked pixels read 0.
        clean: (n, h, w) float32 counts that were expected: what a perfect denoiser returns.
    """

    frames: NDArray[np.float32]
    clean: NDArray[np.float32]


@dataclass(frozen=True)
class PatternSet:
    """Patterns with their truth, to be exposed at any dose.

    Attributes:
        name: Short unique name, part of the tables' names.
        title: What the set is, for the tables' titles.
        expected: (n, h, w) float32, each pattern with sum 1.
        centers: (n, 2) float64, true (cy, cx) in px.
        radii: (n,) float64, the direct beam's radius in px.
        kinds: What each pattern shows.
        detectors: The camera of each pattern.
        seed: Seed of the exposures.
        moved: (n, 4, h, w) float32: the same patterns with the center moved by `MOVE` px up, down,
            left and right, for the Cramér-Rao bound; None where that is not known exactly.
        ratios: (n,) float64, how elliptical each is; None where that is not known.
        spacings: (n,) float64, distance in px from the direct beam to the nearest reflection,
            infinite where there is none; None where that is not known.
        groups: (n,) int64 where the centers are only known up to a constant for each group, as in
            patterns drawn from measured ones; None where they are known.
    """

    name: str
    title: str
    expected: NDArray[np.float32]
    centers: Array
    radii: Array
    kinds: tuple[str, ...]
    detectors: tuple[Detector, ...]
    seed: int
    moved: NDArray[np.float32] | None = None
    ratios: Array | None = None
    spacings: Array | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.expected)

    @property
    def limits(self) -> Array:
        """(n,) float64, the errors in px beyond which another beam was taken for the direct one."""
        spacings = np.inf if self.spacings is None else self.spacings
        return beam_limits(self.radii, self.expected.shape[1:], spacings)

    def deviations(self, centers: Array) -> Array:
        """Return found minus true centers (n, 2), px, without the constant of each group."""
        deviations = np.asarray(centers - self.centers, np.float64)
        if self.groups is not None:
            for group in np.unique(self.groups):
                member = self.groups == group
                deviations[member] -= np.median(deviations[member], axis=0)
        return deviations

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(n, h, w) bool, True where a pixel is valid."""
        return np.stack([detector.valid for detector in self.detectors])

    def without_masks(self, frames: NDArray[np.float32]) -> list[list[Array]]:
        """Return what a method that knows no mask may choose from, each n frames (h, w).

        That is the frames as they are and, where there are masks, with their bad pixels filled.
        """
        given = [list(frames.astype(np.float64))]
        if not self.masks.all():
            given.append([filled(f, valid) for f, valid in zip(frames, self.masks, strict=True)])
        return given

    def expose(self, dose: float) -> Exposure:
        """Draw counts at a dose in electrons per pattern; the same call gives the same counts."""
        frames, clean = np.empty_like(self.expected), np.empty_like(self.expected)
        for i, detector in enumerate(self.detectors):
            generator = torch.Generator().manual_seed(seed_of(self.seed, i, round(dose)))
            drawn = expose(torch.from_numpy(self.expected[i : i + 1]), dose, detector, generator)
            frames[i], clean[i] = drawn[0][0].numpy(), drawn[1][0].numpy()
        return Exposure(frames, clean)


def seed_of(*parts: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _spacings(patterns: Sequence[Pattern]) -> Array:
    """Return how far the nearest reflection is from the direct beam, before distortion."""
    away = [np.hypot(pattern.disks[:, Y], pattern.disks[:, X]) for pattern in patterns]
    return np.array([d[d > _DIRECT].min(initial=np.inf) for d in away], np.float64)


def _moved(patterns: Sequence[Pattern], frame_shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.stack(
        [
            render([p.moved((p.center[0] + y, p.center[1] + x)) for p in patterns], frame_shape)
            for y, x in _STEPS
        ],
        axis=1,
    )


def mixed_kinds(n: int) -> tuple[Kind, ...]:
    """Return n kinds of pattern in training's proportions, without blank frames, at least one each.

    The commonest kinds come first; three of them fill up, and the commonest gives way.
    """
    shares = {kind: share for kind, share in KINDS.items() if kind != "blank"}
    total = sum(shares.values())
    counts = {kind: max(1, int(n * share / total)) for kind, share in shares.items()}
    order = list(shares)
    counts[order[0]] -= max(0, sum(counts.values()) - n)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    while len(kinds) < n:
        kinds.append(order[len(kinds) % 3])
    return tuple(kinds[:n])


def held_out_patterns(
    name: str,
    title: str,
    frame_shape: tuple[int, int],
    kinds: Sequence[Kind],
    *,
    seed: int,
    faulty: bool = False,
    film: bool = False,
) -> PatternSet:
    """Draw patterns of held-out materials with centers within ±20 % and ratios up to 1.12.

    Args:
        name: Name of the set.
        title: Its title.
        frame_shape: (h, w).
        kinds: What each pattern shows.
        seed: Counts from `FIRST_SEED`; 0 is the standard evaluation.
        faulty: Draw cameras with gaps, dead and hot pixels, beam stops, blur and readout noise
            (about half of them) instead of faultless counters.
        film: Show every pattern with speckle.
    """
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, int(faulty) + 5 * int(film)])
    materials = list(HELD_OUT.values())
    patterns, detectors = [], []
    for kind in kinds:
        material = materials[rng.integers(len(materials))]
        optics = draw_optics(rng, kind, material, frame_shape)
        pattern = draw_pattern(rng, frame_shape, kind=kind, material=material, optics=optics)
        if film:
            pattern = speckled(rng, pattern)
        patterns.append(pattern)
        detectors.append(
            draw_detector(rng, frame_shape, pattern.center)
            if faulty
            else ideal_detector(frame_shape)
        )
    return _of_patterns(name, title, frame_shape, patterns, detectors, seed=seed)


def difficult_patterns(
    name: str, title: str, frame_shape: tuple[int, int], n: int, *, seed: int
) -> PatternSet:
    """Draw n frames of held-out materials whose direct beam is stopped, cut, outshone or far off.

    Args:
        name: Name of the set.
        title: Its title.
        frame_shape: (h, w).
        n: Number of patterns.
        seed: Counts from `FIRST_SEED`; 0 is the standard evaluation.
    """
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, 2])
    materials = list(HELD_OUT.values())
    patterns: list[Pattern] = []
    detectors: list[Detector] = []
    while len(patterns) < n:
        material = materials[rng.integers(len(materials))]
        pattern, detector = draw_difficult(rng, frame_shape, material=material)
        if pattern.has_beam:
            patterns.append(pattern)
            detectors.append(detector)
    return _of_patterns(name, title, frame_shape, patterns, detectors, seed=seed)


def wide_patterns(
    name: str, title: str, frame_shape: tuple[int, int], n: int, *, seed: int
) -> PatternSet:
    """Draw n patterns of held-out materials whose direct beam fills much of the frame.

    Args:
        name: Name of the set.
        title: Its title.
        frame_shape: (h, w).
        n: Number of patterns.
        seed: Counts from `FIRST_SEED`; 0 is the standard evaluation.
    """
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, 7])
    materials = list(HELD_OUT.values())
    patterns = [
        draw_wide_beam(rng, frame_shape, materials[rng.integers(len(materials))]) for _ in range(n)
    ]
    return _of_patterns(
        name, title, frame_shape, patterns, [ideal_detector(frame_shape)] * n, seed=seed
    )


def _of_patterns(
    name: str,
    title: str,
    frame_shape: tuple[int, int],
    patterns: Sequence[Pattern],
    detectors: Sequence[Detector],
    *,
    seed: int,
) -> PatternSet:
    return PatternSet(
        name=name,
        title=title,
        expected=render(patterns, frame_shape).numpy(),
        centers=np.array([pattern.center for pattern in patterns], np.float64),
        radii=np.array([pattern.disks[0, RADIUS] for pattern in patterns], np.float64),
        kinds=tuple(pattern.kind for pattern in patterns),
        detectors=tuple(detectors),
        seed=FIRST_SEED + seed,
        moved=_moved(patterns, frame_shape),
        spacings=_spacings(patterns),
        ratios=np.array([pattern.ellipticity[0] for pattern in patterns], np.float64),
    )


def computed_patterns(
    name: str, title: str, frame_shape: tuple[int, int], n: int, *, seed: int
) -> PatternSet:
    """Draw n patterns that another simulator made: multislice of held-out materials.

    Center, distortion, camera length and rotation of those in `COMPUTED` are drawn anew.

    Args:
        name: Name of the set.
        title: Its title.
        frame_shape: (h, w).
        n: Number of patterns.
        seed: Counts from `FIRST_SEED`; 0 is the standard evaluation.
    """
    computed = Multislice.load(COMPUTED)
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, 4])
    expected, moved, centers, radii = [], [], [], []
    for i in range(n):
        center, ellipticity = draw_center(rng, frame_shape), draw_ellipticity(rng)
        zoom = draw_zoom(rng, frame_shape)
        turn = float(rng.uniform(0, 2 * np.pi))
        here, *near = (
            computed.place(
                i % len(computed),
                frame_shape,
                center=(center[0] + y, center[1] + x),
                ellipticity=ellipticity,
                zoom=zoom,
                turn=turn,
            )
            for y, x in ((0.0, 0.0), *_STEPS)
        )
        # a little light everywhere: what splines leave empty would count as perfect knowledge
        expected.append(_FLOOR / here.size + (1 - _FLOOR) * here)
        moved.append(_FLOOR / here.size + (1 - _FLOOR) * np.stack(near))
        centers.append(center)
        radii.append(zoom * float(computed.radii[i % len(computed)]))
    return PatternSet(
        name=name,
        title=title,
        expected=np.stack(expected),
        centers=np.array(centers, np.float64),
        radii=np.array(radii, np.float64),
        kinds=("cbed",) * n,
        detectors=(ideal_detector(frame_shape),) * n,
        seed=FIRST_SEED + seed,
        moved=np.stack(moved),
    )


def patterns_without_beam(frame_shape: tuple[int, int], n: int, *, seed: int) -> PatternSet:
    """Draw n frames that do not tell where the beam is: even or stray light, or a beam outside."""
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, 3])
    patterns = [draw_without_beam(rng, frame_shape) for _ in range(n)]
    return PatternSet(
        name="no beam",
        title="frames without a beam",
        expected=render(patterns, frame_shape).numpy(),
        centers=np.full((n, 2), np.nan),
        radii=np.full(n, np.nan),
        kinds=("blank",) * n,
        detectors=(ideal_detector(frame_shape),) * n,
        seed=FIRST_SEED + seed,
    )


def beam_radius(vacuum: NDArray[np.float32]) -> float:
    """Return the radius of a disk with the area of the pixels above half of the maximum."""
    smooth = gaussian_filter(vacuum.astype(np.float64), 1.0)
    return float(np.sqrt(np.count_nonzero(smooth > 0.5 * smooth.max()) / np.pi))


def measured_patterns(
    measured: NDArray[np.float32],
    n: int,
    *,
    seed: int,
    name: str = "measured",
    title: str = "measured content",
) -> PatternSet:
    """Draw a semi-real set: measured patterns as the expectation, shifted by known amounts.

    Where the beam truly is in a measured pattern nobody knows; shifts are exact, so centers are
    compared up to one constant per measured pattern (`PatternSet.groups`).

    Args:
        measured: (k, h, w) patterns of many counts.
        n: Number of patterns to draw.
        seed: Counts from `FIRST_SEED`.
        name: Name of the set.
        title: Its title.

    Raises:
        SimulationError: The patterns cannot serve as an expectation.
    """
    several = min(len(measured), 4, max(1, n // _LEAST_GROUP))
    chosen = measured[np.linspace(0, len(measured) - 1, several).astype(int)]
    side = int(np.ceil(np.sqrt(n)))
    scan = draw_scan(
        chosen,
        (side, side),
        dose=1.0,
        drift=Drift(plane=0.06 * min(measured.shape[1:]), walk=1.0, jump=1.0),
        seed=FIRST_SEED + seed,
    )
    expected = np.stack([scan.expectation(i) for i in range(n)])
    radii = np.array([beam_radius(pattern) for pattern in chosen])
    return PatternSet(
        name=name,
        title=title,
        expected=expected / expected.sum((1, 2), keepdims=True),
        centers=scan.centers[:n],
        radii=radii[scan.grains[:n]],
        kinds=("measured",) * n,
        detectors=(ideal_detector(scan.frame_shape),) * n,
        seed=FIRST_SEED + seed,
        groups=scan.grains[:n],
    )
