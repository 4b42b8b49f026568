"""Reading the ellipticity of a mean: looks, what each leaves, and what a lattice cannot tell."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prenet4d_engines import weights
from prenet4d_engines.geometry import Ellipticity, reference_center
from prenet4d_engines.lanes import CpuLanes
from prenet4d_engines.reading import Reader, left_of, looks
from prenet4d_engines.simulate import (
    TRAINING,
    Kind,
    draw_ellipticity,
    draw_optics,
    draw_pattern,
    expose,
    ideal_detector,
    render,
)

SHAPE = (128, 128)
REFERENCE = torch.tensor(reference_center(SHAPE), dtype=torch.float64)

ratios = st.floats(1.0, 1.3)
angles = st.floats(0.0, np.pi)


@given(ratios, angles, ratios, angles)
def test_what_is_left_completes_what_was_taken_out(r, a, s, b) -> None:
    truth, taken = Ellipticity(r, a), Ellipticity(s, b)
    left = left_of(torch.tensor([truth.vector]), torch.tensor([taken.vector]))[0]
    whole = Ellipticity.from_matrix(taken.matrix @ Ellipticity.from_vector(*left.tolist()).matrix)
    np.testing.assert_allclose(whole.vector, truth.vector, atol=1e-6)


def means_of(kind: Kind, n: int) -> tuple[Tensor, Tensor]:
    """Means of three grains each (n, h, w), and their distortions' vector forms (n, 2)."""
    rng, generator = np.random.default_rng(4_200_000), torch.Generator().manual_seed(0)
    expected, truths = [], []
    for _ in range(n):
        ellipticity = draw_ellipticity(rng)
        crystal = list(TRAINING.values())[rng.integers(len(TRAINING))]
        optics = draw_optics(rng, kind, crystal, SHAPE)
        grains = [
            draw_pattern(
                rng,
                SHAPE,
                kind=kind,
                material=crystal,
                optics=optics,
                center=reference_center(SHAPE),
                ellipticity=ellipticity,
            )
            for _ in range(3)
        ]
        expected.append(render(grains, SHAPE).mean(0))
        truths.append(Ellipticity(*ellipticity).vector)
    means, _ = expose(torch.stack(expected), 1e5, ideal_detector(SHAPE), generator)
    return means, torch.tensor(truths)


@torch.inference_mode()
def errors_look_by_look(kind: Kind, n: int = 24) -> list[float]:
    """Root mean square error of the vector form after each look, %."""
    means, truths = means_of(kind, n)
    taken = looks(means, REFERENCE, weights.load("ellipse"))
    return [float(100 * (look.vector - truths).square().sum(1).mean().sqrt()) for look in taken]


def test_each_look_at_rings_leaves_less() -> None:
    first, second = errors_look_by_look("rings")
    assert second < 0.8 * first


def test_a_lattice_is_not_believed_more_for_being_seen_again() -> None:
    """It may be distorted or another lattice; a look that straightens it makes up a distortion."""
    first, second = errors_look_by_look("spots")
    assert second < 1.1 * first


@torch.inference_mode()
def test_a_reading_depends_on_nothing_but_its_mean() -> None:
    means, _ = means_of("grains", 2)
    backend = SimpleNamespace(ellipse=weights.load("ellipse"))
    reader = Reader(CpuLanes(), backend, SHAPE)
    first, other, again = (reader.ask(means[i], (63.5, 63.5)).wait() for i in (0, 1, 0))
    assert first == again != other
