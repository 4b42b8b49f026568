"""Graphs and builders that several tests use; where a package has no wheel, they are skipped."""

from collections.abc import Callable

import pytest
import torch

from prenet4d_engines import weights
from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_engines.backends.tensorrt.flavors import Toolkit
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import Graph, export

SHAPE = (96, 120)
"""Of the frames: no square, and no multiple of 16."""


@pytest.fixture(scope="session")
def graphs() -> dict[str, Graph]:
    """Every network's graph for frames of ``SHAPE``."""
    pytest.importorskip("onnxscript")
    return {name: export(name, SHAPE) for name in weights.NAMES}


@pytest.fixture(scope="session")
def shape() -> tuple[int, int]:
    """Of the frames that the graphs are for."""
    return SHAPE


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    """TensorRT for RTX, which builds without a GPU."""
    try:
        return flavors.load("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_cpu() -> Callable[[bytes], Callable[[torch.Tensor], torch.Tensor]]:
    """Run a graph with ONNX Runtime on the CPU."""
    runtime = pytest.importorskip("onnxruntime")

    def network(model: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"x": x.half().numpy()})[0]).float()

        return run

    return network
