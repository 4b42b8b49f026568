"""A service on free ports, and what it publishes, for tests that speak to it over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from prenet4d_client import FrameSender, Subscriber
from prenet4d_client.errors import NoAnswer
from prenet4d_client.wire import Message
from prenet4d_server.config import Settings
from prenet4d_server.config_file import load_settings
from prenet4d_server.service import Service

FREE = "tcp://127.0.0.1:*"
TIMEOUT_S = 60.0
QUEUE = 1 << 16
"""Messages that may wait for a listener: more than any test makes."""
TOPICS = ("telemetry", "event", "acquisition_start", "acquisition_end")


def settings(**sections: dict[str, Any] | float) -> Settings:
    """Free ports everywhere, a small ring, nothing corrected, no page; ``sections`` change it.

    Nothing is missed, and nobody is given up, because a loaded machine lets him wait.
    """
    content: dict[str, Any] = {
        name: {"address": FREE} for name in ("source", "stream", "lossless", "control", "http")
    }
    content |= {"ring": {"size": 8 << 20}, "corrector": {"backend": "identity"}}
    content["http"] |= {"enabled": False, "gives_way": False}
    content["stream"]["high_water"] = QUEUE
    content["lossless"]["heartbeat_s"] = TIMEOUT_S
    for name, section in sections.items():
        both = isinstance(section, dict) and name in content
        content[name] = content[name] | section if both else section
    return load_settings(**content)


def subscriber(service: Service, topics: str | tuple[str, ...], **options: Any) -> Subscriber:
    """The only subscriber to these topics, and the service knows of it."""
    names = (topics,) if isinstance(topics, str) else topics
    until(lambda: not any(service._publisher._subscribed(name) for name in names))
    patient = {"timeout": TIMEOUT_S, "queue": QUEUE}
    made = Subscriber(service.endpoints["stream"], topics, **(patient | options))
    made._open()
    until(lambda: all(service._publisher._subscribed(name) for name in names))
    return made


class Listener:
    """Collects what the service publishes, from the moment it is made."""

    def __init__(self, service: Service, topics: tuple[str, ...] = TOPICS) -> None:
        self.messages: list[Message] = []
        self._stop = threading.Event()
        self._subscriber = subscriber(service, topics, timeout=0.1)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                self.messages.append(self._subscriber.receive())
            except NoAnswer:
                continue

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message.header.type == kind]

    def wait_for(self, kind: str, count: int = 1) -> Message:
        until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]

    def codes(self) -> list[str]:
        return [message.code for message in self.of("event")]

    def wait_for_event(self, code: str) -> Message:
        until(lambda: code in self.codes())
        return next(event for event in self.of("event") if event.code == code)

    def indices(self) -> list[int]:
        """Of every frame that came out, in order."""
        return [int(i) for message in self.of("telemetry") for i in message.indices]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._subscriber.close()


@contextmanager
def listening(service: Service, topics: tuple[str, ...] = TOPICS) -> Iterator[Listener]:
    listener = Listener(service, topics)
    try:
        yield listener
    finally:
        listener.close()


def sender(service: Service, **options: Any) -> FrameSender:
    return FrameSender(service.endpoints["ingest"], timeout=TIMEOUT_S, **options)


def frames(n: int, shape: tuple[int, int] = (16, 24), dtype: str = "uint16") -> np.ndarray:
    """(n, h, w) frames, each of which holds its own number in every pixel."""
    return np.broadcast_to(np.arange(n, dtype=dtype)[:, None, None], (n, *shape)).copy()


def until(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def balanced(counters: Any) -> bool:
    parts = counters.corrected + counters.rejected + counters.shed + counters.in_flight
    reasons = sum(counters.rejected_by_reason.values())
    return counters.received == parts and counters.rejected == reasons and counters.in_flight >= 0
