"""What other threads have the pipeline's thread do for them, between two batches."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from prenet4d_engines.errors import EngineError
from prenet4d_server.errors import COMMAND_FAULT, CommandFailed

log = logging.getLogger(__name__)
T = TypeVar("T")


class Errands:
    """A queue of functions, with a descriptor that is readable while something waits in it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = (
            queue.SimpleQueue()
        )
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # nobody rings a descriptor that is another file's by now
        self._closed = False

    def call(self, errand: Callable[[], T]) -> Future[T]:
        """Have it done; from any thread.

        Returns:
            What the errand will have returned, or the CommandFailed that says why it has not. As
            long as it has not begun it can be cancelled.

        Raises:
            CommandFailed: the service is stopping.
        """
        answer: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise CommandFailed("The service is stopping.")
            self._waiting.put((errand, answer))
            os.eventfd_write(self.descriptor, 1)
        return answer

    def wake(self) -> None:
        """End the waiting for the descriptor; there may be nothing to do."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.descriptor, 1)

    def run(self) -> None:
        """Do what waits."""
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return
        while not self._waiting.empty():
            errand, answer = self._waiting.get()
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(errand())
                except (CommandFailed, EngineError) as error:
                    answer.set_exception(CommandFailed(str(error)))
                except Exception:
                    # What somebody asks for between two batches must not end the scan.
                    log.exception("A command failed by a fault in the program.")
                    answer.set_exception(CommandFailed(COMMAND_FAULT))

    def close(self) -> None:
        """Refuse what waits and what comes from now on."""
        with self._lock:
            self._closed = True
            os.close(self.descriptor)
        while not self._waiting.empty():
            _, answer = self._waiting.get()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(CommandFailed("The service is stopping."))
