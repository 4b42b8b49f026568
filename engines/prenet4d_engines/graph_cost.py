"""What a graph costs at the least: arithmetic, and bytes that must move. Counted, not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

# What is computed by kernels of its own; everything else is fused into these or only renames data.
_KERNELS: Final = {"Conv", "Gemm", "MatMul", "ReduceMax", "ReduceMean", "Resize", "Softmax"}


@dataclass(frozen=True)
class Cost:
    """Of one item of the batch.

    Attributes:
        flop: Multiplications and additions of convolutions and matrix products.
        activation_bytes: Read and written by convolutions, products, means, softmax and resizing,
            each tensor once per kernel; what lies between is taken to be fused into them.
        weight_bytes: Read once per batch, whatever its size.
    """

    flop: int
    activation_bytes: int
    weight_bytes: int


def cost(model: bytes) -> Cost:
    """Count the cost of an ONNX model with known shapes, its first dimension being the batch."""
    import onnx

    types = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model)).graph
    weights = {each.name: each for each in graph.initializer}
    shapes = {name: tuple(each.dims) for name, each in weights.items()}
    sizes = {name: types.get(each.data_type, 0) for name, each in weights.items()}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        # the batch has a name instead of a number
        shapes[value.name] = tuple(dim.dim_value or 1 for dim in kind.shape.dim)
        sizes[value.name] = types.get(kind.elem_type, 0)

    flop = activation_bytes = 0
    for node in graph.node:
        if node.op_type not in _KERNELS:
            continue
        flop += _flop(node, shapes)
        moved = {*node.input, *node.output} - set(weights) - {""}
        activation_bytes += sum(math.prod(shapes[name]) * sizes[name] for name in moved)
    weight_bytes = sum(math.prod(shapes[name]) * sizes[name] for name in weights)
    return Cost(flop, activation_bytes, weight_bytes)


def _flop(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type == "Conv":
        summed = math.prod(shapes[node.input[1]][1:])
    elif node.op_type in ("Gemm", "MatMul"):
        summed = shapes[node.input[0]][-1]
    else:
        return 0
    return 2 * summed * math.prod(shapes[node.output[0]])
