"""Drawing patterns at random: the instrument, the geometry, the content."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from prenet4d_engines.errors import SimulationError
from prenet4d_engines.simulate.content import (
    crystal_disks,
    diffuse_profile,
    direct_disk,
    draw_orientation,
    grain_disks,
    halo_profile,
    kikuchi_bands,
    log_uniform,
    ring_profile,
)
from prenet4d_engines.simulate.materials import TRAINING, Material
from prenet4d_engines.simulate.pattern import (
    FLAT,
    KINDS,
    RADIAL_STEP,
    RADIUS,
    ROCK,
    Array,
    Kind,
    Optics,
    Pattern,
    X,
    Y,
)
from prenet4d_engines.simulate.scattering import Reflections, reflections

_WITH_KIKUCHI: Final = 0.4
"""Share of single crystals whose diffuse scattering shows Kikuchi bands."""
_PRECESSED: Final = 0.5
"""Share of the spot patterns without fringes that a precessing beam makes."""
_WAVES: Final = 48
"""Waves that make a speckle field: enough for its intensities to be distributed exponentially."""
_SPECKLE_WIDTH: Final = 3.23
"""Width at half maximum of (2 J1(x) / x)², the correlation of speckle from a round patch."""


def _strong_spacing(found: Reflections) -> float:
    """Shortest |g| that is not nearly forbidden, in 1/Å."""
    return float(found.length[np.argmax(found.amplitude > 0.25 * found.amplitude.max())])


def draw_optics(
    rng: np.random.Generator, kind: Kind, material: Material, frame_shape: tuple[int, int]
) -> Optics:
    """Draw a camera length, voltage and convergence angle that suit the content."""
    size = min(frame_shape)
    scale = size / 256
    if kind in ("rings", "grains", "amorphous"):
        spacing = log_uniform(rng, 0.08, 0.3) * size
        radius = log_uniform(rng, 1.5, 8.0) * scale
    elif kind == "spots":
        spacing = log_uniform(rng, 0.05, 0.3) * size
        radius = log_uniform(rng, 1.5, 4.0) * scale
    elif kind == "vacuum":
        spacing = 0.2 * size
        radius = log_uniform(rng, 1.5, 60.0) * scale
    else:
        spacing = log_uniform(rng, 0.07, 0.42) * size
        radius = float(np.clip(spacing * log_uniform(rng, 0.12, 1.2), 2.5 * scale, 60.0 * scale))
    edge = max(0.4, log_uniform(rng, 0.4, 2.0) * scale)
    return Optics(
        scale=scale,
        volts=float(rng.uniform(60e3, 300e3)),
        pixels_per_inverse_angstrom=spacing / _strong_spacing(reflections(material)),
        radius=radius,
        edge=min(edge, 0.4 * radius + 0.15),
    )


def draw_ellipticity(rng: np.random.Generator, largest: float = 1.12) -> tuple[float, float]:
    """Draw a distortion: ln(ratio) uniform up to the largest, any angle."""
    return float(np.exp(rng.uniform(0, np.log(largest)))), float(rng.uniform(0, np.pi))


def draw_center(
    rng: np.random.Generator, frame_shape: tuple[int, int], reach: float = 0.2
) -> tuple[float, float]:
    """Draw a center uniformly within +-reach of the frame's sides around its middle."""
    h, w = frame_shape
    return (
        float((h - 1) / 2 + rng.uniform(-reach, reach) * h),
        float((w - 1) / 2 + rng.uniform(-reach, reach) * w),
    )


def draw_pattern(
    rng: np.random.Generator,
    frame_shape: tuple[int, int],
    *,
    kind: Kind | None = None,
    material: Material | None = None,
    center: tuple[float, float] | None = None,
    ellipticity: tuple[float, float] | None = None,
    optics: Optics | None = None,
) -> Pattern:
    """Draw one pattern.

    Args:
        rng: Source of randomness; the same state gives the same pattern.
        frame_shape: (h, w) of the frame; sizes scale with its smaller side.
        kind: Content, or None to draw one by KINDS.
        material: Crystal, or None to draw one of the training materials.
        center: Direct beam (cy, cx) in px, or None for anywhere within +-20 %.
        ellipticity: (ratio, theta), or None for a ratio up to 1.12 at any angle.
        optics: The instrument, or None to draw one that suits the content.

    Raises:
        SimulationError: No such kind, a center that is no place, or a ratio below 1.
    """
    if kind is not None and kind not in (*KINDS, "blank"):
        raise SimulationError(f"There is no kind of pattern {kind!r}. Known: {', '.join(KINDS)}.")
    if center is not None and not np.isfinite(center).all():
        raise SimulationError(f"The center is a pair of pixel coordinates, not {center}.")
    if ellipticity is not None and not (np.isfinite(ellipticity).all() and ellipticity[0] >= 1):
        raise SimulationError(
            f"An ellipticity is a ratio a/b from 1 up and an angle in radians, not {ellipticity}."
        )
    if kind is None:
        kind = list(KINDS)[rng.choice(len(KINDS), p=np.array(list(KINDS.values())))]
    if material is None:
        material = list(TRAINING.values())[rng.integers(len(TRAINING))]
    if center is None:
        center = draw_center(rng, frame_shape)
    if ellipticity is None:
        ellipticity = draw_ellipticity(rng)
    if optics is None:
        optics = draw_optics(rng, kind, material, frame_shape)
    size, longest = float(min(frame_shape)), float(max(frame_shape))
    length = int(1.5 * longest / RADIAL_STEP) + 2

    beam = log_uniform(rng, 0.3, 3.0)
    disks = direct_disk(optics, beam)
    radial = np.zeros(length)
    share = 0.0
    if kind in ("cbed", "spots"):
        crystals = 2 if rng.random() < 0.12 else 1
        rocking = kind == "cbed" or rng.random() < 0.4
        precession = 0.0
        if not rocking and rng.random() < _PRECESSED:
            precession = np.radians(log_uniform(rng, 0.3, 3.0))
        for _ in range(crystals):
            orientation = draw_orientation(rng, reflections(material).cell)
            crystal = _draw_crystal(
                rng, material, optics, orientation, longest, rocking, precession, beam / crystals
            )
            disks = np.concatenate([disks, crystal])
        if rng.random() < 0.2:
            radial = halo_profile(rng, optics, _spacing(optics, material), length)
            share = rng.uniform(0.02, 0.4)
    elif kind == "rings":
        radial = ring_profile(rng, material, optics, length)
        share = rng.uniform(0.15, 0.95)
    elif kind == "grains":
        spots = grain_disks(rng, material, optics, size)
        spots[:, FLAT] *= log_uniform(rng, 0.05, 1.5)
        disks = np.concatenate([disks, spots])
        if rng.random() < 0.5:
            radial, share = ring_profile(rng, material, optics, length), rng.uniform(0.02, 0.5)
    elif kind == "amorphous":
        radial = halo_profile(rng, optics, _spacing(optics, material), length)
        share = rng.uniform(0.1, 0.95)

    diffuse = diffuse_profile(rng, optics, size, length)
    diffuse_share = rng.beta(0.7, 2.0) * 0.7 if kind != "vacuum" else rng.beta(0.5, 6.0) * 0.3
    radial, share = _mix(radial, share, diffuse, diffuse_share)

    blobs = np.zeros((0, 4))
    if rng.random() < 0.3:
        count = int(rng.integers(1, 3))
        blobs = np.empty((count, 4))
        blobs[:, :2] = rng.normal(0, 0.35 * size, (count, 2))
        blobs[:, 2] = rng.uniform(0.12, 0.5, count) * size
        blobs[:, 3] = rng.uniform(0.005, 0.12, count)
    floor = log_uniform(rng, 1e-4, 0.1)
    bands = np.zeros((0, 6))
    if kind in ("cbed", "spots") and crystals == 1 and rng.random() < _WITH_KIKUCHI:
        bands = kikuchi_bands(material, optics, orientation, longest)
        bands[:, 5] *= rng.uniform(0.05, 0.6)
    if kind == "blank":
        disks, radial, share = np.zeros((0, 10)), np.zeros(0), 0.0
        floor = 1.0
    return Pattern(kind, center, ellipticity, disks, radial, share, blobs, floor, bands)


def speckled(rng: np.random.Generator, pattern: Pattern) -> Pattern:
    """Return the pattern as a disordered film shows it under a coherent beam, if there is one.

    Speckle is about as large as the beam's disk. A thin film's obeys Friedel's law, as its
    scattered wave is the transform of a real potential; multiple scattering breaks it.
    """
    if pattern.kind in ("vacuum", "blank"):
        return pattern
    radius = float(pattern.disks[0, RADIUS])
    fine = _SPECKLE_WIDTH / max(2.0, radius * log_uniform(rng, 0.5, 2.0))
    reach, angle = fine * np.sqrt(rng.uniform(0, 1, _WAVES)), rng.uniform(0, 2 * np.pi, _WAVES)
    even, odd = rng.normal(0, 1, (2, _WAVES))
    odd *= rng.uniform(0, 1)
    amplitude = np.stack([even, odd], 1) / np.sqrt((even**2 + odd**2).sum())
    waves = np.column_stack([reach * np.sin(angle), reach * np.cos(angle), amplitude])
    in_disks = log_uniform(rng, 0.02, 0.4) if rng.random() < 0.5 else 0.0
    return replace(pattern, speckle=waves, speckled=(in_disks, log_uniform(rng, 0.05, 1.0)))


def _spacing(optics: Optics, material: Material) -> float:
    return optics.pixels_per_inverse_angstrom * _strong_spacing(reflections(material))


def _draw_crystal(
    rng: np.random.Generator,
    material: Material,
    optics: Optics,
    orientation: Array,
    longest: float,
    rocking: bool,
    precession: float,
    beam: float,
) -> Array:
    """Return one crystal's disks; `beam` is how much of the direct beam passes through it."""
    strain = rng.normal(0, 0.006, (2, 2))
    disks = crystal_disks(
        rng,
        material,
        optics,
        orientation,
        thickness=log_uniform(rng, 40.0, 1200.0),
        frame_size=longest,
        rocking=rocking,
        strain=0.5 * (strain + strain.T),
        precession=precession,
    )
    gain = log_uniform(rng, 0.3, 5.0)
    direct = np.hypot(disks[:, Y], disks[:, X]) == 0
    disks[~direct, FLAT] *= gain
    disks[~direct, ROCK] *= gain
    disks[direct, ROCK] *= beam
    return disks


def _mix(one: Array, share: float, other: Array, other_share: float) -> tuple[Array, float]:
    """Add two radial profiles with the shares of electrons they carry over the plane."""
    rho = np.arange(len(one)) + 0.5

    def unit(profile: Array) -> Array:
        total = float((profile * rho).sum())
        return profile / total if total > 0 else profile

    both = share + other_share * (1 - share)
    return share * unit(one) + other_share * (1 - share) * unit(other), both
