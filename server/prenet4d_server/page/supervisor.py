"""The operator's page from the service's side: a process that is started, watched and ended.

The service listens itself and hands its socket over, so that a wrong address is told at once, and
who asks while the process is being started again waits instead of being refused.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prenet4d_server.errors import BindError
from prenet4d_server.restarts import Pauses
from prenet4d_server.sockets import refusal

if TYPE_CHECKING:
    from prenet4d_server.page.settings import PageSettings

BACKLOG = 128
RESTART_PAUSE_S = 1.0
END_TIMEOUT_S = 3.0


def listen(address: str, what: str = "http.address") -> tuple[socket.socket, str]:
    """Listen on ``tcp://host:port``; port ``*`` takes any free one.

    Args:
        address: where.
        what: the setting that holds the address, for the error's sentence.

    Returns:
        The socket and ``http://host:port``.

    Raises:
        BindError: the address cannot be bound.
    """
    host, _, port = urlsplit(address).netloc.rpartition(":")
    host = host.strip("[]").replace("*", "")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, 0 if port == "*" else int(port)))
        made.listen(BACKLOG)
    except (OSError, ValueError, OverflowError) as error:
        made.close()
        raise BindError(f"Cannot listen on {address} ({what}): {refusal(error)}.") from None
    shown = f"[{host}]" if family == socket.AF_INET6 else host or "0.0.0.0"
    return made, f"http://{shown}:{made.getsockname()[1]}"


class PageProcess:
    """Keeps the page's process running on a thread of its own.

    Args:
        listening: what :func:`listen` returned; closed with this.
        on_death: told the exit status of a process that ended by itself, before the next is
            started.
    """

    def __init__(self, listening: socket.socket, on_death: Callable[[int], None]) -> None:
        self._listening = listening
        self._on_death = on_death
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = b""
        self._thread = threading.Thread(target=self._keep_running, name="page", daemon=True)

    def start(self, settings: PageSettings) -> None:
        """Start the process; returns at once."""
        self._settings = settings.model_dump_json().encode() + b"\n"
        self._process = self._spawn()
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process's id, while it lives."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    def close(self) -> None:
        """End the process and stop listening; may be called before the start."""
        with self._lock:
            self._stop.set()
        if self._process is not None:
            _end(self._process)
            self._thread.join()
        self._listening.close()

    def _keep_running(self) -> None:
        pauses = Pauses(RESTART_PAUSE_S)
        while True:
            assert self._process is not None
            began = time.monotonic()
            status = self._process.wait()
            if self._stop.is_set():
                return
            _end(self._process)
            self._on_death(status)
            if self._stop.wait(pauses.after(time.monotonic() - began)):
                return
            with self._lock:
                if self._stop.is_set():
                    return
                self._process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = self._listening.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "prenet4d_server.page.process", str(descriptor)],
            stdin=subprocess.PIPE,
            pass_fds=(descriptor,),
            process_group=0,  # Ctrl-C is for the main process, which then closes its input
        )
        assert process.stdin is not None
        # It may have died at once: its exit status will say so.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._settings)
            process.stdin.flush()
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the process's input, upon which it ends; insist where it does not."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
