"""How fast the corrector is by itself: the yardstick for the whole service.

Run as a module: ``python -m prenet4d_server.bench.corrector FRAMES.npy BACKEND BATCH SECONDS OUT``
writes the frames per second as JSON to OUT.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def frames_per_second(frames: np.ndarray, backend: str, batch: int, seconds: float) -> float:
    """Correct batches for so long, after three to warm up.

    Args:
        frames: (k, h, w) counts, used in turn.
        backend: as in the settings.
        batch: frames in a batch.
        seconds: how long to measure.
    """
    from prenet4d_engines.config import CorrectorConfig
    from prenet4d_engines.corrector import Corrector

    config = CorrectorConfig(backend=backend)  # type: ignore[arg-type]  # checked by pydantic
    corrector = Corrector(frames.shape[1:], config=config)
    repeated = np.resize(frames, (max(len(frames), batch), *frames.shape[1:]))
    done = 0

    def step() -> None:
        nonlocal done
        first = done % (len(repeated) - batch + 1)
        indices = np.arange(done, done + batch, dtype=np.int64)
        corrector.process(repeated[first : first + batch], indices)
        done += batch

    for _ in range(3):
        step()
    before, began = done, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        step()
    return (done - before) / took


if __name__ == "__main__":
    rate = frames_per_second(
        np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    )
    Path(sys.argv[5]).write_text(json.dumps(rate))
