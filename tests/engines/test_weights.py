"""The shipped weights are the ones their cards describe, and do their job on unseen materials."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prenet4d_engines.errors import WeightsError
from prenet4d_engines.models import CenterNet, Denoiser, EllipseNet, RefineNet, center, denoiser
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.train.shipping import figures
from prenet4d_engines.weights import FOLDER, NAMES, Name, card, load

NETWORKS = {
    "denoise": Denoiser,
    "center": CenterNet,
    "refine": RefineNet,
    "ellipse": EllipseNet,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_and_are_ready_to_use(name: Name) -> None:
    network = load(name)
    assert isinstance(network, NETWORKS[name])
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_all_weights_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 16 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_a_user_must_know(name: Name) -> None:
    found = card(name)
    assert found["parameters"] == sum(p.numel() for p in load(name).parameters())
    assert {"data", "note", "materials"} <= set(found["training"])
    for stretch in found["training"]["stretches"]:
        assert {"command", "steps", "minutes", "machine", "seed", "validation"} <= set(stretch)
    assert not set(found["training"]["materials"]) & set(found["held_out_materials"])
    assert found["figures"]
    assert found["limits"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for path in FOLDER.glob("center.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_changed_weights_are_refused(copied: Path) -> None:
    data = bytearray((copied / "center.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "center.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="not those that their model card describes"):
        load("center", copied)


def test_missing_weights_and_cards_are_named(copied: Path) -> None:
    (copied / "center.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"center\.safetensors cannot be read"):
        load("center", copied)
    with pytest.raises(WeightsError, match=r"ellipse\.json cannot be read"):
        load("ellipse", copied)
    (copied / "ellipse.json").write_text("[1, 2]")
    with pytest.raises(WeightsError, match=r"ellipse\.json cannot be read"):
        load("ellipse", copied)
    with pytest.raises(WeightsError, match="no weights 'phase'"):
        load("phase", copied)  # type: ignore[arg-type]


def test_weights_of_another_network_are_refused(copied: Path) -> None:
    shutil.copy(FOLDER / "ellipse.safetensors", copied / "center.safetensors")
    sha = json.loads((FOLDER / "ellipse.json").read_text())["sha256"]
    (copied / "center.json").write_text(json.dumps({"sha256": sha}))
    with pytest.raises(WeightsError, match="do not fit the network"):
        load("center", copied)


def test_the_shipped_center_is_right_on_unseen_materials() -> None:
    found = figures("center", load("center"), 64, (1e2, 1e4))
    assert found["dose_1e+04"]["median_px"] < 0.3
    assert found["dose_1e+02"]["median_px"] < 1.5
    assert 0.5 < found["dose_1e+04"]["share_within_sigma"] < 0.9


def test_the_shipped_denoiser_helps_at_every_dose_and_keeps_the_counts() -> None:
    found = figures("denoise", load("denoise"), 64, (1e2, 1e4))
    for dose in ("dose_1e+02", "dose_1e+04"):
        assert found[dose]["square_root_gain_db_median"] > 6
        assert found[dose]["linear_gain_db_median"] > 3
    assert found["dose_1e+04"]["counts_kept_mean"] == pytest.approx(1.0, abs=0.05)


def test_the_shipped_ellipse_is_right_on_unseen_materials() -> None:
    found = figures("ellipse", load("ellipse"), 96, (1e4,))
    assert found["dose_1e+04_ratio_to_1.02"]["median_percent"] < 0.5


@pytest.mark.parametrize("name", ["denoise", "center"])
def test_the_shipped_networks_survive_half_precision(name: Name) -> None:
    """bf16 on this machine: its 8 bits bound what FP16's 11 will do."""
    network = load(name)
    generator = torch.Generator().manual_seed(2)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    disk = torch.sigmoid((12 - ((y - 60.3) ** 2 + (x - 66.8) ** 2).sqrt()) / 0.5)
    frames = torch.poisson((disk * 200 + 1)[None], generator=generator)
    mask = torch.ones(128, 128, dtype=torch.bool)
    with torch.no_grad():
        if name == "center":
            bins = Bins.of(frames, mask)
            inputs = center.prepare(bins)
            full = center.decode(network(inputs), bins).center
            with torch.autocast("cpu", torch.bfloat16):
                maps = network(inputs)
            assert (center.decode(maps, bins).center - full).abs().max() < 0.1
            assert (full - torch.tensor([[60.3, 66.8]])).abs().max() < 0.5
        else:
            inputs, context = denoiser.stabilise(frames, mask)
            full = denoiser.restore(network(inputs), context)
            with torch.autocast("cpu", torch.bfloat16):
                residual = network(inputs)
            half = denoiser.restore(residual, context)
            noise = (frames.sqrt() - full.sqrt()).square().mean()
            assert (half.sqrt() - full.sqrt()).square().mean() < 0.02 * noise
