"""The example notebook runs from top to bottom, against a real service and a simulated detector."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed here")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed here")
processes = pytest.importorskip("prenet4d_server.processes", reason="the server is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed here")

NOTEBOOK = Path(__file__).parents[2] / "client" / "examples" / "live_map.ipynb"


@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_the_notebook_maps_a_scan_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with (
        processes.RunningService(
            tmp_path,
            source={"kind": "dectris2", "scan_shape": [6, 8]},
            corrector={"backend": "identity"},
            ring={"size": "8MiB"},
        ) as service,
        processes.Child.command(
            "detector",
            *("simulate-detector", "dectris2", "--address", service.detector, "--scan", "6x8"),
            *("--frame", "32x32", "--rate", "100", "--repeat", "0", "--patience", "100"),
            log=tmp_path / "detector.log",
        ),
    ):
        monkeypatch.setenv("LIVE_MAP_STREAM", service.stream)
        monkeypatch.setenv("LIVE_MAP_CONTROL", service.control)
        client = nbclient.NotebookClient(
            notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    analysed = re.search(r"(\d+) patterns were analysed", said)
    assert analysed is not None
    values = np.load(tmp_path / "rms_scattering.npy")
    assert values.shape == (6, 8)
    known = np.isfinite(values)
    assert 0 < known.sum() <= int(analysed[1])
    assert ((values[known] > 0) & (values[known] < 32)).all()
    pictures = [
        output.data["image/png"]
        for output in outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert pictures
    assert base64.b64decode(pictures[-1]).startswith(b"\x89PNG")
