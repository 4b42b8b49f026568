"""Other processes of prenet4d's own, started, awaited and ended: for the demo and the benchmark."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prenet4d_engines.toml_text import toml_value
from prenet4d_server.config import ENVIRONMENT_PREFIX
from prenet4d_server.errors import ServiceError

_PR_SET_PDEATHSIG = 1
_READY_WITHIN_S = 90.0
_RECEIVERS_WITHIN_S = 60.0
_ANSWER_WITHIN_S = 30.0


class ChildFailed(ServiceError):
    """A process that was started did not do its work."""

    code = "child_failed"


class Child:
    """One command of prenet4d as a process of its own; leaving the block ends it.

    Args:
        name: what to call it when it fails.
        arguments: of ``python``, usually ``-m prenet4d_server …``.
        log: where its stderr goes, and its stdout too unless ``show``.
        show: leave its stdout on ours.
        python: the interpreter.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        log: Path,
        show: bool = False,
        python: Path | str = sys.executable,
    ) -> None:
        self.name = name
        self.log = log
        # What a site sets for its own service is not meant for one on ports of its own.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(ENVIRONMENT_PREFIX)
        } | {"PYTHONUNBUFFERED": "1"}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=None if show else sink,
                stderr=sink,
                env=environment,
                # A Ctrl-C in the terminal is ours to pass on, in the right order.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @classmethod
    def command(cls, name: str, *arguments: str, log: Path, show: bool = False) -> Self:
        """Start ``prenet4d`` with these arguments."""
        return cls(name, "-m", "prenet4d_server", *arguments, log=log, show=show)

    def check(self) -> None:
        """Raise where the process has ended with an error.

        Raises:
            ChildFailed: with the last line that it wrote.
        """
        status = self.process.poll()
        if status not in (None, 0):
            raise ChildFailed(f"The {self.name} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def wait(self, timeout: float) -> None:
        """Wait for its end.

        Raises:
            ChildFailed: it takes longer, or ended with an error.
        """
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ChildFailed(
                f"The {self.name} did not end within {timeout:g} s: {self.last_words()}"
            ) from None
        self.check()

    def stop(self, timeout: float = 20.0) -> None:
        """Ask it to end as Ctrl-C does, and insist where it does not."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(timeout=20.0 if error is None else 5.0)


def _end_with_parent() -> None:
    """Have Linux interrupt this process when its parent dies, however suddenly."""
    # What a shell starts in the background ignores it, and so would all that is started from there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


@contextlib.contextmanager
def reserved_addresses(count: int) -> Iterator[list[str]]:
    """TCP addresses on this machine that are given to nobody else while the block lasts.

    A socket that is bound, and does not listen, keeps each port. Who is told of it may listen there
    nevertheless, as often as he likes: Linux asks for no more than ``SO_REUSEADDR``, which ZeroMQ
    and web servers set.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        yield [f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in sockets]


class RunningService(Child):
    """A service of our own, on ports that are its own, ready when the constructor returns.

    Args:
        folder: takes its configuration and its log.
        sections: settings beside the addresses: section → field → value.

    Raises:
        ChildFailed: it ended, or took too long.
    """

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        with contextlib.ExitStack() as undo:
            addresses = undo.enter_context(reserved_addresses(5))
            self.detector, self.stream, self.lossless, self.control, self.http = addresses
            listening = {
                name: {"address": getattr(self, name), **sections.pop(name, {})}
                for name in ("stream", "lossless", "control", "http")
            }
            source = {"address": self.detector, **sections.pop("source", {})}
            config = folder / "service.toml"
            config.write_text(_toml({"source": source, **listening, **sections}), encoding="utf-8")
            arguments = ("-m", "prenet4d_server", "serve", "--config", str(config))
            super().__init__("service", *arguments, log=folder / "service.log")
            undo.callback(super().stop, timeout=5.0)
            self._wait_until_ready()
            self._undo = undo.pop_all()

    def stop(self, timeout: float = 20.0) -> None:
        """End it (see `Child.stop`), and let others have its ports."""
        super().stop(timeout)
        self._undo.close()

    def status(self) -> dict[str, Any]:
        """What it says about itself."""
        from prenet4d_client import ControlClient

        with ControlClient(self.control, timeout=_ANSWER_WITHIN_S) as client:
            return client.status()

    def wait_for_receivers(self, count: int) -> None:
        """Wait until so many lossless receivers have registered.

        Raises:
            ChildFailed: they have not, in that time.
        """
        deadline = time.monotonic() + _RECEIVERS_WITHIN_S
        while time.monotonic() < deadline:
            self.check()
            if len(self.status()["receivers"]) >= count:
                return
            time.sleep(0.1)
        raise ChildFailed(f"The service saw no {count} receivers within {_RECEIVERS_WITHIN_S:g} s.")

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory of the main process and of the one that talks to the detector."""
        import psutil

        main = psutil.Process(self.process.pid)
        ingest = max(main.children(), key=lambda child: child.memory_info().rss, default=None)
        sizes = {"service": main.memory_info().rss}
        return sizes if ingest is None else {**sizes, "ingest": ingest.memory_info().rss}

    def _wait_until_ready(self) -> None:
        from prenet4d_client import ControlClient
        from prenet4d_client.errors import NoAnswer

        deadline = time.monotonic() + _READY_WITHIN_S
        with ControlClient(self.control, timeout=0.5) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    client.status()
                except NoAnswer:
                    continue
                return
        raise ChildFailed(
            f"The service was not ready within {_READY_WITHIN_S:g} s: {self.last_words()}"
        )


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in fields.items())
        for name, fields in sections.items()
    )
