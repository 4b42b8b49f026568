"""Scans to evaluate on: of held-out materials and seeds that training never uses, as `datasets`."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from prenet4d_engines.evaluate.datasets import COMPUTED, FIRST_SEED, beam_radius, seed_of
from prenet4d_engines.simulate import (
    HELD_OUT,
    Drift,
    Kind,
    Multislice,
    Scan,
    draw_ellipticity,
    draw_scan,
    simulate_scan,
)
from prenet4d_engines.simulate.multislice import SIDE, draw_zoom

_WEAK: Final = 0.25
"""A direct beam with less than this share of the electrons is one that dynamical diffraction has
emptied: other disks outshine it."""
_GRAINS: Final = 6
"""Half of them with a weak direct beam."""

Array = NDArray[np.float64]


def held_out_scan(
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    kind: Kind,
    *,
    dose: float,
    seed: int,
    number: int,
    drift: Drift | None = None,
) -> tuple[Scan, float]:
    """Simulate a scan of a held-out material; return it and the direct beam's radius in px.

    The material, the ellipticity (ln of the ratio uniform up to 1.12) and everything else follow
    from ``seed`` and ``number``; only the counts differ between doses.
    """
    rng = np.random.default_rng([FIRST_SEED + seed, number])
    material = list(HELD_OUT)[rng.integers(len(HELD_OUT))]
    scan = simulate_scan(
        scan_shape,
        frame_shape,
        kind=kind,
        material=material,
        dose=dose,
        ellipticity=draw_ellipticity(rng),
        drift=drift,
        seed=FIRST_SEED + seed_of(seed, number) % FIRST_SEED,
    )
    return scan, beam_radius(scan.canvases[-1])


def dynamical_scan(
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    *,
    dose: float,
    seed: int,
    number: int,
    drift: Drift | None = None,
) -> tuple[Scan, Array]:
    """Draw a scan over grains near zone axes; return it and each frame's beam radius in px, (n,).

    The grains are multislice patterns of held-out materials (`COMPUTED`). In half of them the
    direct beam holds less than a quarter of the electrons, so that single frames take another beam
    for it. They share the camera length; each has its own rotation and convergence angle.

    Args:
        scan_shape: (ny, nx).
        frame_shape: (h, w).
        dose: Expected electrons per pattern.
        seed: Counts from `FIRST_SEED`; only the counts differ between doses.
        number: Of the scan, each with grains of its own.
        drift: How the center moves; by default as `Drift()`.
    """
    computed = Multislice.load(COMPUTED)
    rng = np.random.default_rng([FIRST_SEED + seed, *frame_shape, 8, number])
    weak = _direct_shares(computed) < _WEAK
    grains = np.concatenate(
        [rng.choice(np.flatnonzero(of), _GRAINS // 2, replace=False) for of in (weak, ~weak)]
    )
    zoom = draw_zoom(rng, frame_shape)
    center = ((frame_shape[0] - 1) / 2, (frame_shape[1] - 1) / 2)
    patterns = np.stack(
        [
            computed.place(
                int(i), frame_shape, center=center, zoom=zoom, turn=float(rng.uniform(0, 2 * np.pi))
            )
            for i in grains
        ]
    )
    own_seed = FIRST_SEED + seed_of(seed, number) % FIRST_SEED
    scan = draw_scan(patterns, scan_shape, dose=dose, drift=drift, seed=own_seed)
    radii = zoom * computed.radii[grains].astype(np.float64)
    return scan, radii[scan.grains]


def _direct_shares(computed: Multislice) -> Array:
    """Return the share of each pattern's electrons that the direct beam's disk holds."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    within = np.hypot(y, x) <= computed.radii[:, None, None]
    intensity = computed.roots.astype(np.float64) ** 2
    return np.asarray((intensity * within).sum((1, 2)) / intensity.sum((1, 2)))
