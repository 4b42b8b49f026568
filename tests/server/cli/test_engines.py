"""Engines from the command line, built for real where TensorRT for RTX is installed."""

import json
import sys

import pytest
import torch

from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_server.cli import run

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def prenet4d(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prenet4d", "engines", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        status = run()
        said = capsys.readouterr()
        return status, said.out, " ".join(said.err.split())

    return call


@no_gpu
@pytest.mark.skipif(
    "tensorrt_rtx" not in flavors.installed(), reason="no TensorRT for RTX for this machine"
)
def test_engines_are_built_listed_verified_and_cleaned(prenet4d, tmp_path):
    where = ("--cache", tmp_path / "engines")
    asked = ("build", "--shape", "96x120", "--batch", "2,2", "--flavor", "tensorrt_rtx", *where)
    status, said, _ = prenet4d(*asked)
    assert status == 0
    assert "There is no NVIDIA GPU here" in said
    for line in (
        "denoise 4×96×128 2",
        "center 6×96×128 2",
        "refine 15×96×96 2",
        "ellipse 6×256×128 1",
    ):
        assert line in " ".join(said.split())

    status, said, _ = prenet4d(*asked, "--json")
    assert status == 0
    assert [(each["recipe"]["network"], each["kept"]) for each in json.loads(said)] == [
        ("denoise", True),
        ("center", True),
        ("refine", True),
        ("ellipse", True),
    ]

    status, said, _ = prenet4d("list", *where)
    assert status == 0
    assert said.count("no GPU: not used: never compared with float32") == 1  # of all four
    status, said, _ = prenet4d("list", *where, "--json")
    assert status == 0
    listed = json.loads(said)
    assert {each["state"] for each in listed} == {
        "not used: never compared with float32: there was no GPU to run it on"
    }
    assert all("seal" not in each and each["flop"] > 0 for each in listed)
    assert prenet4d("verify", *where)[0] == 0

    plan = tmp_path / "engines" / listed[0]["plan"]
    plan.write_bytes(plan.read_bytes()[:-1])
    status, said, _ = prenet4d("verify", *where)
    assert status == 1
    assert "refused: its plan was altered" in said
    (tmp_path / "engines" / listed[1]["file"]).write_text("{}")
    status, said, _ = prenet4d("list", *where)
    assert status == 0
    assert f"{listed[1]['file']}: refused: its document is damaged" in said

    status, said, _ = prenet4d("clean", *where)
    assert status == 0
    assert f"Removed {len(listed)} engines" in said
    assert not list((tmp_path / "engines").glob("*.plan"))
    assert "There are no engines" in prenet4d("list", *where)[1]


@pytest.mark.parametrize("command", ["list", "verify", "clean"])
def test_no_engines_are_no_error(prenet4d, tmp_path, command):
    status, said, _ = prenet4d(command, "--cache", tmp_path / "nowhere")
    assert status == 0
    assert "There are no engines in" in said


@pytest.mark.parametrize("all_of_them", [False, True])
def test_what_is_not_an_engine_is_never_removed(prenet4d, tmp_path, all_of_them):
    theirs = {"package.json", "weekend.plan", "pip.cache"}
    for name in theirs:
        (tmp_path / name).write_text("{}")
    (tmp_path / f"{'0' * 32}.json").write_text("{}")  # ours, and damaged
    assert "package.json" not in prenet4d("list", "--cache", tmp_path)[1]
    status, said, _ = prenet4d("clean", "--cache", tmp_path, *["--all"][:all_of_them])
    assert (status, said.split(" from ")[0]) == (0, "Removed 1 engine")
    assert theirs == {path.name for path in tmp_path.iterdir()} - {"lock"}
    # and where there is nothing to remove, nothing is made
    (tmp_path / "lock").unlink()
    assert "There are no engines" in prenet4d("clean", "--cache", tmp_path)[1]
    assert theirs == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "256"], "'256' is not rows x columns"),
        (["--batch", "1,x"], "'1,x' is not a list of batch sizes: write for example 1,16,64."),
        (["--batch", ""], "is not a list of batch sizes"),
        (["--batch", "0"], "'0' is not a list of batch sizes"),
        (["--flavor", "tensorflow"], "'tensorflow' is not one of"),
    ],
)
def test_bad_use_gets_a_sentence(prenet4d, tmp_path, arguments, sentence):
    status, _, said = prenet4d("build", "--cache", tmp_path, *arguments)
    assert status != 0
    assert sentence in said


def test_without_tensorrt_it_says_how_to_get_it(prenet4d, tmp_path, monkeypatch):
    monkeypatch.setattr(flavors, "_MODULES", dict.fromkeys(flavors.FLAVORS, ("no_such",)))
    status, _, said = prenet4d("build", "--cache", tmp_path)
    assert status == 1
    assert "TensorRT is not installed: pip install 'prenet4d[gpu]' --extra-index-url" in said
