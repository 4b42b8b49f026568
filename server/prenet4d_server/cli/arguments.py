"""The argument types that several commands share, each with an error that says how to write it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import typer

SMALLEST_SIDE, LARGEST_SIDE = 8, 8192
"""Pixels of a detector, as the protocol has them."""
LEAST_RATE, LARGEST_RATE = 1e-3, 1e6
"""Frames per second, as the settings have them."""
DAY_S = 86_400.0
"""The longest that anything is measured for: infinity is none."""
PICTURES = (".png", ".pdf", ".svg")


class Grid(NamedTuple):
    """Rows × columns, of probe positions or of pixels."""

    rows: int
    columns: int


class ClientKeys(NamedTuple):
    """A client's own CURVE keys, Z85."""

    public: str
    secret: str


class Distortion(NamedTuple):
    """An ellipticity as a person writes it: the angle in degrees."""

    ratio: float
    theta_deg: float

    @property
    def theta(self) -> float:
        """The major axis' angle in radians, in [0, π)."""
        return math.radians(self.theta_deg) % math.pi


def parse_grid(text: str) -> Grid:
    """``64x128`` → 64 rows, 128 columns.

    Raises:
        typer.BadParameter: it does not read as two positive whole numbers.
    """
    rows, cross, columns = text.lower().replace("×", "x").partition("x")
    if cross and rows.strip().isdecimal() and columns.strip().isdecimal():
        grid = Grid(int(rows), int(columns))
        if min(grid) > 0:
            return grid
    raise typer.BadParameter(f"{text!r} is not rows x columns: write for example 64x64.")


def parse_scan(text: str) -> Grid:
    """A grid of probe positions that are few enough to be numbered.

    Raises:
        typer.BadParameter: it is no grid, or has too many.
    """
    from prenet4d_server.config import scan_fault

    grid = parse_grid(text)
    if fault := scan_fault(*grid):
        raise typer.BadParameter(f"{fault}.")
    return grid


def parse_frame(text: str) -> Grid:
    """A detector's pixels.

    Raises:
        typer.BadParameter: it is no grid, or no detector's.
    """
    grid = parse_grid(text)
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in grid):
        raise typer.BadParameter(
            f"{text!r} is no detector's: each side must have {SMALLEST_SIDE} to {LARGEST_SIDE} "
            "pixels."
        )
    return grid


def parse_distortion(text: str) -> Distortion:
    """``1.03,25`` → ratio 1.03, major axis at 25° from +x toward +y.

    Raises:
        typer.BadParameter: it does not read as a ratio of at least 1 and an angle.
    """
    try:
        ratio, theta_deg = (float(part) for part in text.split(","))
    except ValueError:
        ratio = theta_deg = math.nan
    if not (1 <= ratio < 2 and math.isfinite(theta_deg)):
        raise typer.BadParameter(
            f"{text!r} is not an ellipticity: write the ratio of the axes (1 to 2) and the angle "
            "of the long one in degrees, for example 1.03,25."
        )
    return Distortion(ratio, theta_deg)


def parse_address(text: str, usual_port: int = 5560) -> str:
    """A ZeroMQ address; `usual_port` is that of the example in what a wrong one is answered.

    Raises:
        typer.BadParameter: it has not the form of one.
    """
    from prenet4d_client.addresses import address_fault

    if fault := address_fault(text, usual_port):
        raise typer.BadParameter(fault)
    return text


def parse_service(text: str, usual_port: int = 5560) -> str:
    """The address of a service that should answer now: one with a host that is known here.

    Raises:
        typer.BadParameter: it is no address, or this machine does not know its host.
    """
    from prenet4d_server.sockets import unknown_host

    if trouble := unknown_host(parse_address(text, usual_port)):
        raise typer.BadParameter(trouble)
    return text


def parse_server_key(text: str) -> str:
    """A public CURVE key: its 40 characters, or the file that ``prenet4d keygen`` made.

    Raises:
        typer.BadParameter: it is neither.
    """
    if len(text) == 40 and not Path(text).exists():
        return text
    from zmq.auth import load_certificate

    try:
        public, _ = load_certificate(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{text!r} is neither a key of 40 characters nor a key file ({error})."
        ) from None
    return public.decode()


def parse_client_key(text: str) -> ClientKeys:
    """A secret key file that ``prenet4d keygen`` made.

    Raises:
        typer.BadParameter: it is none.
    """
    from prenet4d_server.errors import ConfigError
    from prenet4d_server.sockets import load_keys

    try:
        keys = load_keys(Path(text))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    assert keys is not None
    return ClientKeys(keys[0].decode(), keys[1].decode())


def address(flags: str, text: str) -> Any:
    """An option that takes a ZeroMQ address."""
    return typer.Option(flags, parser=parse_address, metavar="ADDRESS", help=text)


def at_service(flags: str, text: str) -> Any:
    """An option that takes the address of a service that should answer now."""
    return typer.Option(flags, parser=parse_service, metavar="ADDRESS", help=text)


def result_file(*flags: str, text: str) -> Any:
    """An option that takes the file for what a long run will give: it must be writable before."""
    return typer.Option(*flags, dir_okay=False, writable=True, callback=_in_a_folder, help=text)


def _in_a_folder(file: Path | None) -> Path | None:
    from prenet4d_engines.whole_file import folder_fault

    if file is not None and not file.exists() and (fault := folder_fault(file)):
        raise typer.BadParameter(fault)
    return file


def picture_file(*flags: str, text: str) -> Any:
    """An option that takes a picture's file: writable before a long run, and of a kind we draw."""
    return typer.Option(*flags, dir_okay=False, writable=True, callback=_of_a_picture, help=text)


def _of_a_picture(file: Path | None) -> Path | None:
    if file is not None and file.suffix.lower() not in PICTURES:
        raise typer.BadParameter(
            f"{file.name!r} is no name for a picture: let it end in {', '.join(PICTURES)}."
        )
    return _in_a_folder(file)


def refuse_misfits(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse flags that were given and would do nothing.

    Args:
        context: the command's.
        names: of its parameters that do not fit the others.
        why: the rest of a sentence that begins with the flag.

    Raises:
        typer.BadParameter: one of them was given.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = next(each.opts[0] for each in context.command.params if each.name == name)
            raise typer.BadParameter(f"{flag} {why}")


GAIN = typer.Option("--gain", min=1e-6, max=1e6, help="Detector counts per electron.")

ScanOption: TypeAlias = Annotated[
    Grid | None,
    typer.Option(
        "--scan", parser=parse_scan, metavar="64x64", help="Probe positions, rows x columns."
    ),
]
FrameOption: TypeAlias = Annotated[
    Grid | None,
    typer.Option(
        "--frame",
        parser=parse_frame,
        metavar="128x128",
        help="Pixels of the simulated detector, rows x columns.",
    ),
]
DistortionOption: TypeAlias = Annotated[
    Distortion | None,
    typer.Option(
        "--ellipticity",
        parser=parse_distortion,
        metavar="RATIO,DEGREES",
        help="Lens distortion to draw into the scan, for example 1.03,25.",
    ),
]
KindOption: TypeAlias = Annotated[
    Literal["cbed", "spots", "rings", "grains", "amorphous"],
    typer.Option("--content", help="What simulated patterns show."),
]
ControlOption: TypeAlias = Annotated[str, at_service("--control", "The service's control address.")]
StreamOption: TypeAlias = Annotated[str, at_service("--stream", "The service's stream address.")]
LosslessOption: TypeAlias = Annotated[
    str, at_service("--lossless", "The service's lossless address.")
]
ServerKeyOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        parser=parse_server_key,
        metavar="KEY",
        help="The service's public key or its file, where it asks for encryption.",
    ),
]
ClientKeyOption: TypeAlias = Annotated[
    ClientKeys | None,
    typer.Option(
        parser=parse_client_key,
        metavar="FILE",
        help="An operator's secret key file, where the service names its operators.",
    ),
]
DataOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(exists=True, help="Measured patterns (.npy, HDF5, Zarr, .mib, …)."),
]
JsonFileOption: TypeAlias = Annotated[
    Path | None, result_file("--json", text="Write all figures there.")
]
