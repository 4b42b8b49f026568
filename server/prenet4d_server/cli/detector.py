"""Frames from something that is no detector: a simulated one, or a file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from prenet4d_server.cli.arguments import (
    GAIN,
    LARGEST_RATE,
    LARGEST_SIDE,
    LEAST_RATE,
    DataOption,
    DistortionOption,
    FrameOption,
    KindOption,
    ScanOption,
    ServerKeyOption,
    address,
    at_service,
    refuse_misfits,
)
from prenet4d_server.wording import counted

if TYPE_CHECKING:
    from prenet4d_server.feeds import Drawing
    from prenet4d_server.simulators import FaultName

_REPLAY_BLOCK = 8
"""At most so many frames in one message of a replay."""
_PatienceOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds to wait for somebody who takes frames.")
]


def _possible(rate: float) -> float:
    if rate and not LEAST_RATE <= rate <= LARGEST_RATE:
        raise typer.BadParameter(
            f"{rate:g} frames per second cannot be kept: give {LEAST_RATE:g} to "
            f"{LARGEST_RATE:,.0f}, or 0 for as fast as they are taken."
        )
    return rate


_RateOption = Annotated[
    float,
    typer.Option(callback=_possible, help="Frames per second; 0: as fast as they are taken."),
]


def simulate_detector(
    context: typer.Context,
    kind: Annotated[
        Literal["dectris2", "dectris1", "native"], typer.Argument(help="Which protocol to speak.")
    ],
    at: Annotated[
        str | None,
        address("--address", "Where to listen; native: the service to connect to."),
    ] = None,
    data: DataOption = None,
    scan: ScanOption = None,
    rate: _RateOption = 0.0,
    frame: FrameOption = None,
    content: KindOption = "grains",
    dose: Annotated[
        float | None, typer.Option(min=1e-3, help="Draw counts: mean electrons a pattern.")
    ] = None,
    ellipticity: DistortionOption = None,
    drift: Annotated[
        float | None,
        typer.Option(
            min=0, max=LARGEST_SIDE, help="Draw center drift of so many pixels over the scan."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    compression: Annotated[
        Literal["bslz4", "lz4", "none"], typer.Option(help="Of DECTRIS frames.")
    ] = "bslz4",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="drop|duplicate|corrupt|garbage|restart|no_end",
            help="What goes wrong now and then; may be given several times.",
        ),
    ] = None,
    frames_per_message: Annotated[
        int, typer.Option(min=1, help="Of native frames: more are cheaper, and come later.")
    ] = 1,
    repeat: Annotated[int, typer.Option(min=0, help="How many scans; 0: until Ctrl-C.")] = 1,
    cycle: Annotated[
        int, typer.Option(min=0, help="Encode only so many frames, and send them in turn: faster.")
    ] = 0,
    patience: _PatienceOption = 30.0,
) -> None:
    """Pretend to be a detector that scans, byte for byte.

    Without --data it shows a simulated sample. With --data it shows the
    file's frames as they are; with --dose, --ellipticity or --drift it draws
    a new scan from the file's patterns.
    """
    from prenet4d_server import simulators
    from prenet4d_server.cli.progress import Wait, bar
    from prenet4d_server.config import SourceSettings
    from prenet4d_server.feeds import Drawing, open_feed
    from prenet4d_server.service import stopped_by_signals

    drawing = Drawing(
        scan_shape=scan,
        frame_shape=frame,
        kind=content,
        dose=dose,
        ellipticity=(ellipticity.ratio, ellipticity.theta) if ellipticity else None,
        drift=drift,
        seed=seed,
    )
    _refuse_what_does_nothing(context, drawing, native=kind == "native", measured=data is not None)
    options: dict[str, Any] = (
        {"frames_per_message": frames_per_message}
        if kind == "native"
        else {"compression": compression}
    )
    simulate: Any = {
        "native": simulators.simulate_native,
        "dectris1": simulators.simulate_dectris_v1,
        "dectris2": simulators.simulate_dectris_v2,
    }[kind]
    with (
        stopped_by_signals() as stop,
        open_feed(data, drawing) as feed,
        bar("sending") as advance,
        Wait() as wait,
    ):
        begun = False

        def ready(address: str) -> None:
            does = "takes frames at" if kind == "native" else "connects to"
            wait.begin(f"Waiting up to {patience:g} s for a service that {does} {address}.")

        def tell(sent: int, total: int) -> None:
            nonlocal begun
            begun = sent > 0
            wait.end()
            advance(sent / (total or sent or 1), counted(sent, "frame"))

        simulate(
            feed,
            at or SourceSettings.DEFAULT_ADDRESSES[kind],
            rate=rate,
            repeat=repeat,
            cycle=cycle,
            faults=cast("tuple[FaultName, ...]", tuple(fault or ())),
            patience_s=patience,
            stop=stop,
            on_ready=ready,
            on_progress=tell,
            **options,
        )
        if stop.is_set() and not (begun and repeat == 0):  # which ends in no other way
            raise typer.Exit(130)


def _refuse_what_does_nothing(
    context: typer.Context, drawing: Drawing, *, native: bool, measured: bool
) -> None:
    if native:
        refuse_misfits(context, ["compression"], "is for DECTRIS frames, and these are native.")
    else:
        refuse_misfits(context, ["frames_per_message"], "is for native frames.")
    if measured:
        refuse_misfits(context, ["frame", "content"], "is for simulated patterns, not for --data.")
    if measured and not drawing.wanted:
        why = "does nothing: --data is shown as it is without --dose, --ellipticity or --drift."
        refuse_misfits(context, ["seed"], why)


def replay(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", exists=True, help="A scan: .npy, .npz, HDF5, Zarr or .mib."),
    ],
    to: Annotated[
        str, at_service("--to", "The service's ingest address.")
    ] = "tcp://127.0.0.1:5560",
    rate: _RateOption = 0.0,
    scan: ScanOption = None,
    dataset: Annotated[
        str | None, typer.Option(help="Which array of the file is the scan, if it holds several.")
    ] = None,
    gain: Annotated[float, GAIN] = 1.0,
    patience: _PatienceOption = 30.0,
    server_key: ServerKeyOption = None,
) -> None:
    """Stream a file to a service that is running."""
    from prenet4d_client import FrameSender
    from prenet4d_server.cli.progress import Wait, bar
    from prenet4d_server.files import open_scan
    from prenet4d_server.files.base import as_text
    from prenet4d_server.service import stopped_by_signals

    with (
        open_scan(file, dataset=dataset, scan_shape=scan) as source,
        FrameSender(to, timeout=patience, server_key=server_key) as sender,
        bar(f"sending {file.name}") as advance,
        Wait() as wait,
    ):
        if source.warning:
            print(source.warning, file=sys.stderr)
        wait.begin(f"Waiting up to {patience:g} s for a service that takes frames at {to}.")
        sender.start(
            frame_shape=source.frame_shape,
            dtype=source.dtype,
            scan_shape=source.scan_shape,
            expected_frames=source.n_frames,
            pixel_mask=source.pixel_mask,
            saturation_value=source.saturation_value,
            gain=gain,
            detector=f"file {as_text(file.name)}",
            metadata=source.metadata,
        )
        wait.end()
        sent, began = 0, time.monotonic()
        size = max(1, min(_REPLAY_BLOCK, int(rate / 20))) if rate else _REPLAY_BLOCK
        with stopped_by_signals() as stop:  # only now: a wait for a service ends at once by itself
            for block in source.blocks(size):
                due = began + sent / rate if rate else 0.0
                if stop.wait(max(0.0, due - time.monotonic())):
                    sender.end(aborted="stopped by the user")
                    raise typer.Exit(130)
                sender.send(block)
                sent += len(block)
                advance(sent / source.n_frames, counted(sent, "frame"))
    print(f"Sent {counted(sent, 'frame')} of {file} to {to}.")


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(
        epilog="Examples:\n\n[bold]prenet4d simulate-detector dectris2 --scan 64x64 --rate 200"
        "[/bold]\n\n[bold]prenet4d simulate-detector dectris2 --data patterns.npy --scan 64x64 "
        "--dose 1000 --ellipticity 1.03,25 --drift 4[/bold]"
    )(simulate_detector)
    app.command(epilog="Example:  [bold]prenet4d replay raw.h5 --rate 100[/bold]")(replay)
