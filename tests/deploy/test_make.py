"""The Makefile leaves no virtual environment behind that it could not finish."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed here")


def test_half_a_virtual_environment_is_taken_away(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "deploy/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    # As Debian's does without python3-venv: it fails after most is there.
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        '[ "$2" = venv ] || exit 0\n'
        'mkdir -p "$3/bin" && cp /bin/true "$3/bin/python" && exit 1\n'
    )
    python.chmod(0o755)
    made = subprocess.run(
        ["make", "-C", tmp_path, f"PYTHON={python}", ".venv/.server"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode != 0
    assert not (tmp_path / ".venv").exists()
