"""Seeing that all is well: the demo, the benchmarks and the doctor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prenet4d_server.cli import speed
from prenet4d_server.cli.arguments import (
    DAY_S,
    LARGEST_RATE,
    LARGEST_SIDE,
    DataOption,
    Distortion,
    DistortionOption,
    FrameOption,
    Grid,
    JsonFileOption,
    KindOption,
    ScanOption,
    refuse_misfits,
)

if TYPE_CHECKING:
    from rich.table import Table

    from prenet4d_server.bench.stream import Report
    from prenet4d_server.demo import Outcome


def demo(
    context: typer.Context,
    data: DataOption = None,
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False, help="Takes recording, picture and logs, in place of earlier ones."
        ),
    ] = Path("demo-out"),
    scan: ScanOption = None,
    frame: FrameOption = None,
    content: KindOption = "grains",
    dose: Annotated[
        float | None, typer.Option(min=1, help="Mean electrons a pattern; low by default.")
    ] = None,
    ellipticity: DistortionOption = None,
    drift: Annotated[
        float | None, typer.Option(min=0, max=LARGEST_SIDE, help="Center drift over the scan, px.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1, max=LARGEST_RATE, help="Frames per second; measured by default."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Show all of it at work: detector, service, watcher and recorder, and the truth beside it.

    Ends within two minutes; exits with an error where a frame is lost or a
    value is absurd.
    """
    from rich.console import Console

    from prenet4d_server.demo import Demo, run
    from prenet4d_server.feeds import Drawing

    if data is not None:
        refuse_misfits(context, ["frame", "content"], "is for simulated patterns, not for --data.")
    console = Console()
    distortion = ellipticity or Distortion(1.05, 25.0)
    drawing = Drawing(
        scan_shape=scan,
        frame_shape=frame,
        kind=content,
        dose=dose,
        ellipticity=(distortion.ratio, distortion.theta),
        drift=drift,
        seed=seed,
    )
    outcome = run(
        Demo(folder=out, data=data, drawing=drawing, rate=rate),
        lambda sentence: console.print(sentence, style="bold"),
    )
    console.print(_demo_table(outcome))
    console.print(f"picture:   {outcome.picture}\nrecording: {outcome.recording}")
    complaints = outcome.score.complaints()
    for complaint in complaints:
        console.print(complaint, style="red")
    if complaints:
        raise typer.Exit(1)


def _demo_table(outcome: Outcome) -> Table:
    from rich.table import Table

    score, found, truth = outcome.score, outcome.score.found, outcome.score.truth
    table = Table(title="Found and true", title_justify="left", caption_justify="left")
    table.add_column()
    for name in ("found", "true", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(
        "frames",
        f"{int(found.received.sum()):,}",
        f"{score.frames:,}",
        f"{found.counters['rejected']} rejected, {found.counters['shed']} shed",
    )
    for name, deviation in score.centers.items():
        share = "" if deviation.frames == score.frames else f"in {deviation.frames:,} frames"
        table.add_row(name, share, "", f"{deviation.mean:.3f} px, median {deviation.median:.3f}")
    table.add_row(
        "ellipticity, ratio",
        f"{found.ratio:.4f} ± {found.ratio_sigma:.4f}",
        f"{truth.ratio:.4f}",
        f"{100 * score.ratio_error:+.2f} %",
    )
    table.add_row(
        "ellipticity, angle",
        f"{math.degrees(found.theta):.1f}°",
        f"{math.degrees(truth.theta):.1f}°",
        f"{score.theta_error_deg:+.1f}°",
    )
    table.add_row(
        "electrons a pattern",
        f"{found.dose:,.0f}",
        f"{truth.dose:,.0f}",
        f"{100 * (found.dose / truth.dose - 1):+.1f} %",
    )
    table.add_row("frames per second", f"{found.frames_per_second:,.0f}", "", "")
    latency = f"{found.latency_p50_ms:.0f} ms, p99 {found.latency_p99_ms:.0f}"
    table.add_row("latency", latency, "", "")
    if outcome.intrinsic is not None:
        own = outcome.intrinsic
        table.caption = (
            "Nobody knows the measured patterns' own center: centers are compared up to a "
            f"constant. Their own ellipticity, {own.ratio:.4f} at {math.degrees(own.theta):.0f}°, "
            "was estimated once at a high dose, and is part of the true one."
        )
    return table


def bench_stream(
    frames: Annotated[
        int, typer.Option(min=64, help="Frames in each run with an identity corrector.")
    ] = 32_768,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=DAY_S, help="Length of each run with the networks.")
    ] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians are quoted.")] = 3,
    soak: Annotated[
        int, typer.Option(min=64, help="Frames between two readings of memory.")
    ] = 100_000,
    frame: FrameOption = None,
    backend: Annotated[
        Literal["auto", "tensorrt", "torch"], typer.Option(help="What runs the networks.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Frames in a batch.")] = 32,
    peer_python: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Python that has LiberTEM-live."),
    ] = None,
    json_file: JsonFileOption = None,
) -> None:
    """Measure how much of the machine's speed arrives: bare sockets against the service.

    In turns: bare pyzmq, the service with an identity corrector on native
    frames and on a DECTRIS stream, the corrector alone, the full service, and
    LiberTEM-live on its own simulator's stream.
    """
    from rich.console import Console

    from prenet4d_server.bench.stream import Options, Report, run
    from prenet4d_server.cli.progress import bar

    options = Options(
        frames=frames,
        seconds=seconds,
        rounds=rounds,
        soak=soak,
        frame_shape=frame or Grid(256, 256),
        backend=backend,
        batch=batch,
        peer=peer_python,
    )
    report = Report.begin(options)
    try:
        with bar("measuring") as advance:
            run(options, report, advance)
    finally:  # what was measured before a failure is kept
        if json_file is not None:
            json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    console = Console()
    for part in _bench_tables(report):
        console.print(part)


def bench_page(
    pages: Annotated[int, typer.Option(min=1, help="How many pages are open.")] = 10,
    seconds: Annotated[
        float, typer.Option(min=1, max=DAY_S, help="Length of each measurement.")
    ] = 6.0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Of four measurements each; medians are quoted.")
    ] = 7,
    frame: FrameOption = None,
    backend: Annotated[
        Literal["auto", "tensorrt", "torch", "identity"],
        typer.Option(help="What runs the networks."),
    ] = "auto",
    json_file: JsonFileOption = None,
) -> None:
    """Measure what open pages cost: the service's rate with and without, in turns."""
    from prenet4d_server.bench.page import run
    from prenet4d_server.cli.progress import bar

    with bar("measuring") as advance:
        report = run(
            pages=pages, seconds=seconds, rounds=rounds, frame_shape=frame or Grid(256, 256),
            backend=backend, say=advance,
        )  # fmt: skip
    for name, rounds_of in (("no page", report.without), (f"{pages} pages", report.with_pages)):
        rates = (f"{a.frames_per_second:,.1f} {b.frames_per_second:,.1f}" for a, b in rounds_of)
        print(f"{name + ' open':<16} {', '.join(rates)} frames/s")
    print(report.conclusion)
    print(f"The service's processor time for each frame: {report.cost_ratio:.1%} of that without.")
    for name in ("service", "ingest", "page", "visitors", "detector", "others"):
        without, loaded = (report.cores(name, pages=pages) for pages in (False, True))
        print(f"{name:<16} {without:.2f} cores without pages, {loaded:.2f} with")
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")


def _bench_tables(report: Report) -> list[Any]:
    from rich.table import Table

    about = report.machine
    title = f"{about['processor']}, {about['cores']:g} cores, load {about['load_before']} before"
    rates = Table(title=title, title_justify="left")
    rates.add_column("measured")
    rates.add_column("frames/s, median", justify="right")
    rates.add_column("all rounds", style="dim")
    for name, values in report.rates.items():
        each = ", ".join(f"{value:,.0f}" for value in values)
        rates.add_row(name, f"{report.median(name):,.0f}", each)
    goals = Table()
    for column in ("goal", "reached", "wanted", ""):
        goals.add_column(column, justify="left" if column == "goal" else "right")
    for goal in report.goals():
        verdict = "[green]met[/green]" if goal.met else "[red]missed[/red]"
        goals.add_row(goal.name, _figure(goal.reached), _figure(goal.wanted), verdict)
    latency, memory = report.latency_ms, report.memory_bytes
    lines = [
        f"latency at {latency['at_frames_per_second']:,.0f} frames/s: "
        f"p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms"
    ]
    for process, before in memory["before"].items():
        after = memory["after"].get(process, before)
        soak = report.options["soak"]
        lines.append(
            f"memory of {process}: {before / 1e6:,.0f} MB, after {soak:,} frames "
            f"{after / 1e6:,.0f} MB"
        )
    return [rates, goals, *lines, *report.notes]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value > 100 else f"{value:.2f}"


def doctor() -> None:
    """Look at this machine: what is here, what is missing, and what to do about it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from prenet4d_server.doctor import examine

    colors = {"ok": "green", "note": "yellow", "missing": "dim", "broken": "bold red"}
    console = Console()
    table = Table(box=None, padding=(0, 1))
    for column in ("", "", "found", "what to do"):
        table.add_column(column)
    broken = False
    with console.status("looking"):
        for finding in examine():
            verdict = f"[{colors[finding.verdict]}]{finding.verdict}[/]"
            # Where something is broken, others' words and paths stand there, brackets and all.
            table.add_row(finding.name, verdict, escape(finding.found), escape(finding.advice))
            broken = broken or finding.verdict == "broken"
    console.print(table)
    if broken:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(
        epilog="Examples:\n\n[bold]prenet4d demo[/bold]\n\n"
        "[bold]prenet4d demo --data patterns.npy --dose 2000[/bold]   from measured patterns"
    )(demo)
    example = "Example:  [bold]prenet4d bench stream --json bench.json[/bold]"
    bench = typer.Typer(
        name="bench", help="Measure speed on this machine.", epilog=example, no_args_is_help=True
    )
    bench.command("stream", epilog=example)(bench_stream)
    page_example = "Example:  [bold]prenet4d bench page --pages 10[/bold]"
    bench.command("page", epilog=page_example)(bench_page)
    speed.add_to(bench)
    app.add_typer(bench)
    app.command(epilog="Example:  [bold]prenet4d doctor[/bold]")(doctor)
