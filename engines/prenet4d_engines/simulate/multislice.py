"""Patterns computed by multislice: dynamical diffraction and thermal vibrations in full.

abTEM (J. Madsen and T. Susi, Open Research Europe 1 (2021) 24; the extra ``multislice``) computes
them, `compute` says what, and `Multislice` keeps them and deals them out again: each time with
another center, camera length and distortion, so that a few thousand serve a whole training. It
takes minutes to make them and tens of megabytes to keep them, so they are made where they are used:
``prenet4d simulate --multislice FILE``.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from prenet4d_engines.errors import SimulationError
from prenet4d_engines.simulate.content import draw_orientation, log_uniform, tilt_matrix
from prenet4d_engines.simulate.materials import Material
from prenet4d_engines.simulate.render import distortion
from prenet4d_engines.simulate.scattering import reflections, wavelength
from prenet4d_engines.whole_file import write_whole

Array = NDArray[np.float64]

BOX: Final = 56.0
"""Side of the computed box in Å: a pattern is sampled every 1 / BOX in 1/Å."""
_GRID: Final = 256
_SLICE: Final = 2.0
"""Thickness of a slice in Å."""
SIDE: Final = 160
"""Pixels a side of what is kept; the direct beam is on pixel (SIDE / 2, SIDE / 2)."""
_DEPTHS: Final = 5
"""Thicknesses at which each propagation is looked at."""
_APERTURES: Final = 2
_PLACES: Final = 2
PER_CASE: Final = _DEPTHS * _APERTURES * _PLACES
_RIM: Final = 0.97 * SIDE / 2
"""Radius in px beyond which nothing was computed."""
_DAMAGE: Final = (
    BadZipFile,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TokenError,
    TypeError,
    ValueError,
    zlib.error,
)
"""What numpy raises on a file that is no archive of arrays, or a damaged one."""


@dataclass(frozen=True)
class Multislice:
    """Computed patterns.

    Attributes:
        roots: (n, SIDE, SIDE) float16, square roots of the intensities; the largest of each is 1.
        radii: (n,) float32, radius of the convergent-beam disks in px.
        materials: Name of the material of each.
        thicknesses: (n,) float32, in Å.
    """

    roots: NDArray[np.float16]
    radii: NDArray[np.float32]
    materials: tuple[str, ...]
    thicknesses: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of patterns."""
        return len(self.roots)

    def save(self, path: Path) -> None:
        """Write everything into one compressed file."""
        archive = io.BytesIO()
        np.savez_compressed(
            archive,
            roots=self.roots,
            radii=self.radii,
            materials=np.array(self.materials),
            thicknesses=self.thicknesses,
        )
        write_whole(path, archive.getvalue())

    @classmethod
    def load(cls, path: Path) -> Multislice:
        """Read what `save` wrote.

        Raises:
            SimulationError: The file holds no computed patterns.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = cls(
                    file["roots"].astype(np.float16, casting="same_kind"),
                    file["radii"].astype(np.float32, casting="same_kind"),
                    tuple(str(name) for name in file["materials"]),
                    file["thicknesses"].astype(np.float32, casting="same_kind"),
                )
            n = len(found.radii)
        except _DAMAGE as error:
            raise SimulationError(
                f"{path} holds no computed patterns ({error}). "
                "`prenet4d simulate --multislice FILE` makes them."
            ) from error
        if found.roots.shape != (n, SIDE, SIDE) or len(found.materials) != n or not n:
            raise SimulationError(
                f"{path} holds patterns {found.roots.shape}; expected ({n}, {SIDE}, {SIDE})."
            )
        largest = found.roots.max((1, 2))  # NaN where one pixel is
        if (
            len(found.thicknesses) != n
            or not ((largest > 0) & np.isfinite(largest) & (found.radii > 0)).all()
        ):
            raise SimulationError(f"{path} holds patterns without intensity, radius or thickness.")
        return found

    def place(
        self,
        index: int,
        frame_shape: tuple[int, int],
        *,
        center: tuple[float, float],
        ellipticity: tuple[float, float] = (1.0, 0.0),
        zoom: float = 1.0,
        turn: float = 0.0,
    ) -> NDArray[np.float32]:
        """Return a pattern on a frame, sum 1, by cubic splines.

        Args:
            index: Which pattern.
            frame_shape: (h, w).
            center: Where its direct beam comes to lie, (cy, cx) in px.
            ellipticity: (ratio, theta) of the distortion.
            zoom: Pixels of the frame for each pixel that was computed.
            turn: Angle in radians by which the pattern is turned before it is distorted, from +x
                toward +y.
        """
        h, w = frame_shape
        turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        inverse = turned @ np.linalg.inv(distortion(ellipticity)) / zoom
        image = self.roots[index].astype(np.float32) ** 2
        offset = SIDE / 2 - inverse @ np.asarray(center)
        placed = ndimage.affine_transform(image, inverse, offset, (h, w), order=3)
        # What was computed ends on a circle around the beam, which must not give the beam away:
        # let it run out into a fall-off.
        away = np.moveaxis(np.mgrid[:h, :w], 0, -1) - np.asarray(center)
        radius = np.linalg.norm(away @ inverse.T, axis=-1) / _RIM
        inside = np.clip((1 - radius) / 0.15, 0, 1)
        falling = _rim_level(image) * np.maximum(radius, 0.85) ** -3
        placed = inside * np.maximum(placed, 0.0) + (1 - inside) * falling
        return np.asarray(placed / placed.sum(), np.float32)

    def draw(
        self,
        rng: np.random.Generator,
        frame_shape: tuple[int, int],
        *,
        center: tuple[float, float],
        ellipticity: tuple[float, float],
    ) -> tuple[NDArray[np.float32], float]:
        """Draw a pattern, its camera length and rotation.

        Returns:
            The pattern (h, w), sum 1, and the radius of its disks in px.
        """
        index = int(rng.integers(len(self)))
        zoom = draw_zoom(rng, frame_shape)
        image = self.place(
            index,
            frame_shape,
            center=center,
            ellipticity=ellipticity,
            zoom=zoom,
            turn=float(rng.uniform(0, 2 * np.pi)),
        )
        floor = log_uniform(rng, 1e-4, 0.1)
        image = (1 - floor) * image + np.float32(floor / image.size)
        return image, zoom * float(self.radii[index])


def draw_zoom(rng: np.random.Generator, frame_shape: tuple[int, int]) -> float:
    """Draw how much larger than computed a pattern is shown: a camera length for frames (h, w)."""
    return log_uniform(rng, 1.1, 2.2) * min(frame_shape) / SIDE


def compute(
    materials: Sequence[Material],
    *,
    patterns: int,
    seed: int = 0,
    per_case: int = PER_CASE,
    workers: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> Multislice:
    """Compute patterns of crystals near zone axes, averaged over frozen thermal vibrations.

    Each case is one crystal, orientation, voltage and set of vibrations; two convergence angles,
    two probe positions and five thicknesses of it make twenty patterns.

    Args:
        materials: Crystals, taken in turn.
        patterns: How many.
        seed: Fixes everything.
        per_case: Patterns to keep of each case; fewer make a set of the same size more diverse.
        workers: Processes; the result does not depend on them.
        on_progress: Told the share done (0 to 1).

    Raises:
        SimulationError: abTEM is not installed, or there is nothing to compute.
    """
    if find_spec("abtem") is None:
        raise SimulationError(
            "Multislice patterns are computed by abTEM: pip install 'prenet4d[multislice]'."
        )
    if patterns < 1 or not 1 <= per_case <= PER_CASE:
        raise SimulationError(f"Ask for at least one pattern and 1 to {PER_CASE} of each case.")
    cases = -(-patterns // per_case)
    given = [(seed, i, materials[i % len(materials)], per_case) for i in range(cases)]
    kept: list[_Computed] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, of_case in enumerate(pool.map(_case, given), 1):
            kept += of_case
            if on_progress is not None:
                on_progress(done / cases)
    del kept[patterns:]
    return Multislice(
        np.stack([c.root for c in kept]),
        np.array([c.radius for c in kept], np.float32),
        tuple(c.material for c in kept),
        np.array([c.thickness for c in kept], np.float32),
    )


@dataclass(frozen=True)
class _Computed:
    """One pattern as `Multislice` keeps it."""

    root: NDArray[np.float16]
    radius: float
    material: str
    thickness: float


def _rim_level(image: NDArray[np.float32]) -> float:
    """Return the mean intensity where the computed pattern ends."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    radius = np.hypot(y, x) / _RIM
    return float(image[(radius > 0.85) & (radius < 1)].mean())


def _case(given: tuple[int, int, Material, int]) -> list[_Computed]:
    """Compute the patterns of one crystal: (seed, number, crystal, how many to keep)."""
    import abtem
    import dask
    from ase import Atoms

    seed, number, material, per_case = given
    rng = np.random.default_rng([seed, number])
    volts = float(rng.choice([60e3, 80e3, 120e3, 200e3, 300e3]))
    thickness = log_uniform(rng, 80.0, 500.0)
    elements, positions = _crystal(rng, material, thickness)
    spread = np.sqrt(rng.uniform(0.3, 1.0) / (8 * np.pi**2))  # rms of a Debye-Waller factor B
    atoms = Atoms(elements, positions=positions, cell=[BOX, BOX, thickness])
    slices = round(thickness / _SLICE)
    depths = [round(slices * (k + 1) / _DEPTHS) for k in range(_DEPTHS)]
    vibrating = abtem.FrozenPhonons(
        atoms, num_configs=int(rng.integers(3, 7)), sigmas=spread, seed=int(rng.integers(2**31))
    )
    potential = abtem.Potential(
        vibrating,
        gpts=_GRID,
        slice_thickness=thickness / slices,
        exit_planes=tuple(depth - 1 for depth in depths),
        parametrization="lobato",
        projection="infinite",
    )
    strongest = reflections(material)
    nearest = float(
        strongest.length[np.argmax(strongest.amplitude > 0.25 * strongest.amplitude.max())]
    )
    found: list[_Computed] = []
    # One process and one thread: who wants more runs more of them.
    with dask.config.set(scheduler="synchronous"), abtem.config.set({"fftw.threads": 1}):
        for _ in range(_APERTURES):
            # at least the 2 px that a probe in this box needs; disks may overlap
            radius = max(2.0, nearest * BOX * log_uniform(rng, 0.1, 0.85))
            probe = abtem.Probe(
                semiangle_cutoff=1e3 * radius / BOX * wavelength(volts), energy=volts, soft=True
            )
            places = BOX / 2 + rng.uniform(-3, 3, (_PLACES, 2))
            measured: Any = probe.scan(
                potential,
                scan=abtem.CustomScan(places),
                detectors=abtem.PixelatedDetector(max_angle="cutoff"),
                lazy=False,
            )
            images = np.asarray(
                measured.array, np.float32
            )  # (depth, place, h, w), DC in the middle
            middle = images.shape[-1] // 2
            cut = slice(middle - SIDE // 2, middle + SIDE // 2)
            for depth, at_depth in zip(depths, images[..., cut, cut], strict=True):
                found += [
                    _Computed(
                        np.sqrt(np.maximum(image, 0) / image.max()).astype(np.float16),
                        radius,
                        material.name,
                        thickness * depth / slices,
                    )
                    for image in at_depth
                ]
    chosen = np.sort(rng.choice(len(found), per_case, replace=False))
    return [found[i] for i in chosen]


def _crystal(
    rng: np.random.Generator, material: Material, thickness: float
) -> tuple[list[str], Array]:
    """Fill the box with a crystal at an orientation near a zone axis, (elements, positions)."""
    cell = material.cell()
    rotation = draw_orientation(rng, cell)
    if rng.random() < 0.3:
        rotation = tilt_matrix(float(rng.uniform(0.5, 4.0)), rng.uniform(0, 2 * np.pi)) @ rotation
    box = np.array([BOX, BOX, thickness])
    vectors = cell @ rotation.T
    corners = np.stack(np.meshgrid(*([0.0, 1.0],) * 3, indexing="ij"), -1).reshape(-1, 3) * box
    reach = corners @ np.linalg.inv(vectors)
    axes = [
        np.arange(np.floor(low) - 1, np.ceil(high) + 2)
        for low, high in zip(reach.min(0), reach.max(0), strict=True)
    ]
    cells = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    elements: list[str] = []
    parts: list[Array] = []
    for element, *site in material.sites:
        positions = (cells + site) @ vectors
        inside = positions[((positions >= 0) & (positions < box)).all(1)]
        parts.append(inside)
        elements += [element] * len(inside)
    return elements, np.concatenate(parts)
