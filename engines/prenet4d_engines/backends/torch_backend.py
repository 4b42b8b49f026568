"""The networks in PyTorch: the reference on every machine, and the default without a GPU.

On the CPU: channels-last, float32; bfloat16 for each network where the processor has units for it
and the results agree with float32 (see ``parity``). The ellipse network runs once in many frames
and stays in float32. Each core works through frames of its own, from the first layer to the last:
threads that share every layer wait for the slowest of them each time, and one other busy process
slows them down many times over.

On an NVIDIA GPU: float16, channels-last, under the same check, all frames of a batch in one part;
the corrector records it in CUDA graphs (`cuda`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from prenet4d_engines import processor, weights
from prenet4d_engines.backends import parity
from prenet4d_engines.errors import BackendError

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")
_OFTEN: tuple[weights.Name, ...] = ("denoise", "center", "refine")
"""The networks that read every frame; the ellipse network, once in many, stays in float32."""
_SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class TorchBackend:
    """Runs the shipped networks with torch.

    Args:
        precision: ``auto`` takes the fastest arithmetic that agrees with float32 here; any other is
            used as it is.
        threads: CPU threads, each for frames of its own; ``None``: one for each core. For the whole
            process, torch itself is told to share no operation among threads.
        device: ``cpu`` or ``cuda``; ``None`` takes the GPU if torch sees one.

    Raises:
        BackendError: the device or precision does not run here.
    """

    name = "torch"

    def __init__(
        self,
        precision: Precision = "auto",
        *,
        threads: int | None = None,
        device: str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise BackendError(
                "torch sees no NVIDIA GPU; install a CUDA build of torch, or use the CPU."
            )
        if on_gpu and self.device.index is None:  # which one is current may change
            self.device = torch.device("cuda", torch.cuda.current_device())
        if precision == "float16" and not on_gpu:
            raise BackendError(
                "float16 needs an NVIDIA GPU; on the CPU choose auto, float32 or bfloat16."
            )
        self._threads = 1 if on_gpu else threads or max(1, int(processor.usable_cores()))
        self._pool = ThreadPoolExecutor(self._threads, "correct")
        if not on_gpu:
            torch.set_num_threads(1)

        exact = {name: folded(weights.load(name)) for name in weights.NAMES}
        self._networks = {name: self._in(torch.float32, net) for name, net in exact.items()}
        where = (
            torch.cuda.get_device_name(self.device)
            if on_gpu
            else f"the CPU with {self._threads} threads"
        )
        why = "as asked" if precision != "auto" else "this CPU has no units for bfloat16"
        if precision == "auto" and (on_gpu or processor.has_bfloat16_units()):
            why = self._gate(exact, torch.float16 if on_gpu else torch.bfloat16)
        elif precision not in ("auto", "float32"):
            for name in _OFTEN:
                self._networks[name] = self._in(_DTYPES[precision], exact[name])
        used = {name: _SHORT[network.dtype] for name, network in self._networks.items()}
        self.description = (
            f"PyTorch on {where}: denoiser in {used['denoise']}, center in {used['center']}, "
            f"its refinement in {used['refine']}, ellipse in {used['ellipse']} ({why})."
        )

    def spread(self, work: Callable[[slice], T], n: int) -> list[T]:
        """Do some work on ``n`` frames; see ``Backend.spread``."""
        size = -(-n // self._threads)
        parts = [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size or 1)]

        @torch.inference_mode()
        def do(part: slice) -> T:
            return work(part)

        return [do(parts[0])] if len(parts) == 1 else list(self._pool.map(do, parts))

    def denoise(self, x: Tensor) -> Tensor:
        """Run the denoiser: (n, C, H, W) → (n, 1, H, W), float32."""
        return self._networks["denoise"](x)

    def center(self, x: Tensor) -> Tensor:
        """Run the center network: (n, C, H, W) → (n, 6, H/4, W/4), float32."""
        return self._networks["center"](x)

    def refine(self, x: Tensor) -> Tensor:
        """Run the refining network: (n, C, S, S) → (n, 9, S/4, S/4), float32."""
        return self._networks["refine"](x)

    def ellipse(self, x: Tensor) -> Tensor:
        """Run the ellipse network: (n, C, R, P) → (n, 5, R/8, P/8), float32."""
        return self._networks["ellipse"](x)

    def _in(self, dtype: torch.dtype, exact: nn.Module) -> _Cast:
        network = copy.deepcopy(exact).to(dtype)
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _Cast(network, dtype)

    def _gate(self, exact: dict[weights.Name, nn.Module], dtype: torch.dtype) -> str:
        """Use ``dtype`` for each network that agrees with float32; return what was found."""
        found = []
        for name in _OFTEN:
            network = self._in(dtype, exact[name])
            deviation = parity.measure(name, network, exact[name], device=self.device)
            if deviation.within(parity.TORCH):
                self._networks[name] = network
            found.append(deviation.brief(parity.TORCH))
        return f"{_SHORT[dtype]} differs from float32 by {', '.join(found)}"


class _Cast:
    """A network in its own arithmetic between float32 tensors."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self._network = network

    def __call__(self, x: Tensor) -> Tensor:
        # The network itself brings channels to lie side by side, when it halves its input's sides.
        y: Tensor = self._network(x.to(self.dtype))
        return y.float()


def folded(network: nn.Module) -> nn.Module:
    """Fold every batch norm that follows a convolution into it, in place; return the network."""
    for block in network.modules():
        conv, norm = getattr(block, "conv", None), getattr(block, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv, block.norm = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network
