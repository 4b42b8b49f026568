"""The yardstick: how fast bare pyzmq moves the same bytes between two processes.

Run as a module (``python -m prenet4d_server.bench.bare ADDRESS FRAMES.npy TOGETHER MESSAGES``) it
is the pushing side.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import zmq

from prenet4d_server.processes import Child, ChildFailed


def frames_per_second(frames: Path, together: int, messages: int, log: Path) -> float:
    """Push frames over TCP to this process, the stored ones in turn; return the rate.

    The clock runs from the first message received to the last one.

    Args:
        frames: an ``.npy`` file of (k, h, w) frames.
        together: frames in a message, a divisor of k.
        messages: how many to push.
        log: where the pushing process may complain.

    Raises:
        ChildFailed: the pushing process did not push.
    """
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        pull.rcvtimeo = 30_000
        arguments = (f"tcp://127.0.0.1:{port}", str(frames), str(together), str(messages))
        with Child("pusher", "-m", __name__, *arguments, log=log) as pusher:
            try:
                pull.recv(copy=False)
                began = time.perf_counter()
                for _ in range(messages - 1):
                    pull.recv(copy=False)
                took = time.perf_counter() - began
            except zmq.Again:
                raise ChildFailed(f"The pusher fell silent: {pusher.last_words()}") from None
    return together * (messages - 1) / took


def _push(address: str, frames: str, together: int, messages: int) -> None:
    stored = np.load(frames)
    payloads = [
        stored[first : first + together].data.cast("B") for first in range(0, len(stored), together)
    ]
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(address)
        for payload in itertools.islice(itertools.cycle(payloads), messages):
            push.send(payload, copy=False)


if __name__ == "__main__":
    _push(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
