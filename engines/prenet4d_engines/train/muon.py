"""Steps for weight matrices that are equally long in all directions of a matrix.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): a gradient's momentum is
replaced by the nearest matrix with orthonormal rows or columns, so that directions which few
samples need are learned as fast as those that most do. A convolution's kernel counts as the matrix
that maps what it sees to its channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

_MOMENTUM: Final = 0.95
_LEAST: Final = 16
"""Rows and columns of a matrix that this is for: fewer answer, or read, something each."""
_LIKE_ADAM: Final = 0.2
"""Root mean square of an entry's step, in units of the rate (Liu et al. 2025, arXiv:2502.16982)."""
_POLYNOMIAL: Final = (3.4445, -4.7750, 2.0315)
"""Brings singular values near one, in five iterations (Jordan et al.)."""


def optimisers(network: nn.Module, rate: float, decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Return what takes the steps of a network's matrices, and AdamW for all else.

    Args:
        network: Its parameters are split among the two.
        rate: Learning rate of both.
        decay: Weight decay of both, in units of the rate.
    """
    matrices = [p for p in network.parameters() if _is_matrix(p)]
    rest = [p for p in network.parameters() if not _is_matrix(p)]
    return _Muon(matrices, rate, decay), torch.optim.AdamW(rest, lr=rate, weight_decay=decay)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and min(parameter.flatten(1).shape) >= _LEAST


class _Muon(torch.optim.Optimizer):
    def __init__(self, matrices: Iterable[Tensor], rate: float, decay: float):
        super().__init__(matrices, {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, with Nesterov's momentum."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonal(gradient.lerp(state["momentum"], _MOMENTUM).flatten(1))
        step = group["lr"] * _LIKE_ADAM * max(direction.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["decay"])
        parameter.sub_(direction.view_as(parameter), alpha=step)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return (r, c) with singular vectors as those of a matrix (r, c), and values of about one."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-12)
    a, b, c = _POLYNOMIAL
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
