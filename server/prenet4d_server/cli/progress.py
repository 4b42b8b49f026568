"""The progress bar of every long command; on stderr, so that results can be piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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
