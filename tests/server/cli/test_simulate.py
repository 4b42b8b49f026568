"""`prenet4d simulate`: what it draws and computes, and what it says where it cannot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prenet4d_engines.errors import SimulationError
from prenet4d_server.cli import app


def test_a_gallery_is_drawn(tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    result = CliRunner().invoke(app, ["simulate", "--gallery", str(page), "--frame", "32x32"])
    assert result.exit_code == 0, result.output
    assert page.read_bytes().startswith(b"\x89PNG")


def test_it_is_said_what_can_be_asked_for() -> None:
    result = CliRunner().invoke(app, ["simulate"])
    assert result.exit_code == 2
    assert "--gallery FILE or --multislice FILE" in " ".join(result.output.split())


def test_what_was_computed_before_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    path.write_bytes(b"hours of work")
    result = CliRunner().invoke(app, ["simulate", "--multislice", str(path), "--patterns", "1"])
    assert result.exit_code == 2
    assert "choose another name" in " ".join(result.output.split())
    assert path.read_bytes() == b"hours of work"


@pytest.mark.skipif(find_spec("abtem") is not None, reason="abTEM is installed")
def test_without_abtem_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "computed.npz"
    result = CliRunner().invoke(app, ["simulate", "--multislice", str(path), "--patterns", "1"])
    assert isinstance(result.exception, SimulationError)
    assert not path.exists()
