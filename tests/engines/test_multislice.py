"""Computed patterns: kept, dealt out at exact centers, made by abTEM where that is installed."""

from __future__ import annotations

import resource
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from prenet4d_engines.errors import SimulationError, TrainingError
from prenet4d_engines.simulate import TRAINING, Multislice
from prenet4d_engines.simulate.multislice import SIDE, compute
from prenet4d_engines.train import train
from prenet4d_engines.train.samples import BATCHES


def _computed(names: tuple[str, ...] = ("Al", "Cu")) -> Multislice:
    """A disk and its surroundings, the direct beam on the middle pixel."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    root = 1 / (1 + np.exp(np.hypot(y, x) - 10)) + 0.05 * np.exp(-np.hypot(y, x) / 30)
    n = len(names)
    return Multislice(
        np.tile((root / root.max()).astype(np.float16), (n, 1, 1)),
        np.full(n, 10, np.float32),
        names,
        np.full(n, 100, np.float32),
    )


def test_a_placed_pattern_lies_where_it_says_and_is_as_elliptical_as_it_says() -> None:
    center, zoom = (61.3, 70.8), 0.9
    image = _computed().place(0, (128, 144), center=center, ellipticity=(1.1, 0.0), zoom=zoom)
    assert image.shape == (128, 144)
    assert image.sum() == pytest.approx(1.0, abs=1e-4)
    y, x = np.mgrid[:128, :144]
    disk = np.maximum(image - 0.3 * image.max(), 0.0)
    disk = disk.astype(np.float64) / disk.sum()
    cy, cx = float((disk * y).sum()), float((disk * x).sum())
    assert (cy, cx) == pytest.approx(center, abs=0.01)
    across = float((disk * (x - cx) ** 2).sum()), float((disk * (y - cy) ** 2).sum())
    assert across[0] / across[1] == pytest.approx(1.1**2, rel=0.02)  # theta 0: longer along x


def test_a_turn_goes_around_the_direct_beam() -> None:
    computed = _computed()
    roots = computed.roots.astype(np.float32)
    roots[0, SIDE // 2 - 3 : SIDE // 2 + 4, SIDE // 2 + 37 : SIDE // 2 + 44] = 0.8  # 40 px along +x
    computed = Multislice(
        roots.astype(np.float16), computed.radii, computed.materials, computed.thicknesses
    )
    image = computed.place(0, (128, 128), center=(60.0, 64.0), turn=np.pi / 2)
    y, x = np.mgrid[:128, :128]
    outside = np.hypot(y - 60, x - 64) > 20
    spot = np.where(outside & (image > 0.3 * image[outside].max()), image, 0.0)
    at = (spot * y).sum() / spot.sum(), (spot * x).sum() / spot.sum()
    assert at == pytest.approx((100.0, 64.0), abs=0.5)  # from +x toward +y


def test_patterns_are_kept_and_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    computed = _computed()
    computed.save(path)
    again = Multislice.load(path)
    assert again.materials == computed.materials
    assert np.array_equal(again.roots, computed.roots)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SimulationError, match="no computed patterns"):
        Multislice.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SimulationError, match="no computed patterns"):
        Multislice.load(path)
    np.savez(path, roots=np.zeros((1, SIDE, SIDE)), radii=1.0, materials=["Al"], thicknesses=[1.0])
    with pytest.raises(SimulationError, match="no computed patterns"):
        Multislice.load(path)
    whole = {
        "roots": computed.roots,
        "radii": computed.radii,
        "materials": np.array(computed.materials),
        "thicknesses": computed.thicknesses,
    }
    for nonsense in (
        {"roots": np.full_like(computed.roots, np.nan)},
        {"roots": np.zeros_like(computed.roots)},
        {"roots": computed.roots.astype(str)},
        {"radii": np.full_like(computed.radii, np.nan)},
        {"thicknesses": np.append(computed.thicknesses, 1.0)},
    ):
        np.savez(path, **(whole | nonsense))
        with pytest.raises(SimulationError, match=r"holds (no computed )?patterns"):
            Multislice.load(path)


def test_what_was_computed_is_not_lost_to_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    path.write_bytes(b"hours of work")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"computed\.npz"):
            _computed().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"hours of work"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    _computed().save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in (*range(0, 160, 4), *random.integers(160, len(whole), 80).tolist()):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with suppress(SimulationError):  # not every byte is looked at
            Multislice.load(path)


@pytest.mark.parametrize("task", ["denoise", "center", "refine", "ellipse"])
def test_a_quarter_of_training_is_dealt_from_them(task: str) -> None:
    torch.set_num_threads(1)
    materials = (TRAINING["Al"],)
    plain = BATCHES[task](np.random.default_rng(3), 16, materials)
    mixed = BATCHES[task](np.random.default_rng(3), 16, materials, _computed())
    assert plain.keys() == mixed.keys()
    assert all(torch.isfinite(value).all() for value in mixed.values())
    first = next(iter(plain))
    assert not torch.equal(plain[first], mixed[first])


def test_training_refuses_the_evaluations_materials(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    _computed(("Al", "Au")).save(path)
    with pytest.raises(TrainingError, match="Au"):
        train("center", steps=1, batch_size=2, out_dir=tmp_path, multislice=path)


@pytest.mark.skipif(find_spec("abtem") is None, reason="abTEM is not installed: extra multislice")
def test_abtem_computes_a_pattern() -> None:
    computed = compute((TRAINING["Al"],), patterns=2, seed=1)
    assert len(computed) == 2
    assert computed.roots.max(axis=(1, 2)) == pytest.approx(1.0)
    # The direct beam shines from the middle.
    middle = computed.roots[:, SIDE // 2 - 1 : SIDE // 2 + 2, SIDE // 2 - 1 : SIDE // 2 + 2]
    assert (middle.astype(np.float32).mean((1, 2)) > 0.1).all()


@pytest.mark.skipif(find_spec("abtem") is not None, reason="abTEM is installed")
def test_without_abtem_it_is_said_what_to_install() -> None:
    with pytest.raises(SimulationError, match=r"prenet4d\[multislice\]"):
        compute((TRAINING["Al"],), patterns=1)
