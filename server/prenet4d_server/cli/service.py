"""Running the service: ``serve``, its configuration and its keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prenet4d_server.cli.arguments import (
    GAIN,
    LARGEST_RATE,
    LEAST_RATE,
    ScanOption,
    address,
    refuse_misfits,
)
from prenet4d_server.errors import ConfigError

_SERVE = (
    "Examples:\n\n"
    "[bold]prenet4d serve[/bold]   takes frames from FrameSender on port 5560\n\n"
    "[bold]prenet4d serve --source dectris2 --connect tcp://172.31.1.1:31001 --scan 256x256[/bold]"
)

_KeyFile = typer.Option(
    exists=True, dir_okay=False, help="Secret key that prenet4d keygen made: encrypts every socket."
)


_FITS = {
    "connect": ("native", "dectris1", "dectris2"),
    "channel": ("dectris2",),
    "gain": ("dectris1", "dectris2", "replay"),
    "data": ("replay",),
    "rate": ("replay",),
}
"""Flag → the sources that it says something to; FrameSender tells the gain itself."""


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file (prenet4d config prints one). Flags win over it."),
    ] = None,
    source: Annotated[
        Literal["native", "dectris1", "dectris2", "replay"] | None,
        typer.Option(help="Where frames come from."),
    ] = None,
    connect: Annotated[
        str | None,
        address("--connect", "The detector's address; with --source native, where to listen."),
    ] = None,
    scan: ScanOption = None,
    channel: Annotated[
        str | None, typer.Option(help="dectris2: which threshold channel to correct.")
    ] = None,
    gain: Annotated[float | None, GAIN] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, help="replay: the file or store (.npy, HDF5, Zarr, .mib, …)."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=LEAST_RATE,
            max=LARGEST_RATE,
            help="replay: frames per second; as fast as it goes by default.",
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "tensorrt", "torch", "identity"] | None,
        typer.Option(help="What runs the networks; identity corrects nothing."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Frames in a full batch.")] = None,
    when_full: Annotated[
        Literal["block", "shed"] | None,
        typer.Option(help="Hold the detector back, or drop whole frames and count them."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Start locked, on a calibration that was saved."
        ),
    ] = None,
    secret_key: Annotated[Path | None, _KeyFile] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without encryption.")
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="The least important messages to write."),
    ] = None,
) -> None:
    """Run the service until Ctrl-C: take frames in, correct them, publish what comes out."""
    from prenet4d_server import service as runner
    from prenet4d_server.config_file import load_settings

    sections = _said(
        source={
            "kind": source or ("replay" if data else None),
            "address": connect,
            "scan_shape": scan,
            "channel": int(channel) if channel and channel.isdecimal() else channel,
            "gain": gain,
            "path": data,
            "rate": rate,
        },
        corrector={"backend": backend},
        batch={"size": batch},
        ring={"policy": when_full},
        security={"secret_key_file": secret_key, "insecure": insecure or None},
        log={"level": log_level},
    )
    with _final_refusals():
        settings = load_settings(config, **sections)
        kind = settings.source.kind
        for flag, kinds in _FITS.items():
            if kind not in kinds:
                why = f"says nothing to {kind}, where frames come from: it goes with --source "
                refuse_misfits(context, [flag], f"{why}{' or '.join(kinds)}.")
        raise typer.Exit(runner.serve(settings, calibration=_read_calibration(calibration)))


@contextlib.contextmanager
def _final_refusals() -> Iterator[None]:
    """Exit with a status after which systemd does not start the service again: it helps nothing."""
    try:
        yield
    except ConfigError as error:
        error.exit_status = os.EX_CONFIG
        raise


def _said(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The flags that were given, section by section."""
    given = {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in sections.items()
    }
    return {name: section for name, section in given.items() if section}


def _read_calibration(path: Path | None) -> Any:
    if path is None:
        return None
    from prenet4d_engines.calibration_file import read_calibration

    return read_calibration(path)


def config(
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Say whether a file makes sense, and leave.")
    ] = None,
) -> None:
    """Print a commented configuration with every setting at its default."""
    from prenet4d_server.config_file import example_toml, load_settings
    from prenet4d_server.page.operator_token import OperatorToken
    from prenet4d_server.sockets import load_keys

    if check is None:
        print(example_toml(), end="")
        return
    with _final_refusals():
        settings = load_settings(check)
        load_keys(settings.security.secret_key_file)
        token = settings.http.operator_token_file
        if token is not None and token.exists():  # else the service makes it, as its own user
            OperatorToken(None, token)
    source = settings.source
    where = source.path if source.kind == "replay" else source.endpoint
    print(f"{check} is good: frames from {source.kind} at {where}.")


def keygen(
    directory: Annotated[Path, typer.Argument(help="Where to put the two files.")] = Path(),
) -> None:
    """Make the service's pair of CURVE keys, for listening beyond this machine."""
    from prenet4d_server.sockets import generate_keys

    public, secret = generate_keys(directory)
    print(f"Secret key, for the service alone:  {secret}")
    print(f"Public key, for everyone it serves: {public}")


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(epilog=_SERVE)(serve)
    app.command(
        epilog="Example:  [bold]prenet4d config > prenet4d.toml[/bold]   then edit it and "
        "[bold]prenet4d serve --config prenet4d.toml[/bold]"
    )(config)
    app.command(epilog="Example:  [bold]prenet4d keygen /etc/prenet4d[/bold]")(keygen)
