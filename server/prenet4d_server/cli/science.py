"""Training the networks and measuring what they can do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from prenet4d_server.cli.arguments import (
    FrameOption,
    JsonFileOption,
    picture_file,
    refuse_misfits,
    result_file,
)

if TYPE_CHECKING:
    from prenet4d_engines.evaluate.report import Table
    from prenet4d_engines.train import Progress


class Part(StrEnum):
    """What can be evaluated."""

    DENOISE = "denoise"
    CENTER = "center"
    ELLIPSE = "ellipse"
    TRACKING = "tracking"
    STRAIN = "strain"


TaskArgument = Annotated[
    Literal["denoise", "center", "refine", "ellipse"], typer.Argument(help="Which network.")
]


def train(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(file_okay=False, help="Checkpoints, log and plot.")] = Path(
        "runs"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps in all.")] = 20_000,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Stop after so long, wherever it stands.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Patterns a step, even.")] = 64,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="CPU threads of the optimiser.")
    ] = 2,
    workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Processes that simulate patterns.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the simulated patterns and the weights.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", exists=True, dir_okay=False, help="Weights to begin with."),
    ] = None,
    peak_rate: Annotated[
        float | None, typer.Option("--rate", min=1e-7, help="Learning rate after the warm-up.")
    ] = None,
    multislice: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Computed patterns to make a quarter of the samples."
        ),
    ] = None,
) -> None:
    """Train a network on simulated patterns."""
    from prenet4d_engines.train import train as run
    from prenet4d_engines.train.loop import CHECKPOINT, CHECKPOINT_EVERY
    from prenet4d_server.cli.progress import bar

    folder = out / task
    with _stopping(folder / CHECKPOINT, CHECKPOINT_EVERY), bar(f"training {task}") as advance:

        def tell(progress: Progress) -> None:
            note = f"loss {progress.loss:.4f}, {progress.samples_per_second:,.0f} patterns/s"
            advance(progress.share, note)

        weights = run(
            task,
            steps=steps,
            out_dir=folder,
            batch_size=batch_size,
            seed=seed,
            threads=threads,
            workers=workers,
            resume=resume,
            minutes=minutes,
            start_from=start_from,
            peak_rate=peak_rate,
            multislice=multislice,
            on_progress=tell,
        )
    print(
        f"The weights are in {weights}. To use them, if they are better than those that are in "
        f"use: prenet4d ship {task} {weights}"
    )


def ship(
    task: TaskArgument,
    weights: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What a training left.")
    ],
    note: Annotated[str, typer.Option(help="What the model card shall say of the training.")] = "",
    multislice: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Computed patterns for a quarter of the samples."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=64, help="Patterns per figure; eight times as many to compare on.")
    ] = 512,
) -> None:
    """Put trained weights into this installation, if they are better than those in use."""
    from prenet4d_engines.simulate.multislice import Multislice
    from prenet4d_engines.train.shipping import ship as run
    from prenet4d_server.cli.progress import bar

    computed = Multislice.load(multislice) if multislice is not None else None
    with bar(f"shipping {task}") as advance:
        done = run(
            task, weights, note=note, computed=computed, samples=samples, on_progress=advance
        )
    for name, loss in done.losses.items():
        print(f"loss of {_CANDIDATES[name]}: {loss:.4f}")
    if not done.changed:
        print("Nothing is changed: the weights in use lose least on fresh patterns.")
        return
    print(
        f"Services that start from now on use {_CANDIDATES[done.chosen]}, whose model card says "
        "how they came about. Engines for a GPU are to be built again: prenet4d engines build"
    )
    if task == "center":
        print("Ship refine again: its sigmas hang on this network's answers.")


_CANDIDATES: Final = {
    "trained": "the trained weights",
    "shipped": "the weights in use",
    "mean": "the means of both weights",
}


@contextmanager
def _stopping(checkpoint: Path, every: int) -> Iterator[None]:
    """Say on Ctrl-C what is kept of a training."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            kept = (
                f"{checkpoint} is of at most {every} steps before: the same command with --resume "
                "goes on from there"
            )
        else:
            kept = f"nothing is kept, for the first {every} steps were not done"
        print(f"prenet4d: The training was stopped; {kept}.", file=sys.stderr)
        raise


def simulate(
    context: typer.Context,
    gallery: Annotated[
        Path | None,
        picture_file(text="Write a page of pictures there."),
    ] = None,
    multislice: Annotated[
        Path | None,
        result_file(text="Compute patterns by multislice (abTEM) into that file."),
    ] = None,
    frame: FrameOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    patterns: Annotated[int, typer.Option(min=1, help="How many to compute.")] = 6400,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that compute.")] = 2,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="Compute the evaluation's materials, one pattern of each case."
        ),
    ] = False,
) -> None:
    """Draw a page of simulated patterns, or compute patterns by multislice for training."""
    import numpy as np

    from prenet4d_engines.simulate import HELD_OUT, TRAINING, draw_gallery, relatives
    from prenet4d_engines.simulate.multislice import PER_CASE, compute
    from prenet4d_server.cli.progress import bar

    if gallery is None and multislice is None:
        raise typer.BadParameter("Ask for --gallery FILE or --multislice FILE, or both.")
    if gallery is None:
        refuse_misfits(context, ["frame"], "is for --gallery alone.")
    if multislice is None:
        of_multislice = ["patterns", "workers", "held_out"]
        refuse_misfits(context, of_multislice, "is for --multislice alone.")
    elif multislice.exists():
        raise typer.BadParameter(
            f"There is a file {multislice} already, which may have taken long to compute: choose "
            "another name, or remove it."
        )
    if gallery is not None:
        shape = (frame.rows, frame.columns) if frame else (256, 256)
        with bar("drawing") as advance:
            draw_gallery(
                gallery, frame_shape=shape, seed=seed, on_progress=lambda share: advance(share, "")
            )
        print(f"The pictures are in {gallery}.")
    if multislice is not None:
        if held_out:
            materials = list(HELD_OUT.values())
        else:  # a third of the crystals exists
            invented = relatives(np.random.default_rng(seed), 2 * len(TRAINING))
            materials = [*TRAINING.values(), *invented]
        with bar("multislice") as advance:
            computed = compute(
                materials,
                patterns=patterns,
                seed=seed,
                per_case=1 if held_out else PER_CASE,
                workers=workers,
                on_progress=lambda share: advance(share, f"{patterns} patterns"),
            )
        computed.save(multislice)
        built_like = len(set(computed.materials))
        print(f"{len(computed)} patterns, built like {built_like} materials, are in {multislice}.")


def evaluate(
    what: Annotated[
        list[Part] | None, typer.Argument(help="What to evaluate; everything by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer patterns: two minutes on one core.")
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Measured patterns to use as well; may be repeated."),
    ] = None,
    json_file: JsonFileOption = None,
    plots: Annotated[
        Path | None,
        typer.Option(file_okay=False, writable=True, help="Write plots into this folder."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32, help="Of the patterns; 0 gives the figures that are quoted."
        ),
    ] = 0,
) -> None:
    """Compare the networks with classical methods on patterns that training never saw."""
    from rich.console import Console
    from rich.text import Text

    from prenet4d_engines.evaluate import evaluate as run
    from prenet4d_server.cli.progress import bar
    from prenet4d_server.feeds import read_expectations

    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in data or ()]
    if len(set(names)) < len(names):
        raise typer.BadParameter("Of files with the same name only one would be told: rename them.")
    if names and what and not {Part.DENOISE, Part.CENTER} & set(what):
        raise typer.BadParameter("Only denoise and center are evaluated on --data.")
    with bar("evaluating") as advance:
        report = run(
            [part.value for part in what or Part],
            quick=quick,
            seed=seed,
            data={path.stem: read_expectations(path) for path in data or ()},
            on_progress=advance,
        )
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    console = Console(markup=False)
    for table in report.tables():
        console.print(_drawn(table))
        if table.note:
            console.print(table.note, style="dim")
    for check in report.checks:
        verdict = Text("met", "green") if check.passed else Text("missed", "red")
        compared = f"  {check.goal}  ({check.value:.4g}, must be < {check.limit:g})"
        console.print(verdict + compared)
    for missing in report.missing:
        console.print(Text("not compared", "yellow") + f"  {missing}")
    for path in report.plots(plots) if plots is not None else ():
        console.print(f"plot: {path}", style="dim")
    if not report.passed:
        raise typer.Exit(1)


def _drawn(table: Table) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left")
    drawn.add_column(table.heading)
    for column in table.columns:
        drawn.add_column(column, justify="right")
    for label, values in table.rows:
        drawn.add_row(label, *("–" if value is None else f"{value:.4g}" for value in values))
    return drawn


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    app.command(epilog="Example:  [bold]prenet4d train center --minutes 40 --out runs[/bold]")(
        train
    )
    app.command(
        epilog="Example:  [bold]prenet4d ship center runs/center/center.safetensors[/bold]"
    )(ship)
    app.command(epilog="Example:  [bold]prenet4d simulate --gallery patterns.png[/bold]")(simulate)
    app.command(epilog="Example:  [bold]prenet4d evaluate --quick --json figures.json[/bold]")(
        evaluate
    )
