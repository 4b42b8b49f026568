"""Building the TensorRT engines for a detector, and looking after them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from prenet4d_server.cli.arguments import Grid, parse_frame
from prenet4d_server.wording import counted

if TYPE_CHECKING:
    from prenet4d_engines.backends.tensorrt.cache import EngineCache, Entry, Sidecar
    from prenet4d_engines.backends.tensorrt.making import Progress


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,16,64`` → (1, 16, 64).

    Raises:
        typer.BadParameter: it does not read as positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() and int(part) > 0 for part in parts):
        return tuple(int(part) for part in parts)
    raise typer.BadParameter(f"{text!r} is not a list of batch sizes: write for example 1,16,64.")


_Batches: TypeAlias = Annotated[
    Any,
    typer.Option(
        "--batch",
        parser=parse_batches,
        metavar="1,16,64,256",
        help="Batch sizes; the largest should be the service's batch.size.",
    ),
]
_Shape: TypeAlias = Annotated[
    Grid,
    typer.Option(
        "--shape",
        parser=parse_frame,
        metavar="256x256",
        help="The detector's pixels, rows x columns.",
    ),
]
_Cache: TypeAlias = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder of the engines, as in corrector.engines."),
]
_LEGEND = "GFLOP, and MB at least moved: for each frame, or mean of frames (ellipse)."
_Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def build(
    shape: _Shape = "256x256",  # type: ignore[assignment]  # parsed like what a user writes
    batch: _Batches = "1,16,64,256",
    flavor: Annotated[
        Literal["tensorrt", "tensorrt_rtx"] | None,
        typer.Option(help="Which TensorRT; by default the first that is installed."),
    ] = None,
    cache: _Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Build what is there already.")] = False,
    as_json: _Json = False,
) -> None:
    """Compile the networks for this machine's GPU and a detector; compare each with float32."""
    from prenet4d_engines.backends.tensorrt.cache import EngineCache
    from prenet4d_engines.backends.tensorrt.flavors import load
    from prenet4d_engines.backends.tensorrt.making import make
    from prenet4d_server.cli.progress import bar

    toolkit, folder = load(flavor), EngineCache(cache)
    with bar(f"engines for {shape.rows} × {shape.columns}") as advance:

        def tell(progress: Progress) -> None:
            advance(progress.share, progress.doing)

        made = list(
            make(
                *((shape.rows, shape.columns), toolkit, folder),
                batches=batch,
                force=force,
                on_progress=tell,
            )
        )
    if as_json:
        print(json.dumps([_plain(each.sidecar) | {"kept": each.kept} for each in made], indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(f"for {_target(made[0].sidecar)}", [each.sidecar for each in made]))
    console.print(_LEGEND, style="dim")
    if kept := sum(each.kept for each in made):
        console.print(f"Of these, {kept} were there already, and are kept.")
    console.print(f"The engines are in {folder.folder}.")
    if all(each.sidecar.parity is None for each in made):
        console.print(
            "There is no NVIDIA GPU here: this shows that the graphs build, and no more. Engines "
            "are only loaded where they were built.",
            style="yellow",
        )


def list_(cache: _Cache = None, as_json: _Json = False) -> None:
    """Show the engines: what they cost, how far they are from float32, whether they are used."""
    from prenet4d_engines.backends.tensorrt.cache import EngineCache

    folder = EngineCache(cache)
    _show(folder, [(entry, _state(entry)) for entry in folder.entries()], as_json)


def verify(cache: _Cache = None, as_json: _Json = False) -> None:
    """Check every engine's seal and SHA-256; those made for this GPU run against float32 again."""
    from prenet4d_engines.backends.tensorrt.cache import EngineCache
    from prenet4d_engines.backends.tensorrt.flavors import load
    from prenet4d_engines.backends.tensorrt.making import check_again
    from prenet4d_engines.errors import BackendError

    folder = EngineCache(cache)
    states = []
    failed = False
    for entry in folder.entries():
        state = _state(entry)
        if state == "ready" and entry.sidecar is not None:
            try:
                check_again(entry.sidecar, load(entry.sidecar.recipe.flavor), folder)
            except BackendError as error:
                state, failed = str(error), True
        failed = failed or entry.fault is not None
        states.append((entry, state))
    _show(folder, states, as_json)
    if failed:
        raise typer.Exit(1)


def clean(
    cache: _Cache = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are used, and the timing caches.")
    ] = False,
) -> None:
    """Remove engines that cannot be used here: altered, older, or made for something else."""
    from prenet4d_engines.backends.tensorrt.cache import EngineCache

    folder = EngineCache(cache)
    if not folder.entries() and not (everything and folder.folder.is_dir()):
        print(f"There are no engines in {folder.folder}.")
        return
    with folder.building():
        gone = [each for each in folder.entries() if everything or _state(each) != "ready"]
        freed = folder.remove(gone) + (folder.remove_timings() if everything else 0)
    print(f"Removed {counted(len(gone), 'engine')} from {folder.folder}: {freed / 1e6:,.1f} MB.")


def _state(entry: Entry) -> str:
    """Say ``ready``, or why an engine is not used."""
    from prenet4d_engines.backends.tensorrt.cache import misfit
    from prenet4d_engines.backends.tensorrt.flavors import gpu, load
    from prenet4d_engines.errors import BackendError
    from prenet4d_engines.export import source_sha256

    if entry.sidecar is None or entry.fault is not None:
        return f"refused: {entry.fault}"
    flavor = entry.sidecar.recipe.flavor
    try:
        version = load(flavor).version
    except BackendError as error:
        return f"not used: {error}"
    why = misfit(entry.sidecar, flavor, version, gpu(), source_sha256())
    return "ready" if why is None else f"not used: {why}"


def _show(folder: EngineCache, states: list[tuple[Entry, str]], as_json: bool) -> None:
    if as_json:
        documents = [
            {"file": entry.path.name, "state": state}
            | (_plain(entry.sidecar) if entry.sidecar is not None else {})
            for entry, state in states
        ]
        print(json.dumps(documents, indent=2))
        return
    from rich.console import Console

    console = Console()
    if not states:
        console.print(f"There are no engines in {folder.folder}: prenet4d engines build")
        return
    groups: dict[str, list[Sidecar]] = {}
    for entry, state in states:
        if entry.sidecar is not None:
            groups.setdefault(f"{_target(entry.sidecar)}: {state}", []).append(entry.sidecar)
    for title, sidecars in sorted(groups.items()):
        console.print(_table(title, sorted(sidecars, key=_place)))
    for entry, state in states:
        if entry.sidecar is None:
            console.print(f"{entry.path.name}: {state}", style="red")
    console.print(_LEGEND, style="dim")


def _target(sidecar: Sidecar) -> str:
    """What an engine was made with, and for which GPU."""
    from prenet4d_engines.backends.tensorrt.flavors import NO_GPU

    recipe = sidecar.recipe
    device = "no GPU" if recipe.gpu == NO_GPU.name else recipe.gpu
    return f"{recipe.flavor} {recipe.version}, {device}"


def _place(sidecar: Sidecar) -> tuple[str, tuple[int, ...], int]:
    return sidecar.recipe.network, sidecar.recipe.input_shape, sidecar.recipe.batch


def _plain(sidecar: Sidecar) -> dict[str, Any]:
    plain: dict[str, Any] = sidecar.model_dump(mode="json", exclude={"seal"})
    return plain


def _table(title: str, sidecars: Iterable[Sidecar]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), title=title, title_justify="left", title_style="bold")
    table.add_column("network")
    for name in ("input", "batch", "GFLOP", "MB moved", "MB", "off float32", "built in"):
        table.add_column(name, justify="right")
    for sidecar in sidecars:
        recipe = sidecar.recipe
        table.add_row(
            recipe.network,
            "×".join(map(str, recipe.input_shape)),
            str(recipe.batch),
            f"{sidecar.flop / 1e9:.2f}",
            f"{sidecar.activation_bytes / 1e6:.1f}",
            f"{sidecar.plan_bytes / 1e6:.1f}",
            "–" if sidecar.parity is None else f"{sidecar.parity.physical:.2g}",
            f"{sidecar.seconds:.0f} s",
        )
    return table


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the command line."""
    example = "Example:  [bold]prenet4d engines build --shape 256x256 --batch 1,16,64[/bold]"
    engines = typer.Typer(
        name="engines",
        help="Compile the networks with TensorRT for an NVIDIA GPU, and look after them.",
        epilog=example,
        no_args_is_help=True,
    )
    engines.command(epilog=example)(build)
    engines.command("list", epilog="Example:  [bold]prenet4d engines list --json[/bold]")(list_)
    engines.command(epilog="Example:  [bold]prenet4d engines verify[/bold]")(verify)
    engines.command(epilog="Example:  [bold]prenet4d engines clean --all[/bold]")(clean)
    app.add_typer(engines)
