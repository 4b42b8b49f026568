"""``prenet4d record``: everything the service publishes, into a file, with nothing missed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prenet4d_server.cli.arguments import LosslessOption, ServerKeyOption
from prenet4d_server.wording import counted_of

if TYPE_CHECKING:
    from prenet4d_server.recording.recorder import Summary


def record(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="scan.h5, or scan.zarr for a Zarr store; scan_{n:03d}.h5 to number them.",
        ),
    ],
    lossless: LosslessOption = "tcp://127.0.0.1:5562",
    content: Annotated[
        Literal["corrected", "aligned", "both"],
        typer.Option(help="Denoised patterns, raw counts recentered and undistorted, or both."),
    ] = "corrected",
    acquisitions: Annotated[
        int | None, typer.Option(min=1, help="Leave after so many scans; until Ctrl-C by default.")
    ] = None,
    compression: Annotated[
        Literal["none", "bslz4", "gzip"],
        typer.Option(
            help="bslz4 needs the package hdf5plugin where HDF5 is read; gzip opens everywhere and "
            "is slow; none is fastest."
        ),
    ] = "bslz4",
    fill: Annotated[
        Literal["zero", "nan"], typer.Option(help="What pixels without a source become.")
    ] = "zero",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    name: Annotated[str, typer.Option(help="What the service calls this receiver.")] = "recorder",
    server_key: ServerKeyOption = None,
) -> None:
    """Record scans to HDF5 that opens in HyperSpy, py4DSTEM and LiberTEM, or to Zarr, live."""
    from prenet4d_client import LosslessReceiver
    from prenet4d_server.cli.progress import counter
    from prenet4d_server.recording.recorder import STOPPED, Recorder
    from prenet4d_server.recording.recorder import record as run
    from prenet4d_server.service import stopped_by_signals

    chosen = ("corrected", "aligned") if content == "both" else (content,)
    with (
        Recorder(
            file, overwrite=overwrite, content=chosen, compression=compression, fill=fill
        ) as recorder,
        LosslessReceiver(
            lossless, name=name, topics=recorder.topics, server_key=server_key
        ) as receiver,
        stopped_by_signals() as stop,  # only now: a wait for the service ends at once by itself
        counter("recording") as show,
    ):

        def tell(summary: Summary) -> None:
            where = summary.files[-1].name if summary.files else "waiting for a scan"
            show(f"{where}  {summary.finished} finished")

        summary = run(receiver, recorder, stop, on_progress=tell, acquisitions=acquisitions)
    for path in summary.files:
        print(path)
    print(recorded(summary.patterns, summary.absent, "" if summary.complete else summary.reason))
    if summary.lost and summary.lost not in summary.reason:
        print(f"The recording ended because the service was lost: {summary.lost}")
    if summary.lost or (not summary.complete and summary.reason != STOPPED):
        raise typer.Exit(1)


def recorded(patterns: int, absent: int, reason: str) -> str:
    """What a recording's last line says.

    Args:
        patterns: how many it holds.
        absent: how many more were announced.
        reason: why it is incomplete; empty where every scan is in it to its regular end.
    """
    said = f"Recorded {counted_of(patterns, absent, 'pattern')}"
    if reason:
        return f"{said}; incomplete: {reason}"
    return f"{said}: the scan ended without the others" if absent else said


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(
        epilog="Example:  [bold]prenet4d record scan.h5 --content both --acquisitions 1[/bold]"
    )(record)
