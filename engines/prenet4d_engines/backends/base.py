"""What every backend does: run the networks, and nothing else.

A backend maps an engine's input tensor to its output tensor. Everything around that (scaling
counts, decoding centers, resampling) needs FP32 and is written once, outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Backend(Protocol):
    """Runs the networks on one device; inputs and outputs are float32 on that device."""

    @property
    def name(self) -> str:
        """Short and stable: ``torch``."""
        ...

    @property
    def description(self) -> str:
        """One sentence for a person: where and in which precision it runs, and why."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs must lie and outputs will."""
        ...

    def spread(self, work: Callable[[slice], T], n: int) -> list[T]:
        """Do some work on ``n`` frames, in as many parts as the device works on at a time.

        Args:
            work: given the frames of one part; called in inference mode, from several threads at
                once where there are several parts.
            n: frames in all.

        Returns:
            What ``work`` returned for each part, in order.
        """
        ...

    def denoise(self, x: Tensor) -> Tensor:
        """Run the denoiser on what ``stabilise`` made: (n, C, H, W) → (n, 1, H, W)."""
        ...

    def center(self, x: Tensor) -> Tensor:
        """Run the center network on what ``prepare`` made: (n, C, H, W) → maps."""
        ...

    def refine(self, x: Tensor) -> Tensor:
        """Run the refining network on what ``prepare`` made: (n, C, S, S) → votes."""
        ...

    def ellipse(self, x: Tensor) -> Tensor:
        """Run the ellipse network on what ``prepare`` made: (n, C, R, P) → votes."""
        ...
