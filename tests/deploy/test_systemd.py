"""systemd accepts the unit and finds little in it that could be closed and is not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prenet4d_server.cli import run

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"),
    reason="systemd-analyze (Debian: systemd) is not installed here",
)


@needs_systemd
@pytest.mark.parametrize("gpu", [False, True])
def test_the_unit_is_valid(tmp_path: Path, gpu: bool) -> None:
    # The command must exist to be valid, as it does where the service is installed.
    command = tmp_path / "prenet4d"
    command.symlink_to(sys.executable)
    unit = tmp_path / "prenet4d.service"
    text = (UNITS / "prenet4d.service").read_text()
    unit.write_text(text.replace("/opt/prenet4d/bin/prenet4d", str(command)))
    if gpu:
        shutil.copytree(UNITS / "prenet4d.service.d", tmp_path / "prenet4d.service.d")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    complaints = [line for line in checked.stderr.splitlines() if str(tmp_path) in line]
    assert (checked.returncode, complaints) == (0, [])


@needs_systemd
def test_the_unit_exposes_little() -> None:
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20",
         UNITS / "prenet4d.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    level = re.search(r"exposure level for prenet4d.service: ([\d.]+)", ran.stdout)
    assert level is not None
    assert float(level[1]) <= 2.0


@pytest.mark.parametrize("wrong", [["--config", "nowhere.toml"], ["--scan", "64"]])
def test_what_stays_wrong_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prenet4d", "serve", *wrong])
    unit = (UNITS / "prenet4d.service").read_text()
    given_up = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert given_up is not None
    assert str(run()) in given_up[1].split()
