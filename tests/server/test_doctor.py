"""The doctor finds what is there and says what to do about the rest."""

import importlib.metadata
import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from prenet4d_server import doctor


def test_every_finding_is_complete():
    findings = list(doctor.examine())
    names = {finding.name for finding in findings}
    assert {"python", "cores", "memory", "packages", "gpu", "tensorrt"} <= names
    assert {"backend", "ports", "clock"} <= names
    for finding in findings:
        assert finding.found
        assert finding.verdict in ("ok", "note", "missing", "broken")
        if finding.verdict != "ok":
            assert finding.advice.endswith((".", "'")) or "pip install" in finding.advice
    assert not [finding for finding in findings if finding.verdict == "broken"]


def test_the_clock_is_told_as_people_read_it():
    (finding,) = (finding for finding in doctor.examine() if finding.name == "clock")
    assert re.fullmatch(r"[\d-]{10} [\d:]{8} ?\S*", finding.found)


def test_a_port_in_use_is_noticed(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "ingest"})
        (finding,) = (finding for finding in doctor.examine() if finding.name == "ports")
    assert finding.verdict == "note"
    assert f"{port} (ingest)" in finding.found


def test_a_missing_package_is_broken(monkeypatch):
    listed = [
        "numpy>=1.26",
        "no-such-package-of-ours>=1; extra == 'server'",
        "nor-this; extra == 'dev'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    (finding,) = (finding for finding in doctor.examine() if finding.name == "packages")
    assert finding.verdict == "broken"
    assert finding.found == "missing: no-such-package-of-ours"


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_torch_that_cannot_be_imported_is_one_finding_among_the_others(tmp_path, error):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}('libcudnn.so.9: [/no] file')")
    ran = subprocess.run(
        [sys.executable, "-m", "prenet4d_server", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (1, "")
    lines = [line.split() for line in ran.stdout.splitlines()]
    names = [line[0] for line in lines if line]
    (told,) = (line for line in lines if line[:1] == ["torch"])
    assert told[1] == "broken"
    assert "libcudnn.so.9: [/no] file" in ran.stdout
    assert {"python", "memory", "ports", "clock"} <= set(names)
    assert not {"gpu", "tensorrt", "backend"} & set(names)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 580.65.06'", "NVIDIA H100 80GB HBM3, driver 580.65.06"),
        ("exit 9", "nvidia-smi is here but finds no driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch, tmp_path, script, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (finding,) = (finding for finding in doctor.examine() if finding.name == "gpu")
    assert (finding.verdict, finding.found) == ("missing", found)
    assert "torch with CUDA" in finding.advice
