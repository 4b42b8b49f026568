"""Training learns, goes on where it stopped, and refuses what makes no sense."""

from __future__ import annotations

import json
import math
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from prenet4d_engines import processor, weights
from prenet4d_engines.errors import TrainingError
from prenet4d_engines.models import Denoiser
from prenet4d_engines.models.denoiser import DenoiserConfig
from prenet4d_engines.resample import recentered_sum
from prenet4d_engines.simulate import TRAINING
from prenet4d_engines.train import Progress, train
from prenet4d_engines.train.loop import _plot
from prenet4d_engines.train.losses import LOSSES
from prenet4d_engines.train.muon import orthogonal
from prenet4d_engines.train.samples import BATCHES, Samples, _interpolated, _Seen, turned
from prenet4d_engines.train.sigmas import calibrate
from prenet4d_engines.weights import NAMES, Name, untrained

MATERIALS = tuple(TRAINING.values())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("task", NAMES)
def test_a_network_learns_one_batch(task: Name) -> None:
    torch.manual_seed(0)
    batch = BATCHES[task](np.random.default_rng(1), 4, MATERIALS)
    network = untrained(task)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss, figures = LOSSES[task](network, batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
        assert all(torch.isfinite(value) for value in figures.values())
    assert min(losses[-3:]) < losses[0] - 0.1 * abs(losses[0])


def test_a_batch_without_any_beam_can_be_learned_from() -> None:
    batch = BATCHES["center"](np.random.default_rng(0), 4, MATERIALS)
    batch["usable"].zero_()
    loss, figures = LOSSES["center"](untrained("center"), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in figures.values())


def test_a_batch_without_any_near_guess_can_be_learned_from() -> None:
    batch = BATCHES["refine"](np.random.default_rng(0), 2, MATERIALS)
    batch["usable"].zero_()
    loss, figures = LOSSES["refine"](untrained("refine"), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value) for value in figures.values())


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    out = tmp_path / "first"
    first = train("center", steps=1, batch_size=2, out_dir=out, threads=1, workers=0, seed=5)
    kept = tmp_path / "first.safetensors"
    first.rename(kept)
    again = train(
        "center",
        steps=1,
        batch_size=2,
        out_dir=tmp_path,
        threads=1,
        workers=0,
        seed=6,
        start_from=kept,
        peak_rate=1e-7,
    )
    before, after = load_file(kept), load_file(again)
    for name in before:
        if name.endswith("weight"):
            assert torch.allclose(before[name], after[name], atol=1e-5), name
    with pytest.raises(TrainingError, match="holds no weights of 'denoise'"):
        train("denoise", steps=1, batch_size=2, out_dir=tmp_path / "other", start_from=kept)
    narrow = Denoiser(DenoiserConfig(channels=(8, 16, 32, 48)))
    save_file(narrow.state_dict(), kept)
    with pytest.raises(TrainingError, match="attention cannot be widened"):
        train("denoise", steps=1, batch_size=2, out_dir=tmp_path / "other", start_from=kept)


def test_weights_of_a_narrower_network_compute_the_same_in_a_wider_one(tmp_path: Path) -> None:
    narrow = Denoiser(DenoiserConfig(channels=(8, 24, 64, 96)))
    random = torch.Generator().manual_seed(1)
    for value in narrow.parameters():
        torch.nn.init.normal_(value, 0, 0.1, generator=random)
    save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    trained = train(
        "denoise",
        steps=1,
        batch_size=2,
        out_dir=tmp_path,
        threads=1,
        workers=0,
        start_from=tmp_path / "narrow.safetensors",
        peak_rate=1e-12,
    )
    wide = Denoiser()
    wide.load_state_dict(load_file(trained))
    x = torch.randn((2, 4, 32, 48), generator=random)
    torch.testing.assert_close(wide(x), narrow(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", NAMES)
def test_a_seed_fixes_the_samples(task: Name) -> None:
    one, two, other = (next(iter(Samples(task, 4, seed))) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_leaves_weights_log_and_picture_and_resumes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = train(
        "denoise",
        steps=3,
        batch_size=2,
        out_dir=tmp_path,
        threads=2,
        workers=0,
        on_progress=seen.append,
    )
    assert path == tmp_path / "denoise.safetensors"
    untrained("denoise").load_state_dict(load_file(path))
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert seen[-1].step == 3
    assert set(seen[-1].validation) >= {"loss", "gain_db", "counts_kept"}

    train("denoise", steps=5, batch_size=2, out_dir=tmp_path, threads=2, workers=0, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5]
    record = json.loads((tmp_path / "training.json").read_text())
    fixed = "--batch-size 2 --threads 2 --workers 0 --seed 0 --rate 0.001"
    assert record["command"] == [
        f"prenet4d train denoise --steps 3 {fixed}",
        f"prenet4d train denoise --steps 5 {fixed} --resume",
    ]
    assert (record["steps"], record["samples"], record["seed"]) == (5, 10, 0)
    assert record["validation"] == rows[-1]["validation"]


def test_a_training_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    begun = {"batch_size": 2, "out_dir": tmp_path, "threads": 1, "workers": 0, "seed": 3}
    train("ellipse", steps=1, peak_rate=1e-4, **begun)
    for other, message in (
        ({}, r"begun with --rate 0\.0001, not 0\.002"),
        ({"peak_rate": 1e-4, "batch_size": 4}, "begun with --batch-size 2, not 4"),
        ({"peak_rate": 1e-4, "seed": 4}, "begun with --seed 3, not 4"),
    ):
        with pytest.raises(TrainingError, match=message):
            train("ellipse", steps=2, resume=True, **(begun | other))
    train("ellipse", steps=2, peak_rate=1e-4, resume=True, **begun)


def test_a_processor_without_units_for_bfloat16_trains_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for units in (False, True):
        monkeypatch.setattr(processor, "has_bfloat16_units", lambda units=units: units)
        out = tmp_path / str(units)
        train("ellipse", steps=1, batch_size=2, out_dir=out, threads=1, workers=0)
        losses.append(json.loads((out / "log.jsonl").read_text())["loss"])
    sample = next(iter(Samples("ellipse", 2, 0)))
    torch.manual_seed(0)
    exact, _ = LOSSES["ellipse"](untrained("ellipse").train(), sample)
    assert losses[0] == pytest.approx(float(exact.detach()), rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-7)


@pytest.mark.parametrize("shape", [(24, 54), (54, 24)])
def test_a_step_is_about_as_long_in_all_directions_of_a_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator) @ torch.diag(torch.logspace(0, -1, shape[1]))
    step = orthogonal(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    lengths = u.T @ step @ v.T  # diagonal if the singular vectors are the same
    assert 0.6 < lengths.diagonal().min() < lengths.diagonal().max() < 1.3
    assert (lengths - lengths.diagonal().diag()).abs().max() < 1e-4


def test_simulating_in_a_worker_process_works_too(tmp_path: Path) -> None:
    path = train("denoise", steps=2, batch_size=2, out_dir=tmp_path, threads=1, workers=1)
    assert path.exists()


def test_the_plot_of_a_short_training_shows_its_one_loss(tmp_path: Path) -> None:
    row = {"step": 2, "loss": 4.0, "validation": {"loss": 9.0}}
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    _plot("center", tmp_path / "log.jsonl", tmp_path / "loss.png")
    page = imread(tmp_path / "loss.png")[..., :3]
    middle = page[:, int(0.5 * page.shape[1]) : int(0.6 * page.shape[1])]  # left of the legend
    assert (middle[..., 2] > middle[..., 0] + 0.3).any()  # blue


def test_the_first_losses_do_not_flatten_the_plot(tmp_path: Path) -> None:
    losses = [4.0 - 0.02 * i for i in range(100)]
    losses[:3] = 60.0, 30.0, 10.0
    rows = [{"step": 20 * i, "loss": v, "validation": {}} for i, v in enumerate(losses, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _plot("center", tmp_path / "log.jsonl", tmp_path / "loss.png")
    page = imread(tmp_path / "loss.png")[..., :3]
    blue = page[..., 2] > page[..., 0] + 0.3
    early, late = (
        np.flatnonzero(blue[:, int(at * page.shape[1])]).max() for at in (0.3, 0.9)
    )  # rows: of 3.6 and 2.2, after the first ones and below the legend
    assert late - early > 0.3 * page.shape[0]


def test_a_time_limit_ends_training(tmp_path: Path) -> None:
    done: list[Progress] = []
    train(
        "denoise",
        steps=100_000,
        batch_size=2,
        out_dir=tmp_path,
        threads=2,
        workers=0,
        minutes=0.02,
        on_progress=done.append,
    )
    assert (tmp_path / "denoise.safetensors").exists()
    assert all(progress.step < 100_000 for progress in done)
    assert done[-1].share >= 1
    assert done[-1].validation
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == done[-1].step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "phase"}, "no network 'phase'"),
        ({"steps": 0}, "steps must be"),
        ({"batch_size": 3}, "even"),
        ({"seed": 10_000_000}, "seed must lie"),
        ({"resume": True}, "no checkpoint"),
        ({"threads": 0}, "threads must be"),
        ({"workers": -1}, "workers 0 or more"),
        ({"minutes": 0.0}, "positive numbers"),
        ({"minutes": math.nan}, "positive numbers"),
        ({"peak_rate": -1e-3}, "positive numbers"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"task": "center", "steps": 1, "out_dir": tmp_path, **change}
    with pytest.raises(TrainingError, match=message):
        train(settings.pop("task"), **settings)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train("denoise", steps=1, batch_size=2, out_dir=tmp_path, threads=2, workers=0)
    with pytest.raises(TrainingError, match="is of 'denoise'"):
        train("center", steps=2, batch_size=2, out_dir=tmp_path, workers=0, resume=True)


def test_a_training_is_not_overwritten_by_another(tmp_path: Path) -> None:
    train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError, match="holds a training already: go on with it"):
        train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_colleagues_may_read_what_a_training_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    finally:
        os.umask(before)
    for each in (path, tmp_path / "checkpoint.pt"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o640


def test_what_cannot_be_resumed_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        train("ellipse", steps=1, out_dir=tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt"):
            train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    whole = checkpoint.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged"):
            train("ellipse", steps=2, batch_size=2, out_dir=tmp_path, workers=0, resume=True)
    for incomplete in ({"task": "ellipse"}, [1]):
        torch.save(incomplete, checkpoint)
        with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged"):
            train("ellipse", steps=2, batch_size=2, out_dir=tmp_path, workers=0, resume=True)


def test_a_resumed_log_holds_each_step_once(tmp_path: Path) -> None:
    train("ellipse", steps=1, batch_size=2, out_dir=tmp_path, threads=1, workers=0)
    log = tmp_path / "log.jsonl"
    # A training that was killed a few steps after its checkpoint, in the middle of a line.
    row = json.loads(log.read_text())
    log.write_text(log.read_text() + json.dumps(row | {"step": 2}) + "\n" + '{"step": 4')
    train("ellipse", steps=2, batch_size=2, out_dir=tmp_path, threads=1, workers=0, resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_symmetries_carry_the_center_along(flip_y: bool, flip_x: bool, swap: bool) -> None:
    frame = torch.zeros(9, 9)
    frame[2, 6] = 1.0
    seen = _Seen(frame, frame, frame > 0, (2.0, 6.0))
    moved = turned(seen, flip_y=flip_y, flip_x=flip_x, swap=swap)
    row, column = divmod(int(moved.frame.argmax()), 9)
    assert (row, column) == moved.center


@pytest.mark.parametrize("task", ["center", "refine", "ellipse"])
def test_calibrated_sigmas_hold_two_thirds_of_the_errors(task: Name) -> None:
    network = weights.load(task)
    assert 0.2 < calibrate(task, network, samples=64) < 5
    # the same samples again: nothing is left to correct
    assert calibrate(task, network, samples=64) == pytest.approx(1.0, abs=0.05)


def test_noise_of_the_ellipse_networks_means_is_as_recentering_leaves_it() -> None:
    """In a mean of frames that lay at ever other places, neighbours share what was interpolated."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 128, 128, generator=generator)
    shifts = torch.rand(256, 2, generator=generator) * 4 - 2
    recentered = recentered_sum(noise, shifts)[0] / len(noise) ** 0.5

    def covariances(image: torch.Tensor) -> torch.Tensor:
        inner = image[8:-8, 8:-8]
        pairs = [(inner, inner), (inner[:, 1:], inner[:, :-1]), (inner[1:], inner[:-1])]
        return torch.stack([(one * other).mean() for one, other in pairs])

    found, expected = covariances(_interpolated(noise[0])), covariances(recentered)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert expected[0] < 0.75
