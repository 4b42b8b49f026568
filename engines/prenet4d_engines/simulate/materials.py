"""Crystals that patterns are simulated from, and which of them training may see.

Lattice parameters are room-temperature values as tabulated in R. W. G. Wyckoff, *Crystal
Structures* (2nd ed., 1963-1971), to the precision that a diffraction pattern can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Site = tuple[str, float, float, float]


@dataclass(frozen=True)
class Material:
    """One crystal: a lattice and its basis.

    Attributes:
        name: Chemical formula, unique in the table.
        lengths: Lattice parameters a, b, c in Å.
        angles: Lattice angles alpha, beta, gamma in degrees.
        sites: Element and fractional coordinates of every atom in the cell.
    """

    name: str
    lengths: tuple[float, float, float]
    angles: tuple[float, float, float]
    sites: tuple[Site, ...]

    def cell(self) -> NDArray[np.float64]:
        """Return the lattice vectors as rows, in Å: a along x, b in the xy plane."""
        a, b, c = self.lengths
        ca, cb, cg = np.cos(np.radians(self.angles))
        sg = float(np.sqrt(1.0 - cg * cg))
        cx, cy = cb, (ca - cb * cg) / sg
        cz = float(np.sqrt(1.0 - cx * cx - cy * cy))
        return np.array([[a, 0, 0], [b * cg, b * sg, 0], [c * cx, c * cy, c * cz]], np.float64)


_FCC = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))
_CUBIC = (90.0, 90.0, 90.0)
_HEX = (90.0, 90.0, 120.0)


def _at(element: str, *positions: tuple[float, float, float]) -> tuple[Site, ...]:
    return tuple((element, *p) for p in positions)


def _face_centered(element: str, x: float, y: float, z: float) -> tuple[Site, ...]:
    return tuple((element, (x + u) % 1, (y + v) % 1, (z + w) % 1) for u, v, w in _FCC)


def _cubic(name: str, a: float, sites: tuple[Site, ...]) -> Material:
    return Material(name, (a, a, a), _CUBIC, sites)


def _fcc(element: str, a: float) -> Material:
    return _cubic(element, a, _face_centered(element, 0, 0, 0))


def _bcc(element: str, a: float) -> Material:
    return _cubic(element, a, _at(element, (0, 0, 0), (0.5, 0.5, 0.5)))


def _hcp(element: str, a: float, c: float) -> Material:
    sites = _at(element, (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75))
    return Material(element, (a, a, c), _HEX, sites)


def _zincblende(name: str, a: float, one: str, other: str) -> Material:
    return _cubic(name, a, _face_centered(one, 0, 0, 0) + _face_centered(other, 0.25, 0.25, 0.25))


def _rocksalt(name: str, a: float, one: str, other: str) -> Material:
    return _cubic(name, a, _face_centered(one, 0, 0, 0) + _face_centered(other, 0.5, 0, 0))


def _fluorite(name: str, a: float, metal: str, anion: str) -> Material:
    return _cubic(
        name,
        a,
        _face_centered(metal, 0, 0, 0)
        + _face_centered(anion, 0.25, 0.25, 0.25)
        + _face_centered(anion, 0.75, 0.75, 0.75),
    )


def _perovskite(name: str, a: float, large: str, small: str) -> Material:
    return _cubic(
        name,
        a,
        _at(large, (0, 0, 0))
        + _at(small, (0.5, 0.5, 0.5))
        + _at("O", (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)),
    )


def _trilayer(name: str, a: float, c: float, metal: str, chalcogen: str) -> Material:
    """2H dichalcogenide, two trilayers a cell, chalcogens at z = 0.621."""
    z = 0.621
    sites = _at(metal, (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)) + _at(
        chalcogen,
        (1 / 3, 2 / 3, z),
        (1 / 3, 2 / 3, 1.5 - z),
        (2 / 3, 1 / 3, z - 0.5),
        (2 / 3, 1 / 3, 1 - z),
    )
    return Material(name, (a, a, c), _HEX, sites)


_RUTILE = 0.305

TRAINING: Final[dict[str, Material]] = {
    m.name: m
    for m in (
        _fcc("Al", 4.0496),
        _fcc("Cu", 3.6147),
        _fcc("Ni", 3.5238),
        _fcc("Ag", 4.0862),
        _fcc("Pt", 3.9231),
        _fcc("Pd", 3.8898),
        _bcc("Fe", 2.8665),
        _bcc("W", 3.1650),
        _bcc("Mo", 3.1473),
        _hcp("Ti", 2.950, 4.686),
        _hcp("Mg", 3.209, 5.210),
        _hcp("Co", 2.507, 4.069),
        _zincblende("Si", 5.4307, "Si", "Si"),
        _zincblende("Ge", 5.6574, "Ge", "Ge"),
        _zincblende("GaAs", 5.6537, "Ga", "As"),
        _zincblende("CdTe", 6.480, "Cd", "Te"),
        _rocksalt("MgO", 4.2112, "Mg", "O"),
        _rocksalt("NaCl", 5.6406, "Na", "Cl"),
        _cubic("NiAl", 2.881, _at("Ni", (0, 0, 0)) + _at("Al", (0.5, 0.5, 0.5))),
        _fluorite("CeO2", 5.411, "Ce", "O"),
        _perovskite("SrTiO3", 3.9051, "Sr", "Ti"),
        _trilayer("MoS2", 3.160, 12.295, "Mo", "S"),
        Material(
            "graphite",
            (2.456, 2.456, 6.696),
            _HEX,
            _at("C", (0, 0, 0.25), (0, 0, 0.75), (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)),
        ),
        Material(
            "GaN",
            (3.180, 3.180, 5.166),
            _HEX,
            _at("Ga", (1 / 3, 2 / 3, 0), (2 / 3, 1 / 3, 0.5))
            + _at("N", (1 / 3, 2 / 3, 0.375), (2 / 3, 1 / 3, 0.875)),
        ),
        Material(
            "TiO2",
            (4.594, 4.594, 2.958),
            _CUBIC,
            _at("Ti", (0, 0, 0), (0.5, 0.5, 0.5))
            + _at(
                "O",
                (_RUTILE, _RUTILE, 0),
                (1 - _RUTILE, 1 - _RUTILE, 0),
                (0.5 + _RUTILE, 0.5 - _RUTILE, 0.5),
                (0.5 - _RUTILE, 0.5 + _RUTILE, 0.5),
            ),
        ),
    )
}
"""Materials that training draws from."""

HELD_OUT: Final[dict[str, Material]] = {
    m.name: m
    for m in (
        _fcc("Au", 4.0786),
        _bcc("Cr", 2.8839),
        _hcp("Zn", 2.665, 4.947),
        _zincblende("InP", 5.8687, "In", "P"),
        _fluorite("CaF2", 5.4630, "Ca", "F"),
        _perovskite("BaTiO3", 4.0118, "Ba", "Ti"),
        _trilayer("WSe2", 3.286, 12.98, "W", "Se"),
        Material(
            "Bi",
            (4.546, 4.546, 11.862),
            _HEX,
            tuple(
                ("Bi", x, y, (z + s * 0.2339) % 1)
                for x, y, z in ((0, 0, 0), (2 / 3, 1 / 3, 1 / 3), (1 / 3, 2 / 3, 2 / 3))
                for s in (1, -1)
            ),
        ),
    )
}
"""Materials kept for evaluation: never drawn in training."""

MATERIALS: Final[dict[str, Material]] = TRAINING | HELD_OUT
