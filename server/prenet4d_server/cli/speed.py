"""Measuring the networks' devices: stage by stage, as a trace, and as latency under load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from prenet4d_server.cli.arguments import (
    DAY_S,
    FrameOption,
    Grid,
    JsonFileOption,
    parse_frame,
    picture_file,
    result_file,
)
from prenet4d_server.cli.engines import parse_batches

if TYPE_CHECKING:
    from prenet4d_server.bench.engines import Report

_Backend: TypeAlias = Annotated[
    Literal["auto", "tensorrt", "torch"], typer.Option(help="What runs the networks.")
]


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``128x128,256x256`` → ((128, 128), (256, 256)).

    Raises:
        typer.BadParameter: one of them does not read as a detector's pixels.
    """
    return tuple(tuple(parse_frame(part)) for part in text.split(","))  # type: ignore[misc]


_Shapes: TypeAlias = Annotated[
    Any,
    typer.Option(
        "--shapes", parser=parse_shapes, metavar="128x128,256x256", help="Sizes of frames."
    ),
]


def engines(
    seconds: Annotated[
        float, typer.Option(min=0.1, max=DAY_S, help="About how long to measure in all.")
    ] = 60.0,
    shapes: _Shapes = "128x128,192x192,256x256,512x512",
    batches: Annotated[
        Any,
        typer.Option(
            "--batches",
            parser=parse_batches,
            metavar="1,16,256",
            help="Batch sizes; up to 512 on a GPU, 32 on a CPU by default.",
        ),
    ] = None,
    only: Annotated[
        Literal["tensorrt", "torch-gpu", "torch-cpu"] | None,
        typer.Option("--backend", help="Measure this one alone; all that run here by default."),
    ] = None,
    json_file: JsonFileOption = None,
    plot: Annotated[Path | None, picture_file(text="Draw the rates into this picture.")] = None,
) -> None:
    """Measure every stage of the correction on every device here, beside what it allows."""
    from rich.console import Console

    from prenet4d_server.bench.engines import backends, run
    from prenet4d_server.cli.progress import bar
    from prenet4d_server.errors import ConfigError

    chosen = [each for each in backends() if only in (None, each[0])]
    if not chosen:
        raise ConfigError(f"{only} does not run here: prenet4d doctor tells why.")
    with bar("measuring") as advance:
        report = run(chosen, shapes=shapes, batches=batches, seconds=seconds, say=advance)
    console = Console()
    for backend in report.devices:
        about, peaks = report.devices[backend], report.peaks[backend]
        console.print(f"\n[bold]{backend}[/bold]: {about['description']}")
        from_host = f", {peaks.bus / 1e9:.1f} GB/s from the host" if "driver" in about else ""
        console.print(
            f"{about.get('driver', about['device'])}: {peaks.flops / 1e12:.2f} TFLOP/s in large "
            f"products, {peaks.copied / 1e9:.1f} GB/s in large copies{from_host}",
            style="dim",
        )
        for shape in shapes:
            console.print(_table(report, backend, shape))
    for line in report.left_out:
        console.print(line, style="yellow")
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    if plot is not None:
        report.plot(plot)


def _table(report: Report, backend: str, shape: tuple[int, int]) -> Any:
    from rich.table import Table

    rows = report.of(backend, shape)
    sizes = sorted({batch for cells in rows.values() for batch in cells})
    table = Table(title=f"{shape[0]} × {shape[1]}: µs a frame", title_justify="left")
    table.add_column("stage")
    for size in sizes:
        table.add_column(f"{size}", justify="right")
    table.add_column("floor", justify="right")
    table.add_column("best, frames/s", justify="right")
    for stage, cells in rows.items():
        best = min(cells.values(), key=lambda cell: cell.us_per_frame)
        floor = "" if best.floor_us is None else _time(best.floor_us)
        times = [_time(cells[size].us_per_frame) if size in cells else "–" for size in sizes]
        table.add_row(stage, *times, floor, f"{1e6 / best.us_per_frame:,.0f}")
    return table


def _time(us: float) -> str:
    return f"{us:.3g}" if us < 999.5 else f"{us:,.0f}"


def traffic(shapes: _Shapes = "256x256", json_file: JsonFileOption = None) -> None:
    """Count what the operations on a frame read and write on a GPU, each of its tensors once.

    Counted, not measured: no GPU is needed.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from prenet4d_server.bench.traffic import count

    counted = {f"{h} × {w}": count((h, w)) for h, w in shapes}
    if json_file is not None:
        json_file.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    table = Table(title="MB a frame")
    table.add_column("part")
    for shape in counted:
        table.add_column(shape, justify="right")
    for part in next(iter(counted.values())):
        table.add_row(part, *(f"{moved[part] / 1e6:.2f}" for moved in counted.values()))
    Console().print(table)


def profile(
    out: Annotated[Path, result_file(text="Takes the trace; .json or .json.gz.")] = Path(
        "trace.json.gz"
    ),
    backend: _Backend = "auto",
    frame: FrameOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames in a batch.")] = 32,
    batches: Annotated[int, typer.Option(min=1, help="Batches to look at.")] = 6,
) -> None:
    """Write down where a batch's time goes: a trace for ui.perfetto.dev."""
    from prenet4d_engines.backends import select
    from prenet4d_server.bench.profile import write_trace

    # one thread: the profiler sees its own alone
    print(write_trace(out, select(backend, threads=1), frame or Grid(256, 256), batch, batches))
    print(f"The trace is in {out}.")


def latency(
    backend: _Backend = "auto",
    frame: FrameOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames in a full batch.")] = 32,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, max=60_000, help="How long a batch may wait to be full.")
    ] = 5.0,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=DAY_S,
            help="Length of each stream, after the frames that the service looks back at.",
        ),
    ] = 10.0,
    json_file: JsonFileOption = None,
) -> None:
    """Measure how long frames take through the service, at 50, 80 and 95 % of its full rate.

    The service tells latencies of its last 2,048 frames, so that each stream
    has as many more: at 50 frames/s, that is 40 s.
    """
    from prenet4d_server.bench.latency import run
    from prenet4d_server.cli.progress import bar

    with bar("measuring") as advance:
        report = run(
            backend=backend,
            frame_shape=frame or Grid(256, 256),
            batch=batch,
            max_delay_ms=max_delay_ms,
            seconds=seconds,
            say=advance,
        )
    print(f"{report.engine}\nfull rate: {report.full_rate:,.0f} frames/s")
    for each in report.loads:
        print(
            f"{each.load:>4.0%}: {each.arrived:,.0f} of {each.sent:,.0f} frames/s, "
            f"p50 {each.p50:.1f} ms, p99 {each.p99:.1f} ms, at worst {each.worst_p99:.1f} ms"
        )
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")


def add_to(bench: typer.Typer) -> None:
    """Put these commands beside the other benchmarks."""
    example = "Example:  [bold]prenet4d bench engines --json engines.json --plot engines.png[/bold]"
    bench.command("engines", epilog=example)(engines)
    example = "Example:  [bold]prenet4d bench traffic --shapes 128x128,256x256[/bold]"
    bench.command("traffic", epilog=example)(traffic)
    example = "Example:  [bold]prenet4d bench profile --out trace.json.gz[/bold]"
    bench.command("profile", epilog=example)(profile)
    example = "Example:  [bold]prenet4d bench latency --backend torch --json latency.json[/bold]"
    bench.command("latency", epilog=example)(latency)
