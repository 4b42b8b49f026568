"""Electron scattering: wavelength, scattering factors, and the reflections of a crystal.

Scattering factors: I. Lobato and D. Van Dyck, Acta Cryst. A70 (2014) 636, neutral atoms,
``f(g) = sum_i a_i (2 + b_i g^2) / (1 + b_i g^2)^2``, f in Å, g = 1/d in 1/Å, first Born
approximation without the relativistic mass factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.simulate.lobato import LOBATO
from prenet4d_engines.simulate.materials import Material

Array = NDArray[np.float64]

G_MAX: Final = 3.0
"""Reflections up to this length (1/Å) are kept: d down to 0.33 Å, many first Laue zones' rings."""

_REST_ENERGY_EV: Final = 510998.95


def wavelength(volts: float) -> float:
    """Return the relativistic electron wavelength in Å for an accelerating voltage in V."""
    return float(12.2642597 / np.sqrt(volts * (1.0 + volts / (2.0 * _REST_ENERGY_EV))))


def mass_factor(volts: float) -> float:
    """Return the relativistic mass factor m/m0 for an accelerating voltage in V."""
    return 1.0 + volts / _REST_ENERGY_EV


def scattering_factor(element: str, g: Array) -> Array:
    """Return f(g) in Å for an element (see the module's source), g in 1/Å."""
    a, b = (np.asarray(v)[:, None] for v in LOBATO[element])
    bg = b * (np.ravel(g) ** 2)[None]
    value: Array = (a * (2.0 + bg) / (1.0 + bg) ** 2).sum(0)
    return value.reshape(np.shape(g))


@dataclass(frozen=True)
class Reflections:
    """The allowed reflections of a crystal in its own Cartesian frame.

    Attributes:
        hkl: Miller indices, (n, 3) int64.
        g: Reciprocal vectors in 1/Å, (n, 3).
        length: |g| in 1/Å, (n,), ascending.
        amplitude: |F| in Å per cell, no temperature factor, (n,).
        volume: Cell volume in Å^3.
        cell: Lattice vectors as rows in Å, (3, 3).
    """

    hkl: NDArray[np.int64]
    g: Array
    length: Array
    amplitude: Array
    volume: float
    cell: Array


@lru_cache(maxsize=256)
def reflections(material: Material) -> Reflections:
    """Return all reflections of a material with 0 < |g| <= G_MAX and |F| not negligible."""
    cell = material.cell()
    reciprocal = np.linalg.inv(cell).T  # rows a*, b*, c*
    reach = np.ceil(G_MAX * np.linalg.norm(cell, axis=1)).astype(int)
    axes = [np.arange(-n, n + 1) for n in reach]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    g = hkl @ reciprocal
    length = np.linalg.norm(g, axis=1)
    keep = (length > 1e-9) & (length <= G_MAX)
    hkl, g, length = hkl[keep], g[keep], length[keep]

    structure = np.zeros(len(hkl), np.complex128)
    for element in sorted({site[0] for site in material.sites}):
        xyz = np.array([site[1:] for site in material.sites if site[0] == element])
        phases = np.exp(2j * np.pi * (hkl @ xyz.T)).sum(1)
        structure += scattering_factor(element, length) * phases
    amplitude = np.abs(structure)

    allowed = amplitude > 1e-3 * amplitude.max()
    order = np.argsort(length[allowed], kind="stable")
    volume = float(abs(np.linalg.det(cell)))
    return Reflections(
        hkl[allowed][order],
        g[allowed][order],
        length[allowed][order],
        amplitude[allowed][order],
        volume,
        cell,
    )


def extinction_distance(amplitude: Array, volume: float, volts: float) -> Array:
    """Return the two-beam extinction distances in Å: pi V / (lambda gamma |F|)."""
    return np.pi * volume / (wavelength(volts) * mass_factor(volts) * np.maximum(amplitude, 1e-9))
