"""The progress bar of every long command; on stderr, so that results can be piped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

SILENT_S = 1.0
"""Nobody is left in doubt for longer about what is waited for."""


@contextmanager
def bar(what: str) -> Iterator[Callable[[float, str], None]]:
    """Show a progress bar while the block runs.

    Yields:
        A function to be told the share that is done, 0 to 1, and what is to be said beside it.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim")),
    )
    console = Console(stderr=True)
    # Where nobody sees it, all that it would leave is an empty line.
    hidden = not console.is_interactive
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=1.0, note="")

        def advance(share: float, note: str = "") -> None:
            progress.update(task, completed=share, note=note)

        yield advance


@contextmanager
def counter(what: str) -> Iterator[Callable[[str], None]]:
    """Show a line that changes while the block runs, where there is no end to count towards."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda note: status.update(f"{what}  [dim]{note}[/dim]")


class Wait:
    """Says on stderr what is waited for, where that takes long; on a terminal or not."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def begin(self, sentence: str) -> None:
        """The wait begins; ``sentence`` is said unless it is over soon."""
        options = {"file": sys.stderr, "flush": True}
        self._timer = threading.Timer(SILENT_S, print, [sentence], options)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """The wait is over; may be called at any time."""
        if self._timer is not None:
            self._timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
