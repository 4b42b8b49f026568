"""The yardstick: how fast bare pyzmq moves the same bytes between two processes.

Run as a module (``python -m prenet4d_server.bench.bare ADDRESS N BYTES``) it is the pushing side.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import zmq

from prenet4d_server.processes import Child, ChildFailed


def messages_per_second(messages: int, size: int, log: Path) -> float:
    """Push ``messages`` of ``size`` bytes over TCP to this process; return the rate.

    The clock runs from the first message received to the last one.

    Raises:
        ChildFailed: the pushing process did not push.
    """
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        pull.rcvtimeo = 30_000
        arguments = (f"tcp://127.0.0.1:{port}", str(messages), str(size))
        with Child("pusher", "-m", __name__, *arguments, log=log) as pusher:
            try:
                pull.recv(copy=False)
                began = time.perf_counter()
                for _ in range(messages - 1):
                    pull.recv(copy=False)
                took = time.perf_counter() - began
            except zmq.Again:
                raise ChildFailed(f"The pusher fell silent: {pusher.last_words()}") from None
    return (messages - 1) / took


def _push(address: str, messages: int, size: int) -> None:
    payload = bytes(size)
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(address)
        for _ in range(messages):
            push.send(payload, copy=False)


if __name__ == "__main__":
    _push(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
