"""The recorder that the service starts, as a process of its own: a lossless receiver like others.

It reads an :class:`Order` from its standard input, writes a :class:`Report` to its standard output
whenever there is something new, and ends when it reads ``stop`` or when the service is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prenet4d_client import LosslessReceiver
from prenet4d_client.errors import Prenet4dError
from prenet4d_server import logs
from prenet4d_server.config import LogSettings
from prenet4d_server.errors import ServiceError
from prenet4d_server.recording.layout import Compression
from prenet4d_server.recording.recorder import Recorder, Summary, record

REPORT_EVERY_S = 0.25


class Order(BaseModel):
    """What to record, from where, to where."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    path: Path
    lossless: str
    """The service's lossless address."""
    server_key: str | None
    """Its public CURVE key."""
    content: tuple[Literal["corrected", "aligned"], ...]
    compression: Compression
    keep_free: int
    """Bytes to leave free on the disk."""
    log: LogSettings


class Report(BaseModel):
    """How far the recording is; the first one says that from now on nothing is missed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    files: tuple[str, ...] = ()
    """Names in the recording's folder, in the order in which they were begun."""
    patterns: int = 0
    absent: int = 0
    """Patterns that were announced and are not in the closed files."""
    complete: bool = True
    reason: str = ""
    """Why it is not complete."""
    lost: str = ""
    """Why the service was lost, where that ended it."""
    error: str = ""
    """Why it cannot go on."""


def _report(summary: Summary) -> Report:
    return Report(
        files=tuple(path.name for path in summary.files),
        patterns=summary.patterns,
        absent=summary.absent,
        complete=summary.complete,
        reason=summary.reason,
        lost=summary.lost,
    )


def _say(report: Report) -> None:
    with contextlib.suppress(BrokenPipeError):  # the service is gone: nobody listens any more
        os.write(1, report.model_dump_json().encode() + b"\n")


def _converse(
    orders: FileIO, recorder: Recorder, stop: threading.Event, done: threading.Event
) -> None:
    """Report what is new and listen for ``stop``, until the recording is done."""
    said = Report()
    listening = True
    while not done.wait(0 if listening else REPORT_EVERY_S):
        if listening and select.select([orders], [], [], REPORT_EVERY_S)[0]:
            line = orders.readline()
            listening = bool(line)  # a service that died is noticed by its missing heartbeats
            if line.strip() == b"stop":
                stop.set()
        now = _report(recorder.summary)
        if now != said:
            _say(now)
            said = now


def _run(order: Order, orders: FileIO, stop: threading.Event) -> Report:
    done = threading.Event()
    with (
        Recorder(
            order.path,
            content=order.content,
            compression=order.compression,
            keep_free=order.keep_free,
        ) as recorder,
        LosslessReceiver(
            order.lossless, name="recorder", topics=recorder.topics, server_key=order.server_key
        ) as receiver,
    ):
        _say(Report())
        conversation = threading.Thread(target=_converse, args=(orders, recorder, stop, done))
        conversation.start()
        logs.belongs_to(lambda: recorder.acquisition_id)
        try:
            record(receiver, recorder, stop)
        except (ServiceError, OSError) as error:
            failed = {"error": str(error), "complete": False}
            return _report(recorder.summary).model_copy(update=failed)
        finally:
            done.set()
            conversation.join()
    return _report(recorder.summary)


def main() -> int:
    """Record as the order on standard input says; returns the process's exit status."""
    orders = FileIO(0, closefd=False)  # with no buffer, so that select sees all that has come
    order = Order.model_validate_json(orders.readline())
    logs.configure(order.log, "recorder")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        last = _run(order, orders, stop)
    except (ServiceError, Prenet4dError, OSError) as error:
        last = Report(error=str(error), complete=False)
    _say(last)
    if last.error:
        os._exit(1)  # HDF5 crashes where it tidies up after a file that it could not close
    return 0


if __name__ == "__main__":
    sys.exit(main())
