"""``prenet4d dashboard`` as a process, and a service that is not where it was said to be."""

from __future__ import annotations

from prenet4d_server.processes import Child

from ..live import until


def test_an_ipv6_host_is_written_as_addresses_have_it(tmp_path):
    log = tmp_path / "log"
    command = ("dashboard", "--connect", "::1", "--listen", "tcp://127.0.0.1:*")
    with Child.command("dashboard", *command, log=log) as dashboard:
        until(lambda: "(tcp://[::1]:5563)" in log.read_text())
        dashboard.check()


def test_a_host_that_nobody_knows_is_told_and_tried_again(tmp_path):
    log = tmp_path / "log"
    command = ("dashboard", "--connect", "microscope.invalid", "--listen", "tcp://127.0.0.1:*")
    with Child.command("dashboard", *command, log=log) as dashboard:
        until(lambda: "knows no host 'microscope.invalid'" in log.read_text())
        assert "Trying again and again" in log.read_text()
        dashboard.check()
