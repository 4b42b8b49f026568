"""What is in one diffraction pattern, described before a single pixel exists.

A `Pattern` lists disks, a radial profile and smooth blobs in *ideal* coordinates: pixels relative
to the direct beam, before distortion. `render` turns descriptions into images. Because the
description is analytic, its center and ellipticity are exact.

Intensities are kinematical in the positions and two-beam in the rocking curve: the excitation
error varies linearly across a convergent-beam disk, which draws its fringes, and what goes into a
reflection is missing from the direct beam at the conjugate place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.simulate.materials import TRAINING, Material
from prenet4d_engines.simulate.scattering import (
    Reflections,
    extinction_distance,
    reflections,
    wavelength,
)

Array = NDArray[np.float64]
Kind = Literal["cbed", "spots", "rings", "grains", "amorphous", "vacuum", "blank"]

KINDS: Final[dict[Kind, float]] = {
    "cbed": 0.46,
    "spots": 0.20,
    "rings": 0.10,
    "grains": 0.10,
    "amorphous": 0.08,
    "vacuum": 0.04,
    "blank": 0.02,
}
"""Content of a pattern and how often training draws it."""

# Columns of Pattern.disks.
Y, X, FLAT, ROCK, RADIUS, EDGE, S0, SY, SX, EPSILON = range(10)
RADIAL_STEP: Final = 0.25
"""Step of the radial profile in pixels."""


@dataclass(frozen=True)
class Pattern:
    """One pattern in ideal coordinates (pixels from the direct beam), and where it lands.

    Attributes:
        kind: What it shows.
        center: Direct beam (cy, cx) in frame pixels; pixel centers at integers.
        ellipticity: (ratio, theta) as everywhere: ratio >= 1, theta in [0, pi).
        disks: (k, 10): y, x, flat amplitude, rocking amplitude, radius, edge width, and the
            two-beam rocking curve s = S0 + SY dy + SX dx (in 1/thickness) with coupling EPSILON
            (thickness / extinction distance).
        radial: Radial intensity profile, sampled every RADIAL_STEP px from 0; empty for none.
        radial_share: Share of the frame's electrons that the radial profile carries.
        blobs: (m, 4): y, x, sigma, share of the frame's electrons: smooth off-center background.
        floor: Share of the frame's electrons spread evenly over it.
    """

    kind: Kind
    center: tuple[float, float]
    ellipticity: tuple[float, float] = (1.0, 0.0)
    disks: Array = field(default_factory=lambda: np.zeros((0, 10)))
    radial: Array = field(default_factory=lambda: np.zeros(0))
    radial_share: float = 0.0
    blobs: Array = field(default_factory=lambda: np.zeros((0, 4)))
    floor: float = 0.0

    @property
    def has_beam(self) -> bool:
        """Whether the pattern holds anything that tells where the direct beam is."""
        return self.kind != "blank"

    def moved(self, center: tuple[float, float]) -> Pattern:
        """Return the same pattern with its direct beam elsewhere."""
        return replace(self, center=center)


@dataclass(frozen=True)
class Optics:
    """The instrument behind a pattern: everything that stays the same over a scan.

    Attributes:
        scale: min(h, w) / 256; sizes below are in pixels of the frame itself.
        volts: Accelerating voltage in V.
        pixels_per_inverse_angstrom: Camera length.
        radius: Radius of the convergent-beam disk in pixels.
        edge: Softness of its edge in pixels (about the standard deviation of the blur).
    """

    scale: float
    volts: float
    pixels_per_inverse_angstrom: float
    radius: float
    edge: float


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


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
        spacing = _log_uniform(rng, 0.08, 0.3) * size
        radius = _log_uniform(rng, 1.5, 8.0) * scale
    elif kind == "spots":
        spacing = _log_uniform(rng, 0.05, 0.3) * size
        radius = _log_uniform(rng, 1.5, 4.0) * scale
    elif kind == "vacuum":
        spacing = 0.2 * size
        radius = _log_uniform(rng, 1.5, 60.0) * scale
    else:
        spacing = _log_uniform(rng, 0.07, 0.42) * size
        radius = float(np.clip(spacing * _log_uniform(rng, 0.12, 1.2), 2.5 * scale, 60.0 * scale))
    edge = max(0.4, _log_uniform(rng, 0.4, 2.0) * scale)
    return Optics(
        scale=scale,
        volts=float(rng.uniform(60e3, 300e3)),
        pixels_per_inverse_angstrom=spacing / _strong_spacing(reflections(material)),
        radius=radius,
        edge=min(edge, 0.4 * radius + 0.15),
    )


def draw_orientation(rng: np.random.Generator, cell: Array, tilt: float | None = None) -> Array:
    """Draw a rotation (3, 3) that takes crystal to microscope axes, beam along z.

    Two of three crystals stand near a low-index zone axis, mistilted by up to a few degrees.
    """
    if rng.random() < 0.67:
        axis = np.zeros(3)
        while not axis.any():
            axis = rng.integers(-2, 3, 3).astype(float)
        beam = axis @ cell
        mistilt = abs(rng.normal(0, 0.8)) if tilt is None else tilt
    else:
        beam, mistilt = rng.normal(size=3), 0.0
    z = beam / np.linalg.norm(beam)
    x = np.cross(z, rng.normal(size=3))
    x /= np.linalg.norm(x)
    rotation = np.stack([x, np.cross(z, x), z])
    tilted: Array = tilt_matrix(mistilt, rng.uniform(0, 2 * np.pi)) @ rotation
    return tilted


def tilt_matrix(degrees: float, azimuth: float) -> Array:
    """Return the rotation by an angle about the in-plane axis at an azimuth (radians)."""
    a = np.radians(degrees)
    u = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    cross = np.array([[0, 0, u[1]], [0, 0, -u[0]], [-u[1], u[0], 0.0]])
    rotation: Array = np.eye(3) + np.sin(a) * cross + (1 - np.cos(a)) * (cross @ cross)
    return rotation


def crystal_disks(
    rng: np.random.Generator,
    material: Material,
    optics: Optics,
    orientation: Array,
    *,
    thickness: float,
    frame_size: float,
    rocking: bool,
    strain: Array | None = None,
    most: int = 120,
) -> Array:
    """Return the disks (k, 10) of one crystal: reflections first, deficits of the beam last.

    Args:
        rng: Draws the temperature factor and the dynamical scatter of the intensities.
        material: The crystal.
        optics: The instrument.
        orientation: Rotation (3, 3) from crystal to microscope axes.
        thickness: Thickness in Å.
        frame_size: Larger side of the frame in pixels; reflections beyond it are dropped.
        rocking: Draw the rocking curve inside the disks; otherwise disks are flat.
        strain: In-plane strain tensor (2, 2), or None.
        most: Keep at most that many reflections, the strongest.
    """
    found = reflections(material)
    lam = wavelength(optics.volts)
    per_px = 1.0 / optics.pixels_per_inverse_angstrom
    g = found.g @ orientation.T
    xy = g[:, :2] if strain is None else g[:, :2] @ (np.eye(2) - strain)
    s0 = thickness * (-g[:, 2] - 0.5 * lam * found.length**2)
    slope = thickness * lam * per_px * xy  # per pixel, (n, [x, y])
    reach = np.abs(s0) - np.linalg.norm(slope, axis=1) * optics.radius
    nearest = np.maximum(reach, 0.0)
    epsilon = thickness / extinction_distance(found.amplitude, found.volume, optics.volts)
    b_factor = rng.uniform(0.2, 1.2)
    warm = np.exp(-0.5 * b_factor * found.length**2)
    envelope = epsilon**2 * np.minimum(1.0, 1.0 / (nearest**2 + epsilon**2)) * warm
    inside = np.abs(xy).max(1) < frame_size * per_px
    candidates = np.flatnonzero(inside & (envelope > 1e-4))
    chosen = candidates[np.argsort(envelope[candidates])[::-1][:most]]

    disks = np.zeros((len(chosen), 10))
    disks[:, X], disks[:, Y] = (xy[chosen] / per_px).T
    scatter = warm[chosen] * np.exp(rng.normal(0, 0.45, len(chosen)))
    if rocking:
        disks[:, ROCK] = scatter
        disks[:, S0] = s0[chosen]
        disks[:, SX], disks[:, SY] = slope[chosen].T
        disks[:, EPSILON] = epsilon[chosen]
    else:
        disks[:, FLAT] = envelope[chosen] * np.exp(rng.normal(0, 0.45, len(chosen)))
    if rocking and len(chosen):
        deficits = disks[:4].copy()
        deficits[:, [Y, X]] = 0.0
        deficits[:, ROCK] = -0.9 * scatter[:4] / max(1.0, scatter[:4].sum())
        disks = np.concatenate([disks, deficits])
    disks[:, RADIUS], disks[:, EDGE] = optics.radius, optics.edge
    return disks


def direct_disk(optics: Optics, amplitude: float = 1.0) -> Array:
    """Return the direct beam as one flat disk, (1, 10)."""
    disk = np.zeros((1, 10))
    disk[0, FLAT], disk[0, RADIUS], disk[0, EDGE] = amplitude, optics.radius, optics.edge
    return disk


def ring_profile(
    rng: np.random.Generator, material: Material, optics: Optics, length: int
) -> Array:
    """Return the powder pattern of a material as a radial profile of `length` steps."""
    found = reflections(material)
    rho = np.arange(length) * RADIAL_STEP
    radius, start = np.unique(np.round(found.length, 4), return_index=True)
    warm = np.exp(-0.5 * rng.uniform(0.3, 1.5) * found.length**2)
    power = np.add.reduceat(found.amplitude**2 * warm, start)
    at = radius * optics.pixels_per_inverse_angstrom
    near = (at < rho[-1]) & (power > 1e-4 * power.max())
    width = np.hypot(_log_uniform(rng, 0.8, 5.0) * optics.scale, 0.5 * optics.radius)
    width = np.hypot(width, 0.4)
    eta = rng.uniform(0, 0.6)
    u = (rho[None] - at[near, None]) / width
    shape = (1 - eta) * np.exp(-0.5 * u**2) + eta / (1 + u**2)
    weight = power[near] / at[near] ** 2
    if rng.random() < 0.5:
        weight *= np.exp(rng.normal(0, 0.4, len(weight)))  # texture
    profile: Array = (weight[:, None] * shape).sum(0)
    return profile / max(float(profile.max()), 1e-30)


def halo_profile(rng: np.random.Generator, optics: Optics, spacing: float, length: int) -> Array:
    """Return an amorphous profile: a few broad halos, the first near `spacing` px."""
    rho = np.arange(length) * RADIAL_STEP
    profile = np.zeros(length)
    at, height = spacing * rng.uniform(0.8, 1.2), 1.0
    for _ in range(int(rng.integers(1, 4))):
        width = np.hypot(at * rng.uniform(0.07, 0.22), optics.radius * 0.5)
        profile += height * np.exp(-0.5 * ((rho - at) / width) ** 2)
        at *= rng.uniform(1.5, 2.0)
        height *= rng.uniform(0.2, 0.6)
    return profile


def diffuse_profile(rng: np.random.Generator, optics: Optics, size: float, length: int) -> Array:
    """Return what inelastic and thermal scattering leave: a smooth fall-off from the beam."""
    rho = np.hypot(np.arange(length) * RADIAL_STEP, 0.7 * optics.radius)
    near = _log_uniform(rng, 0.02, 0.3) * size
    if rng.random() < 0.5:
        return np.asarray(np.exp(-rho / near))
    return np.asarray((1 + (rho / near) ** 2) ** -rng.uniform(0.7, 2.5))


def _grains(rng: np.random.Generator, material: Material, optics: Optics, size: float) -> Array:
    """Spots of many small crystals: reflections at random azimuths."""
    found = reflections(material)
    at = found.length * optics.pixels_per_inverse_angstrom
    weight = found.amplitude**2 * np.exp(-0.6 * found.length**2) / at * (at < 0.8 * size)
    count = int(_log_uniform(rng, 12, 400))
    picked = rng.choice(len(at), count, p=weight / weight.sum())
    azimuth = rng.uniform(0, 2 * np.pi, count)
    disks = np.zeros((count, 10))
    disks[:, Y], disks[:, X] = at[picked] * np.sin(azimuth), at[picked] * np.cos(azimuth)
    disks[:, FLAT] = rng.exponential(1.0, count) * found.amplitude[picked] ** 2
    disks[:, FLAT] /= max(float(disks[:, FLAT].max()), 1e-30)
    disks[:, RADIUS], disks[:, EDGE] = optics.radius, optics.edge
    return disks


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
    """
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

    disks = direct_disk(optics, _log_uniform(rng, 0.3, 3.0))
    radial = np.zeros(length)
    share = 0.0
    if kind in ("cbed", "spots"):
        crystals = 2 if rng.random() < 0.12 else 1
        rocking = kind == "cbed" or rng.random() < 0.4
        for _ in range(crystals):
            disks = np.concatenate([disks, _draw_crystal(rng, material, optics, longest, rocking)])
        if rng.random() < 0.2:
            radial = halo_profile(rng, optics, _spacing(optics, material), length)
            share = rng.uniform(0.02, 0.4)
    elif kind == "rings":
        radial = ring_profile(rng, material, optics, length)
        share = rng.uniform(0.15, 0.95)
    elif kind == "grains":
        spots = _grains(rng, material, optics, size)
        spots[:, FLAT] *= _log_uniform(rng, 0.05, 1.5)
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
    floor = _log_uniform(rng, 1e-4, 0.1)
    if kind == "blank":
        disks, radial, share = np.zeros((0, 10)), np.zeros(0), 0.0
        floor = 1.0
    return Pattern(kind, center, ellipticity, disks, radial, share, blobs, floor)


def _spacing(optics: Optics, material: Material) -> float:
    return optics.pixels_per_inverse_angstrom * _strong_spacing(reflections(material))


def _draw_crystal(
    rng: np.random.Generator, material: Material, optics: Optics, longest: float, rocking: bool
) -> Array:
    cell = reflections(material).cell
    strain = rng.normal(0, 0.006, (2, 2))
    disks = crystal_disks(
        rng,
        material,
        optics,
        draw_orientation(rng, cell),
        thickness=_log_uniform(rng, 40.0, 1200.0),
        frame_size=longest,
        rocking=rocking,
        strain=0.5 * (strain + strain.T),
    )
    gain = _log_uniform(rng, 0.3, 5.0)
    direct = np.hypot(disks[:, Y], disks[:, X]) == 0
    disks[~direct, FLAT] *= gain
    disks[~direct, ROCK] *= gain
    return disks


def _mix(one: Array, share: float, other: Array, other_share: float) -> tuple[Array, float]:
    """Add two radial profiles with the shares of electrons they carry over the plane."""
    rho = np.arange(len(one)) + 0.5

    def unit(profile: Array) -> Array:
        total = float((profile * rho).sum())
        return profile / total if total > 0 else profile

    both = share + other_share * (1 - share)
    return share * unit(one) + other_share * (1 - share) * unit(other), both
