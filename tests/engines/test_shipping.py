"""What was trained becomes what is used, where it is better, and its card tells how it came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prenet4d_engines.errors import TrainingError
from prenet4d_engines.train import train
from prenet4d_engines.train.shipping import Shipping, ship
from prenet4d_engines.weights import FOLDER, card, load, untrained

GOOD = FOLDER / "center.safetensors"
RECORD = {"command": ["prenet4d train center"], "steps": 7, "minutes": 0.5}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the center network's weights and card, as the package holds them."""
    folder = tmp_path / "package"
    folder.mkdir()
    for path in FOLDER.glob("center.*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What a training left: to be overwritten with weights."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps(RECORD))
    return folder / "center.safetensors"


def few(path: Path, package: Path, note: str = "") -> Shipping:
    return ship("center", path, note=note, folder=package, samples=8)


def put_into(package: Path, values: dict[str, Tensor]) -> None:
    """Put weights into a package with a card that describes them: shipped without a choice."""
    given = package / "given"
    given.mkdir()
    save_file(values, given / "center.safetensors")
    (given / "training.json").write_text(json.dumps(RECORD))
    (package / "center.safetensors").write_bytes(b"damaged")  # leaves the given ones alone to ship
    assert few(given / "center.safetensors", package).chosen == "trained"
    shutil.rmtree(given)


def moved(by: float) -> dict[str, Tensor]:
    """The good weights, each moved at random; the opposite for the opposite distance."""
    generator = torch.Generator().manual_seed(1)
    values = load_file(GOOD)
    for name, value in values.items():
        if name.endswith("weight") and value.dim() > 1:
            value += by * value.std() * torch.randn(value.shape, generator=generator)
    return values


def test_better_weights_take_the_place_of_worse_ones(package: Path, trained: Path) -> None:
    torch.manual_seed(1)
    put_into(package, untrained("center").state_dict())
    shutil.copy(GOOD, trained)
    before = card("center", package)["training"]
    done = few(trained, package, note="On a rainy day.")
    assert done.chosen == "trained"
    assert done.losses["trained"] < min(done.losses["shipped"], done.losses["mean"])
    load("center", package)  # its card describes it
    after = card("center", package)["training"]
    assert after["note"] == before["note"] + " On a rainy day."
    assert after["stretches"][:-1] == before["stretches"]
    last = after["stretches"][-1]
    assert RECORD.items() <= last.items()
    assert last["shipped"] == "trained"
    assert last["loss of each"].startswith(f"trained {done.losses['trained']:.4f}, shipped ")


def test_worse_weights_change_nothing(package: Path, trained: Path) -> None:
    save_file(untrained("center").state_dict(), trained)
    before = {path: path.read_bytes() for path in package.iterdir()}
    done = few(trained, package)
    assert (done.chosen, done.changed) == ("shipped", False)
    assert before == {path: path.read_bytes() for path in package.iterdir()}


def test_halfway_between_two_weights_may_be_best(package: Path, trained: Path) -> None:
    put_into(package, moved(0.4))
    save_file(moved(-0.4), trained)
    assert few(trained, package).chosen == "mean"
    good, found = load_file(GOOD), load("center", package).state_dict()
    for name, value in good.items():
        if name.endswith("weight") and value.dim() > 1:
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_weights_in_use_are_measured_anew_without_a_choice(package: Path) -> None:
    before = card("center", package)
    done = few(package / "center.safetensors", package)
    assert (done.chosen, done.losses) == ("shipped", {})
    after = card("center", package)
    assert after["training"] == before["training"]
    assert after["figures"]["patterns_per_dose"] == 8
    load("center", package)


def test_a_training_is_shipped_with_its_own_record(package: Path, tmp_path: Path) -> None:
    (package / "center.safetensors").write_bytes(b"damaged")
    out = tmp_path / "out"
    path = train(
        "center",
        steps=1,
        batch_size=2,
        out_dir=out,
        threads=1,
        workers=0,
        seed=5,
        start_from=GOOD,
        peak_rate=1e-9,
    )
    assert few(path, package).chosen == "trained"
    last = card("center", package)["training"]["stretches"][-1]
    assert last["command"] == [
        "prenet4d train center --steps 1 --batch-size 2 --threads 1 --workers 0 --seed 5 "
        "--rate 1e-09 --from center.safetensors"
    ]
    assert (last["steps"], last["samples"], last["seed"]) == (1, 2, 5)
    assert last["validation"]["median_px"] > 0


def test_what_cannot_be_shipped_is_said(package: Path, trained: Path) -> None:
    shutil.copy(FOLDER / "ellipse.safetensors", trained)
    with pytest.raises(TrainingError, match="holds no weights of 'center'"):
        few(trained, package)
    trained.write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="holds no weights of 'center'"):
        few(trained, package)
    save_file(moved(0.01), trained)
    trained.with_name("training.json").unlink()
    with pytest.raises(TrainingError, match="ship weights from the folder that their training"):
        few(trained, package)
