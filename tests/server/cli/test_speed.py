"""The commands that measure devices print what a person can read, and keep the rest in files."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from prenet4d_server.cli import app
from prenet4d_server.cli.speed import latency
from prenet4d_server.monitoring.meters import WINDOW


@pytest.fixture
def bench():
    def call(*arguments):
        result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120"})
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_engines_are_told_in_plain_figures(bench, tmp_path):
    file, picture = tmp_path / "engines.json", tmp_path / "engines.pdf"
    some = ("--shapes", "32x32", "--batches", "1", "--seconds", "0.1")
    said = bench("engines", *some, "--json", str(file), "--plot", str(picture))
    assert "32 × 32: µs a frame" in said
    assert not re.search(r"\de[+-]\d", said)
    assert "from the host" not in said  # there is no way between a CPU and itself
    assert json.loads(file.read_text())["cells"]
    assert picture.read_bytes().startswith(b"%PDF")


def test_traffic_has_a_column_for_each_shape(bench, tmp_path):
    file = tmp_path / "traffic.json"
    said = bench("traffic", "--shapes", "32x32,32x48", "--json", str(file))
    counted = json.loads(file.read_text())
    assert list(counted) == ["32 × 32", "32 × 48"]
    assert f"{counted['32 × 48']['look'] / 1e6:.2f}" in said


def test_a_trace_is_named(bench, tmp_path):
    file = tmp_path / "trace.json"
    said = bench(
        *("profile", "--backend", "torch", "--frame", "32x32", "--batch", "2", "--batches", "1"),
        *("--out", str(file)),
    )
    assert f"The trace is in {file}." in " ".join(said.split())
    assert json.loads(file.read_text())["traceEvents"]


def test_latency_says_how_many_frames_it_takes():
    assert f"{WINDOW:,} frames" in " ".join(str(latency.__doc__).split())
