"""The graphs: half precision where it is safe, float32 where it is not, and right on a CPU."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from prenet4d_engines import weights
from prenet4d_engines.backends import parity
from prenet4d_engines.errors import FrameError
from prenet4d_engines.export import export, input_shape
from prenet4d_engines.graph_cost import cost
from prenet4d_engines.models import center, denoiser, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import inversion

onnx = pytest.importorskip("onnx")
FP16_MAX = 65504.0
OUTPUTS = {
    "denoise": (1, 96, 128), "center": (6, 24, 32), "refine": (9, 24, 24), "ellipse": (5, 32, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", weights.NAMES)
def test_the_graph_is_strongly_typed_and_its_batch_dynamic(name, graphs):
    model = onnx.load_model_from_string(graphs[name].model)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    (x,), (y,) = model.graph.input, model.graph.output
    assert x.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    exact = onnx.TensorProto.FLOAT16 if name == "denoise" else onnx.TensorProto.FLOAT
    assert y.type.tensor_type.elem_type == exact
    for value, shape in ((x, graphs[name].input_shape), (y, OUTPUTS[name])):
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert tuple(dim.dim_value for dim in rest) == shape


@pytest.mark.parametrize("name", weights.NAMES)
def test_most_of_it_is_half_precision(name, graphs):
    """The parts in float32 are few: attention, and what ends in pixels or votes."""
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in onnx.load_model_from_string(graphs[name].model).graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += int(np.prod(tensor.dims))
    total = sum(sizes.values())
    assert 0 < sizes[onnx.TensorProto.FLOAT] < 0.1 * total


def test_softmax_means_and_squares_are_float32(graphs):
    for name in ("denoise", "center"):
        graph = onnx.load_model_from_string(graphs[name].model).graph
        types = {each.name: each.type.tensor_type.elem_type for each in graph.value_info}
        risky = [n for n in graph.node if n.op_type in ("Softmax", "Pow", "Exp", "Sqrt", "MatMul")]
        assert risky
        assert {types[node.output[0]] for node in risky} == {onnx.TensorProto.FLOAT}


SCRIPT = """
import hashlib, sys
from prenet4d_engines.errors import BackendError
from prenet4d_engines.export import export
sys.modules["onnxscript"] = None
try:
    export("ellipse", (96, 120))
except BackendError as error:
    print(error)
del sys.modules["onnxscript"]
print(hashlib.sha256(export("ellipse", (96, 120)).model).hexdigest())
"""


def test_another_process_writes_the_same_bytes_or_says_what_it_needs(graphs):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    missing, sha256 = done.stdout.decode().splitlines()
    assert "onnxscript" in missing
    assert missing.endswith("pip install 'prenet4d[engines]'")
    assert sha256 == graphs["ellipse"].sha256


@pytest.mark.parametrize("name", weights.NAMES)
def test_nothing_of_the_machine_is_in_it(name, graphs):
    model = graphs[name].model
    assert b".py" not in model
    assert b"site-packages" not in model
    assert len(model) < 2_100_000


def test_bad_shapes_are_refused():
    for shape in ((4, 64), (64, 0), (64, 5000)):
        with pytest.raises(FrameError, match="no shape of a detector"):
            export("denoise", shape)


@pytest.mark.parametrize(
    ("frame", "denoise", "found"),
    [
        ((256, 256), (4, 256, 256), (6, 128, 128)),
        ((250, 256), (4, 256, 256), (6, 128, 128)),
        ((515, 515), (4, 528, 528), (6, 128, 128)),
        ((108, 150), (4, 112, 160), (6, 112, 160)),
        ((96, 120), (4, 96, 128), (6, 96, 128)),
    ],
)
def test_inputs_are_as_the_networks_get_them(frame, denoise, found):
    assert input_shape("denoise", frame) == denoise
    assert input_shape("center", frame) == found
    assert input_shape("refine", frame) == (15, 96, 96)
    assert input_shape("ellipse", frame) == (6, 256, 128)


@pytest.mark.parametrize("name", weights.NAMES)
def test_the_graph_agrees_with_float32_torch(name, graphs, shape, on_cpu):
    deviation = parity.measure(name, on_cpu(graphs[name].model), weights.load(name), shape)
    assert deviation.within(parity.ENGINE), deviation.told(parity.ENGINE)


@pytest.mark.parametrize("name", weights.NAMES)
def test_the_answer_does_not_depend_on_the_batch(name, graphs, on_cpu):
    network = on_cpu(graphs[name].model)
    x = torch.randn(3, *graphs[name].input_shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        network(x), torch.cat([network(each) for each in x.split(1)]), atol=2e-3, rtol=2e-3
    )


def test_no_value_comes_near_the_end_of_half_precision(graphs, shape):
    """A million electrons in one disk, in one pixel, or in all of them: 30 times below the end."""
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in shape), indexing="ij")
    disks = [torch.sigmoid(2 * (r - torch.hypot(y - 50.3, x - 65.7))) for r in (0.6, 3, 12, 40)]
    frames = [1e6 * disk / disk.sum() for disk in disks]
    spike, board = torch.zeros(shape), torch.zeros(shape)
    spike[40, 70] = 1e6
    board[::2, ::2] = 1e6  # worse than any detector: half of them full, half of them empty
    frames += [spike, board, torch.full(shape, 1e6), torch.zeros(shape)]
    frames = torch.stack(frames)
    mask = torch.ones(shape, dtype=torch.bool)
    bins = Bins.of(frames, mask)
    guess = inversion(bins, torch.tensor([[50.3, 65.7]]).expand(len(frames), 2))
    inputs = {
        "denoise": denoiser.stabilise(frames, mask)[0],
        "center": center.prepare(bins),
        "refine": refine.prepare(bins, guess, torch.ones(len(frames), 2)),
        "ellipse": ellipse.prepare(frames, torch.ones_like(frames)),
    }
    runtime = pytest.importorskip("onnxruntime")
    for name, x in inputs.items():
        assert float(x.abs().max()) < 11
        model = onnx.load_model_from_string(graphs[name].model)
        named = {each.name for each in model.graph.output}
        halves = [
            each
            for each in model.graph.value_info
            if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
            and each.name not in named
        ]
        assert len(halves) > 40
        model.graph.output.extend(halves)
        session = runtime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        values = session.run(None, {"x": x.half().numpy()})
        for tensor, value in zip(session.get_outputs(), values, strict=True):
            largest = float(np.abs(value.astype(np.float32)).max())
            assert largest < FP16_MAX / 30, f"{name}: {tensor.name} reaches {largest}"


@pytest.mark.parametrize("name", weights.NAMES)
def test_a_damaged_graph_is_caught(name, graphs, shape, on_cpu):
    """The first layer's weights off by a fifth: what a wrong kernel would do."""
    model = onnx.load_model_from_string(graphs[name].model)
    first = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    kernel = next(each for each in model.graph.initializer if each.name == first)
    values = onnx.numpy_helper.to_array(kernel)
    kernel.CopyFrom(onnx.numpy_helper.from_array((values * 0.8).astype(values.dtype), first))
    damaged = on_cpu(model.SerializeToString())
    deviation = parity.measure(name, damaged, weights.load(name), shape)
    assert not deviation.within(parity.ENGINE), deviation.told(parity.ENGINE)


def test_costs_are_counted():
    """One convolution and one product, counted by hand."""
    helper = onnx.helper
    half = onnx.TensorProto.FLOAT16
    kernel = onnx.numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float16), "kernel")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("MatMul", ["r", "r"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", half, ["batch", 4, 10, 10])],
        [helper.make_tensor_value_info("y", half, ["batch", 8, 10, 10])],
        [kernel],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    counted = cost(model.SerializeToString())
    assert counted.flop == 2 * 8 * 100 * 4 * 9 + 2 * 8 * 100 * 10
    assert counted.activation_bytes == 2 * (4 * 100 + 8 * 100) + 2 * (8 * 100 + 8 * 100)
    assert counted.weight_bytes == 2 * 8 * 4 * 9
