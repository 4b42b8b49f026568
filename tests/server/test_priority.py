"""Who waits for whom."""

import os
import subprocess
import sys

import pytest

SHOW = """
import os
from prenet4d_server.priority import run_when_idle
run_when_idle()
print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0))
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux alone has an idle class")
def test_a_process_that_runs_when_idle_is_behind_all_others():
    said = subprocess.run(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, text=True, check=True
    )
    assert said.stdout.split() == ["True", "19"]
