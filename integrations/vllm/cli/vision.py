"""`pilotfish prune` and `pilotfish bench vision`."""

from pathlib import Path
from typing import Annotated

import typer

from ....plugins.cli import extend_group
from ....plugins.hookspecs import hookimpl
from ....plugins.terminal import MEASURING, TUNING

bench = typer.Typer(help="Measure plugins side by side with stock vLLM.", no_args_is_help=True)
ARMS = (
    *(f"globalcom2,retain={retain}" for retain in (0.75, 0.5, 0.25, 0.1)),
    "aim",
    "aim,merge_steps=3",
    "diversity,retain=0.25",
    "aim,experimental_layers=[14,22]",
)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.command("prune", rich_help_panel=TUNING)(prune)
    extend_group(cli, "bench", bench, MEASURING)


def prune(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures.")],
    pruner: Annotated[
        list[str] | None, typer.Option(help="A visual pruner: NAME[,key=value...]; may be repeated [default: all].")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A LLaVA checkpoint on disk, or the name of an embedded model.")
    ] = "test-llava-next",
    out: Annotated[Path, typer.Option(help="The folder that the drawings go to.")] = Path("out/pruned"),
    draw: Annotated[bool, typer.Option(help="Draw; else only count.")] = True,
) -> None:
    """Show which visual tokens of PICTURES stay: what is kept clear, the rest dimmed, each crop's share written in."""
    from ..vision import visualize

    visualize.visualize_pruning(pictures, pruner, model, out if draw else None)


@bench.command("vision")
def bench_vision(
    picture: Annotated[list[Path], typer.Option(help="A picture for requests; name four.")],
    quality: Annotated[
        list[Path] | None, typer.Option(help="A folder of pictures, one with chelsea.png, to hide needles in.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A LLaVA checkpoint on disk, or the name of an embedded model.")
    ] = "test-llava-next",
    arm: Annotated[
        list[str] | None, typer.Option(help="A pruner beside stock: NAME[,key=value...]; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Runs of each arm; 0 for quality alone.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results/vision.json"),
) -> None:
    """Compare visual pruners with stock: tokens, cache, time of each part, and which tokens stay."""
    from ..bench import vision

    vision.run_vision_benchmark(
        vision.VisionBenchmark(tuple(picture), tuple(quality or ()), model, tuple(arm or ARMS), repeats, out)
    )
