"""Where a batch's time goes: a trace of the corrector, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from prenet4d_engines.backends import Backend
from prenet4d_engines.corrector import Corrector
from prenet4d_server.bench.stream import example_frames

_WARM_UP = 6
_LINES = 25


def write_trace(
    path: Path, backend: Backend, frame_shape: tuple[int, int], batch: int, batches: int
) -> str:
    """Profile some batches on their way, after a few to warm up.

    Args:
        path: takes the trace, as JSON; ``.json.gz`` is compressed.
        backend: runs the networks.
        frame_shape: ``(h, w)`` px.
        batch: frames in a batch.
        batches: how many to profile.

    Returns:
        A table of the operations that take longest.
    """
    corrector = Corrector(frame_shape, backend=backend)
    frames = np.resize(example_frames(frame_shape), (batch, *frame_shape))
    on_gpu = backend.device.type == "cuda"
    if on_gpu:  # as the service's ring is
        held = torch.from_numpy(frames).pin_memory()
        frames = held.numpy()

    def submit(number: int) -> None:
        corrector.submit(frames, np.arange(number * batch, (number + 1) * batch))

    for number in range(_WARM_UP):
        submit(number)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as recorded:
        for number in range(_WARM_UP, _WARM_UP + batches):
            submit(number)
        corrector.finish()
        if on_gpu:
            torch.cuda.synchronize(backend.device)
    recorded.export_chrome_trace(str(path))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table: str = recorded.key_averages().table(sort_by=order, row_limit=_LINES)
    return table
