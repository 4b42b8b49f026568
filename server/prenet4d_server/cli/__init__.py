"""The command line: one small file for each group of commands, all of them thin.

Commands import what they need when they run, so that ``prenet4d --help`` starts at once and no
torch is loaded before a network is.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
import typer.core

from prenet4d_server.cli import (
    calibrate,
    checks,
    control,
    detector,
    engines,
    page,
    record,
    science,
    service,
    watch,
)
from prenet4d_server.memory import keep_freed_memory


class _Commands(typer.core.TyperGroup):
    """The commands, whose refusals of a value do not begin with pydantic's name for them."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as refused:
            refused.message = refused.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="prenet4d",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (service, watch, page, record, control, calibrate, detector, engines, science, checks):
    group.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"prenet4d {version('prenet4d')}")
        raise typer.Exit


@app.callback(
    epilog="Example:  [bold]prenet4d demo[/bold]   shows all of it at work in two minutes."
)
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Correct 4D-STEM patterns live: denoise, center and undistort while the scan is running."""


def run() -> int:
    """Run the command in ``sys.argv``; return its exit status.

    What goes wrong is one sentence on stderr, a bug too; ``--traceback`` shows where.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # no result is lost because a × cannot be shown
    if "--traceback" in sys.argv[1:2]:
        return _exit_status()
    try:
        return _exit_status()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _say(_sentence(error))
    except MemoryError as error:
        return _say(f"There is not enough memory for this: {error or 'ask for less'}.")
    except _expected() as error:
        return _say(str(error) or type(error).__name__, getattr(error, "exit_status", 1))
    except ModuleNotFoundError as missing:
        return _say(
            f"The package {missing.name!r} is missing. "
            "Install the server extra: pip install 'prenet4d[server]'"
        )
    except Exception as bug:  # noqa: BLE001 - the one place where nothing stands above
        if _interrupted(bug):
            return 130
        return _say(
            f"This is a bug in prenet4d ({type(bug).__name__}: {bug}). "
            "Please report it, with what `prenet4d --traceback …` shows."
        )


def _exit_status() -> int:
    try:
        app()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: an import may make a RuntimeError of it, for example."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _expected() -> tuple[type[Exception], ...]:
    """The errors that are told to the user as they are; imported when there is one to tell."""
    from prenet4d_client.errors import Prenet4dError
    from prenet4d_engines.errors import EngineError
    from prenet4d_server.errors import ServiceError

    return (Prenet4dError, EngineError, ServiceError)


def _sentence(error: OSError) -> str:
    """What the system said, without its numbers and quotes."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}."


def _say(sentence: str, status: int = 1) -> int:
    print(f"prenet4d: {sentence}", file=sys.stderr)
    return status
