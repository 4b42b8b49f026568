"""Engines are really built here, by TensorRT for RTX, which needs no GPU for it."""

import re

import pytest
import torch

from prenet4d_engines.backends import parity
from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_engines.backends.tensorrt.build import build
from prenet4d_engines.backends.tensorrt.cache import EngineCache
from prenet4d_engines.backends.tensorrt.making import check, make
from prenet4d_engines.errors import BackendError, FrameError
from prenet4d_engines.export import Graph


@pytest.mark.parametrize(
    ("name", "batch"), [("denoise", 64), ("center", 16), ("refine", 16), ("ellipse", 1)]
)
def test_every_network_builds(name, batch, graphs, toolkit):
    shares = []
    plan = build(toolkit, graphs[name], batch, on_progress=shares.append)
    assert len(plan.data) > 100_000
    assert len(shares) > 20
    assert shares == sorted(set(shares))
    assert 0 <= shares[0] < 0.5 < shares[-1] <= 1


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError("the terminal is gone")])
def test_a_build_can_be_stopped(problem, graphs, toolkit):
    calls = []

    def stop(share):
        calls.append(share)
        if share > 0.3:
            raise problem

    with pytest.raises(type(problem) if isinstance(problem, Exception) else problem):
        build(toolkit, graphs["ellipse"], 1, on_progress=stop)
    assert calls[-1] < 0.9


def test_what_is_no_graph_is_refused(toolkit):
    with pytest.raises(BackendError, match="does not understand the graph of center"):
        build(toolkit, Graph("center", (6, 128, 128), b"no graph"), 1)


def test_a_graph_that_reads_something_else_is_refused(graphs, toolkit):
    other = Graph("center", (6, 96, 120), graphs["center"].model)
    with pytest.raises(BackendError, match="The graph of center should read"):
        build(toolkit, other, 1)


@pytest.mark.parametrize("batch", [0, -1, 4097])
def test_batches_that_cannot_be_are_refused(batch, graphs, toolkit):
    with pytest.raises(BackendError, match="1 to 4096 frames at a time"):
        build(toolkit, graphs["ellipse"], batch)


def test_a_detector_that_cannot_be_is_refused(toolkit, tmp_path):
    with pytest.raises(FrameError, match="no shape of a detector"):
        list(make((4, 4), toolkit, EngineCache(tmp_path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tensorrt_without_a_gpu_says_so(tmp_path, toolkit):
    """Checked before the builder is asked: that would crash."""
    pretended = flavors.Toolkit("tensorrt", toolkit.module)
    with pytest.raises(BackendError, match=r"on the GPU they are for\. .*GPU can be used"):
        list(make((128, 128), pretended, EngineCache(tmp_path)))


@pytest.mark.parametrize(
    ("name", "batch"), [("denoise", 3), ("center", 16), ("refine", 4), ("ellipse", 1)]
)
def test_an_engine_that_agrees_passes_the_gate(name, batch, graphs, shape, on_cpu):
    """The same gate as on a GPU, with ONNX Runtime in the engine's place."""
    network = on_cpu(graphs[name].model)
    sizes = []

    def engine(x):
        sizes.append(len(x))
        return network(x)

    deviation = check(name, engine, batch, shape, torch.device("cpu"))
    assert deviation.within(parity.ENGINE)
    assert max(sizes) == batch


def test_an_engine_whose_last_row_is_wrong_fails_with_the_figures(graphs, shape, on_cpu):
    network = on_cpu(graphs["center"].model)

    def engine(x):
        y = network(x)
        if len(x) == 12:
            y[-1] = y[-1].flip(-1)
        return y

    with pytest.raises(BackendError, match="The engine of center for 12 frames disagrees") as told:
        check("center", engine, 12, shape, torch.device("cpu"))
    assert re.search(r"[\d.]+ px in the center \(0\.005 allowed\)", str(told.value))
