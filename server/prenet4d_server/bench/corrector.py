"""How fast the corrector is by itself: the yardstick for the whole service.

Run as a module: ``python -m prenet4d_server.bench.corrector FRAMES.npy BACKEND BATCH SECONDS OUT``
writes the frames per second as JSON to OUT.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np

from prenet4d_server.memory import keep_freed_memory

_WARM_UP = 3


def batch_seconds(frames: np.ndarray, backend: str, batch: int, seconds: float) -> list[float]:
    """Correct batches for so long, after three to warm up, and time each.

    Args:
        frames: (k, h, w) counts, used in turn.
        backend: as in the settings.
        batch: frames in a batch.
        seconds: how long to measure.

    Returns:
        Seconds of each batch, in order; at least one.
    """
    from prenet4d_engines.config import CorrectorConfig
    from prenet4d_engines.corrector import Corrector

    config = CorrectorConfig(backend=backend)  # type: ignore[arg-type]  # checked by pydantic
    corrector = Corrector(frames.shape[1:], config=config)
    repeated = np.resize(frames, (max(len(frames), batch), *frames.shape[1:]))
    times: list[float] = []
    began = time.perf_counter()
    for number in itertools.count():
        if number == _WARM_UP:
            began = time.perf_counter()
        if number > _WARM_UP and time.perf_counter() - began >= seconds:
            break
        done = number * batch
        first = done % (len(repeated) - batch + 1)
        started = time.perf_counter()
        corrector.process(repeated[first : first + batch], np.arange(done, done + batch))
        times.append(time.perf_counter() - started)
    return times[_WARM_UP:]


if __name__ == "__main__":
    keep_freed_memory()
    times = batch_seconds(np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    rate = int(sys.argv[3]) * len(times) / sum(times)
    Path(sys.argv[5]).write_text(json.dumps(rate))
