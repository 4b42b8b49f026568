"""The programs on the front page work as printed, against a real service that corrects."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.server import live

from prenet4d_server.service import Service

ROOT = Path(__file__).parents[2]
SEND, SUBSCRIBE = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_frames_sent_by_one_program_come_out_of_the_other() -> None:
    settings = live.settings(
        corrector={"backend": "auto", "threads": 1},
        batch={"size": 16, "max_delay_ms": 1000 * live.TIMEOUT_S},  # however slowly they are sent
    )
    with Service(settings) as service:
        here = {
            "tcp://127.0.0.1:5560": service.endpoints["ingest"],
            "tcp://127.0.0.1:5561": service.endpoints["stream"],
        }
        send, subscribe = SEND, SUBSCRIBE
        for default, address in here.items():
            send, subscribe = send.replace(default, address), subscribe.replace(default, address)
        with subprocess.Popen(
            [sys.executable, "-u", "-c", subscribe], stdout=subprocess.PIPE, text=True
        ) as reader:
            live.until(lambda: service._publisher._subscribed("corrected"))
            subprocess.run([sys.executable, "-c", send], check=True)
            assert reader.stdout is not None
            first = reader.stdout.readline()
            reader.terminate()
    assert re.match(r"\[ *0 +1 .*", first), first


def test_subscribing_takes_five_lines() -> None:
    assert len([line for line in SUBSCRIBE.splitlines() if line]) <= 5
