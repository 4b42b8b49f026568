"""Who waits for whom, where there are fewer processors than work."""

from __future__ import annotations

import contextlib
import os

_NICENESS = 19


def run_when_idle() -> None:
    """Have this process run only while nobody else wants the processor.

    Being nice is not enough: a tenth of one core taken from the correction holds all its other
    cores up, which wait for the last one to finish its frames.
    """
    os.nice(_NICENESS)
    with contextlib.suppress(AttributeError, PermissionError):  # not Linux; a sandbox forbids it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
