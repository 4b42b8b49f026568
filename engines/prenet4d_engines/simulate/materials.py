"""Crystals that patterns are simulated from, and which of them training may see.

Lattice parameters and positions are room-temperature values as tabulated in R. W. G. Wyckoff,
*Crystal Structures* (2nd ed., 1963-1971), to the precision that a diffraction pattern can tell;
PbTiO3 after Shirane, Pepinsky and Frazer, Acta Cryst. 9 (1956) 131; black phosphorus after Brown
and Rundqvist, Acta Cryst. 19 (1965) 684; monoclinic ZrO2 after McCullough and Trueblood, Acta
Cryst. 12 (1959) 507.
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


def _spinel(name: str, a: float, tetrahedral: str, octahedral: str, u: float) -> Material:
    """Normal spinel, origin at a tetrahedral site (-43m), oxygen at (u, u, u) with u near 3/8."""
    v = 0.25 - u
    tetra = ((0.0, 0.0, 0.0), (0.25, 0.25, 0.25))
    octa = (
        (0.625, 0.625, 0.625),
        (0.625, 0.875, 0.875),
        (0.875, 0.625, 0.875),
        (0.875, 0.875, 0.625),
    )
    oxygen: tuple[tuple[float, float, float], ...] = (
        (u, u, u),
        (u, -u, -u),
        (-u, u, -u),
        (-u, -u, u),
    )
    oxygen += ((v, v, v), (v, 0.25 + u, 0.25 + u), (0.25 + u, v, 0.25 + u), (0.25 + u, 0.25 + u, v))
    sites: tuple[Site, ...] = ()
    for element, positions in ((tetrahedral, tetra), (octahedral, octa), ("O", oxygen)):
        for position in positions:
            sites += _face_centered(element, *position)
    return _cubic(name, a, sites)


def _wurtzite(name: str, a: float, c: float, metal: str, anion: str, u: float) -> Material:
    return Material(
        name,
        (a, a, c),
        _HEX,
        _at(metal, (1 / 3, 2 / 3, 0), (2 / 3, 1 / 3, 0.5))
        + _at(anion, (1 / 3, 2 / 3, u), (2 / 3, 1 / 3, 0.5 + u)),
    )


def _rutile(name: str, a: float, c: float, metal: str, u: float) -> Material:
    return Material(
        name,
        (a, a, c),
        _CUBIC,
        _at(metal, (0, 0, 0), (0.5, 0.5, 0.5))
        + _at(
            "O",
            (u, u, 0),
            (1 - u, 1 - u, 0),
            (0.5 + u, 0.5 - u, 0.5),
            (0.5 - u, 0.5 + u, 0.5),
        ),
    )


def _rhombohedral(
    name: str, a: float, c: float, *basis: tuple[str, tuple[tuple[float, float, float], ...]]
) -> Material:
    """Hexagonal cell of a rhombohedral lattice (obverse setting): the basis at three points."""
    lattice = ((0.0, 0.0, 0.0), (2 / 3, 1 / 3, 1 / 3), (1 / 3, 2 / 3, 2 / 3))
    sites = tuple(
        (element, (x + u) % 1, (y + v) % 1, (z + w) % 1)
        for element, positions in basis
        for x, y, z in positions
        for u, v, w in lattice
    )
    return Material(name, (a, a, c), _HEX, sites)


def _corundum(name: str, a: float, c: float, metal: str, z: float, x: float) -> Material:
    return _rhombohedral(
        name,
        a,
        c,
        (metal, ((0, 0, z), (0, 0, 0.5 - z), (0, 0, -z), (0, 0, 0.5 + z))),
        (
            "O",
            (
                (x, 0, 0.25),
                (0, x, 0.25),
                (-x, -x, 0.25),
                (-x, 0, 0.75),
                (0, -x, 0.75),
                (x, x, 0.75),
            ),
        ),
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
        _wurtzite("GaN", 3.180, 5.166, "Ga", "N", 0.375),
        _rutile("TiO2", 4.594, 2.958, "Ti", 0.305),
        _fcc("Pb", 4.9505),
        _fcc("Rh", 3.8031),
        _fcc("Ir", 3.8389),
        _bcc("V", 3.0240),
        _bcc("Nb", 3.3004),
        _bcc("Ta", 3.3058),
        _hcp("Zr", 3.232, 5.147),
        _hcp("Re", 2.7609, 4.4583),
        _hcp("Ru", 2.7039, 4.2817),
        _zincblende("diamond", 3.5668, "C", "C"),
        _zincblende("GaP", 5.4505, "Ga", "P"),
        _zincblende("InAs", 6.036, "In", "As"),
        _zincblende("AlAs", 5.6622, "Al", "As"),
        _zincblende("GaSb", 6.118, "Ga", "Sb"),
        _zincblende("ZnSe", 5.6676, "Zn", "Se"),
        _zincblende("SiC", 4.348, "Si", "C"),
        _rocksalt("NiO", 4.1684, "Ni", "O"),
        _rocksalt("PbTe", 6.454, "Pb", "Te"),
        _rocksalt("LiF", 4.0173, "Li", "F"),
        _rocksalt("TiN", 4.235, "Ti", "N"),
        _rocksalt("KCl", 6.2929, "K", "Cl"),
        _cubic("CsCl", 4.123, _at("Cs", (0, 0, 0)) + _at("Cl", (0.5, 0.5, 0.5))),
        _cubic(
            "Cu3Au",
            3.748,
            _at("Au", (0, 0, 0)) + _at("Cu", (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)),
        ),
        _fluorite("ThO2", 5.5997, "Th", "O"),
        _fluorite("BaF2", 6.2001, "Ba", "F"),
        _perovskite("LaAlO3", 3.778, "La", "Al"),
        _perovskite("BaZrO3", 4.1929, "Ba", "Zr"),
        Material(
            "PbTiO3",
            (3.904, 3.904, 4.152),
            _CUBIC,
            _at("Pb", (0, 0, 0))
            + _at("Ti", (0.5, 0.5, 0.541))
            + _at("O", (0.5, 0.5, 0.112), (0.5, 0, 0.612), (0, 0.5, 0.612)),
        ),
        _spinel("MgAl2O4", 8.0800, "Mg", "Al", 0.387),
        _spinel("Fe3O4", 8.3940, "Fe", "Fe", 0.379),
        _wurtzite("ZnO", 3.2495, 5.2069, "Zn", "O", 0.382),
        _wurtzite("CdS", 4.1348, 6.7490, "Cd", "S", 0.377),
        _wurtzite("AlN", 3.111, 4.978, "Al", "N", 0.385),
        _rutile("SnO2", 4.7373, 3.1864, "Sn", 0.307),
        _corundum("Al2O3", 4.7589, 12.991, "Al", 0.352, 0.306),
        _corundum("Fe2O3", 5.035, 13.72, "Fe", 0.355, 0.300),
        _trilayer("WS2", 3.154, 12.362, "W", "S"),
        _trilayer("MoSe2", 3.288, 12.900, "Mo", "Se"),
        Material(
            "TiS2",
            (3.408, 3.408, 5.701),
            _HEX,
            _at("Ti", (0, 0, 0)) + _at("S", (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)),
        ),
        Material(
            "h-BN",
            (2.504, 2.504, 6.661),
            _HEX,
            _at("B", (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75))
            + _at("N", (2 / 3, 1 / 3, 0.25), (1 / 3, 2 / 3, 0.75)),
        ),
        _rhombohedral(
            "Bi2Te3",
            4.3835,
            30.487,
            ("Te", ((0, 0, 0), (0, 0, 0.212), (0, 0, -0.212))),
            ("Bi", ((0, 0, 0.400), (0, 0, -0.400))),
        ),
        _rhombohedral("Sb", 4.307, 11.273, ("Sb", ((0, 0, 0.2336), (0, 0, -0.2336)))),
        _cubic(
            "Cu2O",
            4.2696,
            _at("O", (0, 0, 0), (0.5, 0.5, 0.5)) + _face_centered("Cu", 0.25, 0.25, 0.25),
        ),
        _cubic(
            "FeS2",
            5.4067,
            _face_centered("Fe", 0, 0, 0)
            + _at(
                "S",
                *(
                    position
                    for u in (0.386, -0.386)
                    for position in (
                        (u, u, u),
                        (u + 0.5, 0.5 - u, -u),
                        (-u, u + 0.5, 0.5 - u),
                        (0.5 - u, -u, u + 0.5),
                    )
                ),
            ),
        ),
        Material(
            "beta-Sn",
            (5.8197, 5.8197, 3.1749),
            _CUBIC,
            _at("Sn", (0, 0, 0), (0.5, 0.5, 0.5), (0, 0.5, 0.25), (0.5, 0, 0.75)),
        ),
        Material(
            "black P",
            (3.3136, 10.478, 4.3763),
            _CUBIC,
            tuple(
                ("P", x, (s * y + v) % 1, (t * z + w) % 1)
                for x, v, w in ((0.0, 0.0, 0.0), (0.5, 0.5, 0.0))
                for y, z in ((0.10168, 0.08056),)
                for s, t, v, w in (
                    (1, 1, v, w),
                    (-1, -1, v, w),
                    (-1, 1, v + 0.5, w + 0.5),
                    (1, -1, v + 0.5, w + 0.5),
                )
            ),
        ),
        Material(
            "ZrO2",
            (5.169, 5.232, 5.341),
            (90.0, 99.25, 90.0),
            tuple(
                (element, (s * x) % 1, (t * y + v) % 1, (s * z + v) % 1)
                for element, x, y, z in (
                    ("Zr", 0.2758, 0.0411, 0.2082),
                    ("O", 0.0703, 0.3359, 0.3406),
                    ("O", 0.4423, 0.7549, 0.4789),
                )
                for s, t, v in ((1, 1, 0.0), (-1, -1, 0.0), (-1, 1, 0.5), (1, -1, 0.5))
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

_ELEMENTS: Final = sorted({site[0] for m in TRAINING.values() for site in m.sites})
_KEPT_BACK: Final = [{site[0] for site in m.sites} for m in HELD_OUT.values()]


def relatives(rng: np.random.Generator, number: int) -> list[Material]:
    """Invent crystals, each built like one of the training materials (`relative`)."""
    materials = list(TRAINING.values())
    return [relative(rng, materials[rng.integers(len(materials))]) for _ in range(number)]


def relative(rng: np.random.Generator, material: Material) -> Material:
    """Invent a crystal that is built like another one, of other elements and in another cell.

    Half of them keep the symmetry, the others lose it: every length, angle and position is free. A
    network that saw nothing but the crystals of a table would learn them by heart. Elements of a
    held-out material never come together alone.
    """
    old = sorted({site[0] for site in material.sites})
    new = rng.choice(_ELEMENTS, len(old), replace=False)
    while set(new) in _KEPT_BACK:
        new = rng.choice(_ELEMENTS, len(old), replace=False)
    named = dict(zip(old, map(str, new), strict=True))
    stretch, tilt, moved = np.exp(rng.uniform(-0.25, 0.25, 3)), np.zeros(3), 0.0
    if rng.random() < 0.5:  # equal lengths stay equal
        stretch = stretch[[material.lengths.index(length) for length in material.lengths]]
    else:
        tilt, moved = rng.uniform(-8.0, 8.0, 3), float(np.exp(rng.uniform(-6.0, -2.5)))
    lengths = np.asarray(material.lengths) * stretch
    angles = np.asarray(material.angles) + tilt
    sites = []
    for element, *place in material.sites:
        x, y, z = (np.asarray(place) + moved * rng.normal(size=3)).tolist()
        sites.append((named[element], x, y, z))
    return Material(material.name, tuple(lengths.tolist()), tuple(angles.tolist()), tuple(sites))
