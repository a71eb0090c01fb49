"""`pilotfish prune` and `pilotfish bench vision`."""

from pathlib import Path
from typing import Annotated

import typer

from ....plugins.cli import extend_group
from ....plugins.hookspecs import hookimpl
from ....plugins.terminal import MEASURING, TUNING

bench = typer.Typer(help="Compare plugins with stock vLLM.", no_args_is_help=True)
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
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    pruner: Annotated[
        list[str] | None, typer.Option(help="Visual pruner: NAME[,key=value...]; can be repeated [default: all].")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Folder of a LLaVA checkpoint, or name of an embedded model.")
    ] = "test-llava-next",
    out: Annotated[Path, typer.Option(help="Folder to write the drawings to.")] = Path("out/pruned"),
    draw: Annotated[bool, typer.Option(help="Draw the kept tokens, or only count them.")] = True,
) -> None:
    """Show which visual tokens of IMAGES are kept. Drawings dim pruned patches and label each crop with its share."""
    from ..vision import visualize

    visualize.visualize_pruning(images, pruner, model, out if draw else None)


@bench.command("vision")
def bench_vision(
    image: Annotated[list[Path], typer.Option(help="Image file for the requests; give at least four.")],
    quality: Annotated[
        list[Path] | None, typer.Option(help="Folder of images to hide needles in, with chelsea.png; can be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Folder of a LLaVA checkpoint, or name of an embedded model.")
    ] = "test-llava-next",
    arm: Annotated[
        list[str] | None, typer.Option(help="Pruner to compare with stock: NAME[,key=value...]; can be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Number of runs of each arm; 0 to measure quality only.")] = 3,
    out: Annotated[Path, typer.Option(help="Path of the JSON results.")] = Path("benchmarks/results/vision.json"),
) -> None:
    """Compare visual pruners with stock vLLM. Measures tokens, KV blocks, times, and quality of the kept tokens."""
    from ..bench import vision

    vision.run_vision_benchmark(
        vision.VisionBenchmark(tuple(image), tuple(quality or ()), model, tuple(arm or ARMS), repeats, out)
    )
