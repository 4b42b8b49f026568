"""`prenet4d ship`: what it says of weights that nobody knows the training of."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from prenet4d_engines.errors import TrainingError
from prenet4d_engines.weights import card, untrained
from prenet4d_server.cli import app


def test_weights_without_their_record_stay_where_they_are(tmp_path: Path) -> None:
    path, before = tmp_path / "center.safetensors", card("center")
    save_file(untrained("center").state_dict(), path)
    result = CliRunner().invoke(app, ["ship", "center", str(path)])
    with pytest.raises(TrainingError, match="from the folder that their training left them in"):
        raise result.exception or AssertionError(result.output)
    assert card("center") == before
