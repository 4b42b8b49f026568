"""Making a calibration from stored or live data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from prenet4d_server.cli.arguments import (
    GAIN,
    ScanOption,
    ServerKeyOption,
    parse_service,
    picture_file,
    refuse_misfits,
)

_EXAMPLES = (
    "Examples:\n\n"
    "[bold]prenet4d calibrate gold.h5 -o calibration.toml --report report.png[/bold]\n\n"
    "[bold]prenet4d calibrate tcp://127.0.0.1:5563 -o calibration.toml[/bold]   takes it from a "
    "service, by its control address"
)

_CORRECTED = (
    "Mind that {} was recorded by prenet4d, with its patterns corrected: what is found is what "
    "that correction left, and not what the lens does. Calibrate from the raw frames."
)


def calibrate(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="FILE|ADDRESS",
            help="Measured patterns (.npy, HDF5, Zarr, .mib, …), or a service's control address.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", dir_okay=False, help="Where to: a .toml or a .json file."),
    ] = Path("calibration.toml"),
    report: Annotated[
        Path | None,
        picture_file(text="A picture that shows whether to trust it (.png)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
    patterns: Annotated[
        int, typer.Option(min=1, help="Of a file: use so many patterns at most, evenly spread.")
    ] = 1024,
    scan: ScanOption = None,
    dataset: Annotated[
        str | None, typer.Option(help="Which array of the file is the scan, if it holds several.")
    ] = None,
    gain: Annotated[float, GAIN] = 1.0,
    descan: Annotated[
        bool, typer.Option("--descan", help="Keep how the center drifts over the scan, too.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Of a service: seconds to wait until it has found it.")
    ] = 300.0,
    server_key: ServerKeyOption = None,
) -> None:
    """Find the ellipticity of a file's patterns, or take it from a service, and keep it."""
    from prenet4d_client.addresses import address_fault
    from prenet4d_engines.calibration_file import check_free, check_target, write_calibration
    from prenet4d_server.calibrate import find
    from prenet4d_server.calibrate.report import draw, headline
    from prenet4d_server.cli.progress import bar
    from prenet4d_server.wording import counted

    at_service = "://" in data
    if at_service:
        of_files = ["patterns", "scan", "dataset", "gain"]
        refuse_misfits(context, of_files, "is for a file's patterns, not for a service's.")
        parse_service(data, usual_port=5563)
    elif not address_fault(f"tcp://{data}") and not Path(data).exists():
        raise typer.BadParameter(f"There is no file {data}. A service's address is tcp://{data}.")
    else:
        refuse_misfits(context, ["timeout", "server_key"], "is for a service, not for a file.")
    check_target(output, overwrite=overwrite)
    if report is not None:
        check_free(report, overwrite=overwrite)
    with bar("calibrating") as tell:
        if at_service:
            from prenet4d_client import ControlClient

            with ControlClient(data, timeout=min(timeout, 30.0), server_key=server_key) as service:
                found = find.calibrate_service(service, timeout_s=timeout, descan=descan, tell=tell)
        else:
            from prenet4d_server.files import open_scan

            with open_scan(data, dataset=dataset, scan_shape=scan) as file:
                if file.corrected:
                    print(_CORRECTED.format(data), file=sys.stderr)
                found = find.calibrate_file(
                    file, most=patterns, gain=gain, descan=descan, tell=tell
                )
    if found.remark:
        print(found.remark, file=sys.stderr)
    print(f"{headline(found.calibration)}, from {counted(found.calibration.patterns, 'pattern')}.")
    write_calibration(found.calibration, output, overwrite=overwrite)
    command = shlex.join(("prenet4d", "serve", "--calibration", str(output)))
    print(f"The calibration is in {output}: {command}")
    if report is not None:
        draw(found, report)
        print(f"The report is in {report}.")


def add_to(app: typer.Typer) -> None:
    """Put this group's command into the command line."""
    app.command(epilog=_EXAMPLES)(calibrate)
