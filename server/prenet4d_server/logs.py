"""The log: sentences for people, or one JSON object a line for machines, on standard error.

The fields of a JSON line:

=================  ===============================================================================
``time``           ISO 8601, UTC, with microseconds
``level``          ``debug``, ``info``, ``warning`` or ``error``
``process``        ``service``, ``ingest`` (talks to the detector), ``recorder`` or ``page``
``logger``         the module that speaks
``message``        the sentence
``acquisition_id`` of the acquisition it belongs to, or that was running; absent between them
``code``           events only: their stable name, such as ``acquisition_ended``
``details``        events only, where there are some: the numbers in the sentence
``traceback``      of an error in the program
=================  ===============================================================================
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from prenet4d_server.config import LogSettings
from prenet4d_server.monitoring.status import ProcessName

_EXTRAS = ("acquisition_id", "code", "details")


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object."""

    def __init__(self, process: ProcessName) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Write one record as JSON."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name in _EXTRAS if (value := getattr(record, name, ""))}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(settings: LogSettings, process: ProcessName) -> None:
    """Send this package's log, others' warnings and what ends a thread to standard error, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines(process)
        if settings.format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    others, ours = logging.getLogger(), logging.getLogger("prenet4d_server")
    others.handlers[:] = ours.handlers[:] = [handler]
    others.setLevel("WARNING")
    ours.setLevel(settings.level.upper())
    ours.propagate = False
    logging.captureWarnings(True)
    threading.excepthook = _tell_of_a_thread


def _tell_of_a_thread(end: threading.ExceptHookArgs) -> None:
    if end.exc_value is None or end.exc_type is SystemExit:
        return
    logging.getLogger(__name__).error(
        "A fault in the program ended the thread %r, and what it did is no longer done: start "
        "again, and report what follows.",
        end.thread.name if end.thread is not None else "unknown",
        exc_info=(end.exc_type, end.exc_value, end.exc_traceback),
    )


def belongs_to(acquisition_id: Callable[[], str]) -> None:
    """Have every line that says nothing else belong to the acquisition that runs meanwhile.

    Args:
        acquisition_id: tells which; empty between acquisitions.
    """

    def name_it(record: logging.LogRecord) -> bool:
        if not getattr(record, "acquisition_id", ""):
            record.acquisition_id = acquisition_id()
        return True

    for handler in logging.getLogger("prenet4d_server").handlers:
        handler.addFilter(name_it)
