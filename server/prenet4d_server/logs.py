"""The log: sentences for people, or one JSON object a line for machines, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from prenet4d_server.config import LogSettings

_EXTRAS = ("code", "acquisition_id")


class JsonLines(logging.Formatter):
    """Time, level, logger, message, and the acquisition where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record as JSON."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name in _EXTRAS if (value := getattr(record, name, ""))}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure(settings: LogSettings) -> None:
    """Send this package's log to standard error, once."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines()
        if settings.format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    logger = logging.getLogger("prenet4d_server")
    logger.handlers[:] = [handler]
    logger.setLevel(settings.level.upper())
    logger.propagate = False
