"""The log: one JSON object a line, each of which says which acquisition it belongs to."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prenet4d_client import ControlClient, FrameSender
from prenet4d_server import logs
from prenet4d_server.config import LogSettings
from prenet4d_server.processes import RunningService

from .live import TIMEOUT_S, frames, until


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """The package's logger; it and the root are as they were found again afterwards."""
    chosen = [logging.getLogger("prenet4d_server"), logging.getLogger()]
    before = [(one.handlers[:], one.level, one.propagate) for one in chosen]
    hook = threading.excepthook
    yield chosen[0]
    threading.excepthook = hook
    logging.captureWarnings(False)
    for one, (handlers, level, propagate) in zip(chosen, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_an_object_and_names_its_acquisition(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    running = ""
    logs.configure(LogSettings(format="json"), "ingest")
    logs.belongs_to(lambda: running)
    log.info("between\ntwo")
    running = "scan"
    log.warning("of it, %s", "ä")
    log.error("of another", extra={"acquisition_id": "other", "code": "x", "details": {"n": 1}})
    try:
        {}["broken"]
    except KeyError:
        log.exception("a bug")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    said = lines(capsys.readouterr().err)
    assert [line.get("acquisition_id") for line in said] == [None, "scan", "other", "scan", "scan"]
    assert {line["process"] for line in said} == {"ingest"}
    assert [line["level"] for line in said] == ["info", "warning", "error", "error", "warning"]
    assert said[1]["message"] == "of it, ä"
    assert (said[2]["code"], said[2]["details"]) == ("x", {"n": 1})
    assert "KeyError: 'broken'" in said[3]["traceback"]
    assert "DeprecationWarning: old" in said[4]["message"]


def test_a_thread_that_a_fault_ended_is_told_of(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(LogSettings(format="json"), "service")
    broken = threading.Thread(target=lambda: {}["broken"], name="alarms")
    asked_to_end = threading.Thread(target=sys.exit)
    for thread in (broken, asked_to_end):
        thread.start()
        thread.join()
    (said,) = lines(capsys.readouterr().err)
    assert said["level"] == "error"
    assert "ended the thread 'alarms'" in said["message"]
    assert "KeyError: 'broken'" in said["traceback"]


def test_the_log_of_a_service(tmp_path: Path) -> None:
    with RunningService(
        tmp_path,
        corrector={"backend": "identity"},
        ring={"size": "8MiB"},
        log={"format": "json"},
        http={"enabled": False},  # what the page may have to say belongs to no acquisition
    ) as service:
        with (
            FrameSender(service.detector, timeout=TIMEOUT_S) as source,
            ControlClient(service.control, timeout=TIMEOUT_S) as client,
        ):
            source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3))
            source.send(frames(5))
            source.send(frames(1), [77])
            until(lambda: client.status()["counters"]["rejected"])
            source.end()
            until(lambda: client.status()["acquisition"] is None)
        service.stop()
    said = lines(service.log.read_text())
    codes = [line.get("code") for line in said]
    began, ended = codes.index("acquisition_started"), codes.index("acquisition_ended")
    of_it = {line.get("acquisition_id") for line in said[began : ended + 1]}
    assert len(of_it) == 1
    assert None not in of_it
    (rejection,) = [line for line in said if line.get("code") == "index_outside_scan"]
    assert rejection["acquisition_id"] in of_it
    assert rejection["details"] == {"rejected": 1}
    assert "acquisition_id" not in said[0]


def test_logs_are_sentences_by_default() -> None:
    code = (
        "import logging; from prenet4d_server import logs; "
        "from prenet4d_server.config import LogSettings; "
        "logs.configure(LogSettings(), 'service'); "
        "logging.getLogger('prenet4d_server.x').info('Ready.')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.endswith(" INFO    Ready.\n")
