"""`pilotfish train`: commands that train encoders."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ...plugins.terminal import SEARCH
from .options import refusals

train = typer.Typer(help="Train an encoder on your own queries or texts.", no_args_is_help=True)

Out = Annotated[Path, typer.Argument(help="Folder of the checkpoint.")]
QrelsFolders = Annotated[
    list[Path] | None, typer.Option("--qrels", help="BEIR folder with queries and qrels; repeatable.")
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Texts for the inverse cloze task (sentences as queries); repeatable."),
]
Base = Annotated[str, typer.Option(help="Initial model: minilm, or folder of an encoder.")]
Steps = Annotated[int, typer.Option(min=1, help="Number of optimiser steps.")]
BatchSize = Annotated[
    int, typer.Option("--batch", min=2, help="Pairs per step; other pairs of the batch are negatives.")
]
Rate = Annotated[float, typer.Option(min=0, help="Peak learning rate.")]
QueryTokens = Annotated[int, typer.Option(min=4, max=512)]
DocumentTokens = Annotated[int, typer.Option(min=4, max=512)]
Seed = Annotated[int, typer.Option(min=0)]
Every = Annotated[int, typer.Option(min=1, help="Steps between two states from which --resume can continue.")]
Resume = Annotated[bool, typer.Option(help="Resume an interrupted training with the same options.")]


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Register the group of commands."""
    cli.add_typer(train, name="train", rich_help_panel=SEARCH)


@train.command("vdr")
def train_vdr(
    out: Out,
    qrels: QrelsFolders = None,
    text: Texts = None,
    base: Base = "minilm",
    steps: Steps = 300,
    batch: BatchSize = 16,
    rate: Rate = 2e-5,
    query_tokens: QueryTokens = 64,
    document_tokens: DocumentTokens = 128,
    top: Annotated[int, typer.Option(min=1, help="Number of weights that are kept per text.")] = 768,
    semi: Annotated[bool, typer.Option(help="SVDR: bags of words on both sides.")] = False,
    mask: Annotated[float | None, typer.Option(min=0, help="Weight of the contrastive mask; off by default.")] = None,
    seed: Seed = 0,
    every: Every = 50,
    resume: Resume = False,
) -> None:
    """Train a VDR encoder of term weights. In-batch contrast of weights and of bags of words (VDR, ICLR 2024)."""

    def make(folder: Path, lengths: Any) -> Any:
        from ..training.tasks import VDRTask

        return VDRTask(folder, lengths, top, semi, mask)

    _run(make, out, qrels, text, base, (steps, batch, rate, seed, every), (query_tokens, document_tokens), resume)


@train.command("xtr")
def train_xtr(
    out: Out,
    qrels: QrelsFolders = None,
    text: Texts = None,
    base: Base = "minilm",
    steps: Steps = 300,
    batch: BatchSize = 16,
    rate: Rate = 2e-5,
    query_tokens: QueryTokens = 64,
    document_tokens: DocumentTokens = 128,
    width: Annotated[int, typer.Option(min=8, max=1024, help="Dimension of the token vectors.")] = 128,
    retrieved: Annotated[int, typer.Option(min=1, help="Tokens of the batch that each query token retrieves.")] = 256,
    temperature: Annotated[float, typer.Option(min=1e-3, max=10)] = 0.05,
    seed: Seed = 0,
    every: Every = 50,
    resume: Resume = False,
) -> None:
    """Train an XTR encoder of token vectors. In-batch token retrieval (XTR, arXiv 2304.01982)."""

    def make(folder: Path, lengths: Any) -> Any:
        from ..training.tasks import XTRTask

        return XTRTask(folder, lengths, width, retrieved, temperature)

    _run(make, out, qrels, text, base, (steps, batch, rate, seed, every), (query_tokens, document_tokens), resume)


def _run(
    make: Any,
    out: Path,
    qrels: list[Path] | None,
    text: list[str] | None,
    base: str,
    plan: tuple[int, int, float, int, int],
    lengths: tuple[int, int],
    resume: bool,
) -> None:
    if not qrels and not text:
        raise ConfigError("train: give --qrels FOLDER, --text PATH, or both")
    if not 0 <= plan[2] <= 1:  # also NaN
        raise ConfigError(f"--rate: expected 0 to 1, got {plan[2]}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; a checkpoint needs a folder")
    with refusals():
        import random
        from importlib.util import find_spec

        from rich.console import Console
        from rich.progress import Progress

        from ..encoders import tokenization

        if find_spec("matplotlib") is None:
            raise ConfigError("train: the loss curve needs matplotlib; pip install pilotfish[train]")
        from ..training import loop, pairs, tasks

        examples = [p for folder in qrels or [] for p in pairs.qrels_pairs(folder)]
        examples += pairs.inverse_cloze_pairs(text, plan[3]) if text else []
        random.Random(plan[3]).shuffle(examples)
        with tokenization.quiet_loading(f"--base {base}"):
            task = make(tasks.base_folder(base), tasks.Lengths(*lengths))
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"{len(examples)} pairs", total=plan[0])
            loop.train(
                task,
                examples,
                loop.TrainingPlan(*plan),
                out,
                resume,
                lambda step, loss: progress.update(bar, completed=step, description=f"loss {loss:.3f}"),
            )
        console.print(f"{out}: checkpoint written; the loss curve is {out / 'training' / loop.CURVE}")
