"""Asking the service how it is, and telling it what to do."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prenet4d_server.cli.arguments import (
    ClientKeyOption,
    ClientKeys,
    ControlOption,
    ServerKeyOption,
)
from prenet4d_server.cli.record import recorded

_DEFAULT = "tcp://127.0.0.1:5563"
_RECORDER_S = 20.0
"""How long to wait for an answer that has to wait for a process itself."""


def status(
    control: ControlOption = _DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait.")] = 5.0,
    server_key: ServerKeyOption = None,
) -> None:
    """Ask the service what it is doing: state, acquisition, rates, counters, receivers."""
    from prenet4d_client import ControlClient

    with ControlClient(control, timeout=timeout, server_key=server_key) as service:
        answer = service.status()
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    Console().print(_table(_for_people(answer)))


_WITH_UNIT = {
    "latency": "latency_ms", "reference_center": "reference_center_px", "detectors": "detectors_px"
}  # fmt: skip


def _for_people(answer: dict[str, Any]) -> dict[str, Any]:
    """The status with units in its names, angles as the page has them, and no deeper than fits."""
    shown: dict[str, Any] = {}
    for name, value in answer.items():
        if name == "acquisition" and value is not None:
            shown[name] = {key: each for key, each in value.items() if key != "metadata"}
            shown["metadata"] = value["metadata"]
        elif name != "latency_histograms":  # for programs
            shown[_WITH_UNIT.get(name, name)] = value
    shown["maps"] = {_WITH_UNIT.get(key, key): each for key, each in answer["maps"].items()}
    if (recording := answer["recording"]) is not None and recording["started"] is not None:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(recording["started"]))
        shown["recording"] = recording | {"started": began}
    if (found := answer["ellipticity"]) is not None:
        shown["ellipticity"] = {
            "ratio": found["ratio"],
            "ratio_sigma": found["ratio_sigma"],
            "theta_degrees": math.degrees(found["theta"]),
            "theta_sigma_degrees": found["theta_sigma"] and math.degrees(found["theta_sigma"]),
        }
    return shown


def _table(answer: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold", min_width=12)
    for name, value in answer.items():
        # As text: what came from elsewhere may look like markup.
        shown = _table(value) if isinstance(value, dict) and value else Text(_plain(value))
        table.add_row(Text(name.replace("_", " ")), shown)
    return table


def _plain(value: object) -> str:
    if value is None or value in ([], {}, ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        between = ", " if isinstance(value[0], int | float) else "\n"
        return between.join(_plain(each) for each in value)
    if isinstance(value, dict):
        pairs = (f"{name.replace('_', ' ')} {_plain(each)}" for name, each in value.items())
        return str(value.get("message") or " ".join(pairs))
    return str(value)


def freeze(
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Keep the present ellipticity, whatever the patterns say, until unfreeze."""
    _tell("freeze", control, server_key, client_key)
    print("The calibration is frozen.")


def unfreeze(
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Let the ellipticity follow the patterns again."""
    _tell("unfreeze", control, server_key, client_key)
    print("The calibration follows the patterns.")


def recalibrate(
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Forget the running mean and the ellipticity, and find them anew."""
    _tell("recalibrate", control, server_key, client_key)
    print("The calibration starts over.")


def _tell(
    command: str, control: str, server_key: str | None, client_key: ClientKeys | None
) -> None:
    from prenet4d_client import ControlClient

    with ControlClient(control, server_key=server_key, keys=client_key) as service:
        getattr(service, command)()


_File = Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False)]


def save(
    file: _File,
    control: ControlOption = _DEFAULT,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    descan: Annotated[
        bool, typer.Option("--descan", help="Keep how the center drifts over the scan, too.")
    ] = False,
    server_key: ServerKeyOption = None,
) -> None:
    """Keep the present calibration in a file, TOML or JSON, for later scans."""
    from prenet4d_client import ControlClient
    from prenet4d_engines.calibration import Calibration
    from prenet4d_engines.calibration_file import check_target, write_calibration

    check_target(file, overwrite=overwrite)
    with ControlClient(control, server_key=server_key) as service:
        document = service.save_calibration(descan=descan)
    write_calibration(Calibration.from_document(document), file, overwrite=overwrite)
    print(f"The calibration is in {file}.")


def load(
    file: _File,
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Use a calibration that was saved."""
    from prenet4d_client import ControlClient
    from prenet4d_engines.calibration_file import read_calibration

    calibration = read_calibration(file)
    with ControlClient(control, server_key=server_key, keys=client_key) as service:
        service.load_calibration(calibration.model_dump(mode="json"))
    print(
        f"The service uses {file}: ratio {calibration.ratio:.4f}, "
        f"from {calibration.patterns:,} patterns."
    )


def start(
    name: Annotated[
        str | None, typer.Argument(help="Of the file, without folder and suffix; the time of day.")
    ] = None,
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Have the service record what it publishes, into the folder that it is configured with."""
    from prenet4d_client import ControlClient

    with ControlClient(
        control, timeout=_RECORDER_S, server_key=server_key, keys=client_key
    ) as service:
        recording = service.start_recording(name)
    print(f"Recording {recording['name']} in {recording['directory']}: {recording['state']}.")


def stop(
    control: ControlOption = _DEFAULT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Stop the recording and close its files."""
    from prenet4d_client import ControlClient

    with ControlClient(
        control, timeout=_RECORDER_S, server_key=server_key, keys=client_key
    ) as service:
        recording = service.stop_recording()
    for file in recording["files"]:
        print(f"{recording['directory']}/{file}")
    print(recorded(recording["patterns"], recording["absent"], recording["reason"]))


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(epilog="Example:  [bold]prenet4d status --json[/bold]")(status)
    app.command(epilog="Example:  [bold]prenet4d freeze[/bold]")(freeze)
    app.command(epilog="Example:  [bold]prenet4d unfreeze[/bold]")(unfreeze)
    app.command(epilog="Example:  [bold]prenet4d recalibrate[/bold]")(recalibrate)
    calibration = typer.Typer(
        name="calibration",
        help="Keep the ellipticity that was found, and use it again: it outlives a scan.",
        epilog="Example:  [bold]prenet4d calibration save today.toml[/bold]",
        no_args_is_help=True,
    )
    calibration.command(epilog="Example:  [bold]prenet4d calibration save today.toml[/bold]")(save)
    calibration.command(epilog="Example:  [bold]prenet4d calibration load today.toml[/bold]")(load)
    app.add_typer(calibration)
    recording = typer.Typer(
        name="recording",
        help="Have the service itself record, on its own disk.",
        epilog="Example:  [bold]prenet4d recording start silicon_110[/bold]",
        no_args_is_help=True,
    )
    recording.command(epilog="Example:  [bold]prenet4d recording start silicon_110[/bold]")(start)
    recording.command(epilog="Example:  [bold]prenet4d recording stop[/bold]")(stop)
    app.add_typer(recording)
