"""From a network to its ONNX graph: half precision, except where half precision would show.

The graph is the hub: what TensorRT builds, and what a CPU can run to check it. It is strongly
typed (every tensor has the type it is computed in), its batch is dynamic, its sides are fixed. The
FP32 work around a network (``stabilise``, ``prepare``, ``decode``) stays outside. Inside, attention
is computed in FP32 (squares, and scores of a hundred and more, of which FP16 knows the tenth only),
and so are the layers whose outputs are positions in pixels, logarithms of sigmas and votes.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from prenet4d_engines import models, weights
from prenet4d_engines.backends.torch_backend import folded
from prenet4d_engines.errors import BackendError, FrameError
from prenet4d_engines.models import center, denoiser, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.denoiser import ChannelAttention
from prenet4d_engines.models.layers import Attention
from prenet4d_engines.weights import Name

if TYPE_CHECKING:
    import onnx

OPSET: Final = 18
INPUT: Final = "x"
OUTPUT: Final = "y"
LARGEST_BATCH: Final = 4096
LARGEST_SIDE: Final = 4096

_EXACT_OUTPUTS: Final[dict[Name, tuple[str, ...]]] = {
    "denoise": (),
    "center": ("head.1", "usable"),
    "refine": ("head",),
    "ellipse": ("head",),
}
"""Layers whose outputs are handed out, and computed, in FP32."""


@dataclass(frozen=True)
class Graph:
    """A network as ONNX.

    Attributes:
        name: Which network.
        input_shape: (C, H, W) of one item of the batch; input ``x`` is float16.
        model: The serialised ONNX model; the same bytes whenever the sources are the same.
    """

    name: Name
    input_shape: tuple[int, int, int]
    model: bytes

    @property
    def sha256(self) -> str:
        """Of the model's bytes."""
        return hashlib.sha256(self.model).hexdigest()


def input_shape(name: Name, frame_shape: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of what a network reads, for frames of ``(h, w)`` pixels.

    Raises:
        FrameError: There are no frames of such a shape.
    """
    if not 8 <= min(frame_shape) <= max(frame_shape) <= LARGEST_SIDE:
        raise FrameError(
            f"Frames have 8 to {LARGEST_SIDE} pixels a side; {frame_shape[0]} × {frame_shape[1]} "
            "is no shape of a detector."
        )
    frame = torch.zeros(1, *frame_shape)
    mask = torch.ones(frame_shape, dtype=torch.bool)
    if name == "denoise":
        x = denoiser.stabilise(frame, mask)[0]
    elif name == "center":
        x = center.prepare(Bins.of(frame, mask))
    elif name == "refine":
        return refine.IN_CHANNELS, refine.SIDE, refine.SIDE
    else:
        x = ellipse.prepare(frame, torch.ones_like(frame))
    _, c, h, w = x.shape
    return c, h, w


def half_precision(name: Name) -> nn.Module:
    """Return the shipped network as its graph computes it: (n, C, H, W) float16 on the CPU.

    Raises:
        WeightsError: The weights are missing or damaged.
    """
    exact = folded(weights.load(name))
    network = copy.deepcopy(exact).half()
    inside = [
        path
        for path, module in exact.named_modules()
        if isinstance(module, (Attention, ChannelAttention))
    ]
    for path in (*inside, *_EXACT_OUTPUTS[name]):
        module = _InFloat32(exact.get_submodule(path), back=path in inside)
        network.set_submodule(path, module)
    return network.eval()


def export(name: Name, frame_shape: tuple[int, int]) -> Graph:
    """Export a shipped network for frames of ``(h, w)`` pixels.

    Raises:
        BackendError: The packages that write ONNX are not installed, or the export failed.
        FrameError: There are no frames of such a shape.
        WeightsError: The weights are missing or damaged.
    """
    return _export(name, input_shape(name, frame_shape))


@lru_cache(maxsize=16)
def _export(name: Name, shape: tuple[int, int, int]) -> Graph:
    # Two items: with one, the exporter takes the batch for a constant.
    example = torch.zeros((2, *shape), dtype=torch.float16)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    try:
        with _quiet():
            program = torch.onnx.export(
                half_precision(name),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except ModuleNotFoundError as missing:
        raise BackendError(
            f"Exporting a network needs the package {missing.name!r}: "
            "pip install 'prenet4d[engines]'"
        ) from missing
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).partition(". ")[0]
        raise BackendError(f"torch could not export the network {name!r}: {reason}.") from error
    assert program is not None
    model = program.model_proto
    _strip(model)
    return Graph(name, shape, model.SerializeToString(deterministic=True))


@lru_cache(maxsize=1)
def source_sha256() -> str:
    """Return a hash of all that a graph is made from: weights, the networks' code, torch.

    Exporting takes seconds and packages that a service need not have; this says at once whether an
    engine was made from what is installed now.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (*sorted(Path(models.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    for name in weights.NAMES:
        digest.update(str(weights.card(name)["sha256"]).encode())
    return digest.hexdigest()


class _InFloat32(nn.Module):
    """A module that computes in FP32 within a half-precision network."""

    def __init__(self, inner: nn.Module, *, back: bool):
        super().__init__()
        self.inner, self.back = inner, back

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.float())
        return y.half() if self.back else y


def _strip(model: onnx.ModelProto) -> None:
    """Remove what says where and how the model was made: paths, line numbers, names of modules."""
    graph: Any = model.graph
    things = (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info)
    for thing in (*things, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporter says about its own insides from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
