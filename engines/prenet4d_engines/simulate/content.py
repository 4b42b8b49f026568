"""What crystals, powders and glasses send where: the parts that patterns are made of.

Intensities are kinematical in the positions and two-beam in the rocking curve: the excitation
error varies linearly across a convergent-beam disk, which draws its fringes, and what goes into a
reflection is missing from the direct beam at the conjugate place.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from prenet4d_engines.simulate.materials import Material
from prenet4d_engines.simulate.pattern import (
    EDGE,
    EPSILON,
    FLAT,
    RADIAL_STEP,
    RADIUS,
    ROCK,
    S0,
    SX,
    SY,
    Array,
    Optics,
    X,
    Y,
)
from prenet4d_engines.simulate.scattering import (
    extinction_distance,
    mass_factor,
    reflections,
    wavelength,
)

_REFLECTIONS: Final = 120
"""Of one crystal, the strongest, that are drawn at most."""
_HOLZ_LINES: Final = 8
_HOLZ_STEEPNESS: Final = 4.0
"""Reflections whose rocking curve is that steep across the disk draw lines, not fringes."""
_BANDS: Final = 14
"""Kikuchi bands that one crystal draws at most."""


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_orientation(rng: np.random.Generator, cell: Array) -> Array:
    """Draw a rotation (3, 3) that takes crystal to microscope axes, beam along z.

    Two of three crystals stand near a low-index zone axis, mistilted by up to a few degrees.
    """
    if rng.random() < 0.67:
        axis = np.zeros(3)
        while not axis.any():
            axis = rng.integers(-2, 3, 3).astype(float)
        beam = axis @ cell
        mistilt = abs(rng.normal(0, 0.8))
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


def precessed(s0: Array, epsilon: Array, swing: Array) -> Array:
    """Return the mean of ``epsilon² / (s² + epsilon²)`` over a round of the beam.

    Precession (Vincent and Midgley 1994) takes the excitation error of a reflection through
    ``s = s0 + swing cos(a)``, so that it passes the Ewald sphere twice a round.

    Args:
        s0: (n,) excitation errors of the beam in the cone's axis.
        epsilon: (n,) half widths, in the same units.
        swing: (n,) cone's half angle times ``|g|``, in the same units.
    """
    at = s0 - 1j * epsilon
    root = np.sqrt(at**2 - swing**2)
    root = np.where((root * at.conj()).real < 0, -root, root)  # the branch that is `at` at swing 0
    mean: Array = epsilon * (1.0 / root).imag
    return mean


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
    precession: float = 0.0,
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
        precession: Half angle in radians of the cone that the beam precesses on, the pattern
            descanned; 0 for a beam that stands still.
    """
    found = reflections(material)
    lam = wavelength(optics.volts)
    per_px = 1.0 / optics.pixels_per_inverse_angstrom
    g = found.g @ orientation.T
    xy = g[:, :2] if strain is None else g[:, :2] @ (np.eye(2) - strain)
    s0 = thickness * (-g[:, 2] - 0.5 * lam * found.length**2)
    slope = -thickness * lam * per_px * xy  # per pixel, (n, [x, y]): bright toward the beam
    reach = np.abs(s0) - np.linalg.norm(slope, axis=1) * optics.radius
    nearest = np.maximum(reach, 0.0)
    epsilon = thickness / extinction_distance(found.amplitude, found.volume, optics.volts)
    b_factor = rng.uniform(0.2, 1.2)
    warm = np.exp(-0.5 * b_factor * found.length**2)
    if precession > 0:
        swing = thickness * precession * np.hypot(*xy.T)
        envelope = precessed(s0, epsilon, swing) * warm
    else:
        envelope = epsilon**2 * np.minimum(1.0, 1.0 / (nearest**2 + epsilon**2)) * warm
    inside = np.abs(xy).max(1) < frame_size * per_px
    candidates = np.flatnonzero(inside & (envelope > 1e-4))
    chosen = candidates[np.argsort(envelope[candidates])[::-1][:_REFLECTIONS]]

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
        deficits[:, ROCK] = -0.9 * scatter[:4] / max(1.0, scatter[:4].sum())
        steep = np.linalg.norm(slope[chosen], axis=1) * optics.radius
        narrow = np.flatnonzero((steep > _HOLZ_STEEPNESS) & (np.abs(s0[chosen]) < steep))
        narrow = narrow[narrow >= len(deficits)]
        lines = disks[narrow[:_HOLZ_LINES]].copy()
        lines[:, ROCK] = -0.9
        lines = np.concatenate([deficits, lines])
        lines[:, [Y, X]] = 0.0
        disks = np.concatenate([disks, lines])
    disks[:, RADIUS], disks[:, EDGE] = optics.radius, optics.edge
    return disks


def kikuchi_bands(
    material: Material, optics: Optics, orientation: Array, frame_size: float
) -> Array:
    """Return the Kikuchi bands (k, 6) of one crystal: what it does to its own diffuse scattering.

    Electrons that were scattered diffusely into a direction that meets Bragg's law for a reflection
    g leave it for the direction plus g. Both directions lie on lines perpendicular to g, at
    -(g_z / lambda + g^2 / 2) / g_xy and |g_xy| further on. They move with the crystal, not with the
    beam; the line nearer to the beam loses, the other one gains. Between them a strong reflection
    draws a bright band. The width of a line is that of the two-beam rocking curve.

    Returns:
        normal y and x, middle, half width, softness (px), strength (1 for the strongest).
    """
    found = reflections(material)
    g = found.g @ orientation.T
    across = np.linalg.norm(g[:, :2], axis=1)
    # one of each pair +g, -g; not those along the beam, whose lines are far from straight
    chosen = (across > 0.7 * found.length) & ((g[:, 1] > 0) | ((g[:, 1] == 0) & (g[:, 0] > 0)))
    middle = -g[:, 2] / wavelength(optics.volts) / np.maximum(across, 1e-12)
    half = 0.5 * found.length**2 / np.maximum(across, 1e-12)
    per_angstrom = optics.pixels_per_inverse_angstrom
    chosen &= (np.abs(middle) - half) * per_angstrom < 0.7 * frame_size
    picked = np.flatnonzero(chosen)
    power = found.amplitude[picked] * np.exp(-0.25 * found.length[picked] ** 2)
    picked = picked[np.argsort(power)[::-1][:_BANDS]]
    width = found.amplitude[picked] * mass_factor(optics.volts) / (np.pi * found.volume)
    bands = np.zeros((len(picked), 6))
    bands[:, 0], bands[:, 1] = (g[picked, 1::-1] / across[picked, None]).T
    bands[:, 2], bands[:, 3] = middle[picked] * per_angstrom, half[picked] * per_angstrom
    bands[:, 4] = np.hypot(per_angstrom * width / found.length[picked], 0.6)
    if len(picked):
        bands[:, 5] = found.amplitude[picked] / found.amplitude[picked].max()
    return bands


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
    width = np.hypot(log_uniform(rng, 0.8, 5.0) * optics.scale, 0.5 * optics.radius)
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
    near = log_uniform(rng, 0.02, 0.3) * size
    if rng.random() < 0.5:
        return np.asarray(np.exp(-rho / near))
    return np.asarray((1 + (rho / near) ** 2) ** -rng.uniform(0.7, 2.5))


def grain_disks(rng: np.random.Generator, material: Material, optics: Optics, size: float) -> Array:
    """Spots of many small crystals: reflections at random azimuths."""
    found = reflections(material)
    at = found.length * optics.pixels_per_inverse_angstrom
    weight = found.amplitude**2 * np.exp(-0.6 * found.length**2) / at * (at < 0.8 * size)
    count = int(log_uniform(rng, 12, 400))
    picked = rng.choice(len(at), count, p=weight / weight.sum())
    azimuth = rng.uniform(0, 2 * np.pi, count)
    disks = np.zeros((count, 10))
    disks[:, Y], disks[:, X] = at[picked] * np.sin(azimuth), at[picked] * np.cos(azimuth)
    # how often a reflection is picked makes the rings' intensities; grains differ in size
    disks[:, FLAT] = rng.exponential(1.0, count)
    disks[:, FLAT] /= disks[:, FLAT].max()
    disks[:, RADIUS], disks[:, EDGE] = optics.radius, optics.edge
    return disks
