"""What commands over indexes share: options, refusals in one line, progress, lines of input."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ...plugins.config import ConfigError, parse_assignments

T = TypeVar("T")

Folder = Annotated[Path, typer.Argument(help="The folder of the index.")]
Paths = Annotated[
    list[str], typer.Argument(help="Files or folders: jsonl, csv, parquet, text, md, html, pdf; - for stdin.")
]
Where = Annotated[
    str | None, typer.Option(help="Only documents whose metadata pass: year >= 2020 AND lang in (en, de).")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of the search, NAME=VALUE; may be repeated.")]
Word = Annotated[
    list[str] | None,
    typer.Option(help="Of a VDR index: WORD=FACTOR makes a word weigh so many times as much, 0 bans it."),
]
EncoderOption = Annotated[str | None, typer.Option(help="An encoder's name, or the folder of a checkpoint.")]
Device = Annotated[str, typer.Option(help="For the encoder: cpu, cuda or auto.")]
Precision = Annotated[str, typer.Option(help="For the encoder: float32, bfloat16, float16 or int8.")]
Chunk = Annotated[int, typer.Option(min=8, max=8192, help="Tokens of the pieces that texts are cut into.")]
Overlap = Annotated[int, typer.Option(min=0, help="Tokens that two pieces share.")]
NumberIds = Annotated[bool, typer.Option(help="Number records that have no id.")]
K = Annotated[int, typer.Option("-k", min=1, max=10_000, help="Hits at most.")]
Ray = Annotated[str | None, typer.Option(help="A Ray cluster for the shards: its address, auto, or local.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Host = Annotated[str, typer.Option(help="Address to listen at; others than loopback want a token.")]
Token = Annotated[
    str | None, typer.Option(envvar="PILOTFISH_TOKEN", help="What clients have to send as a bearer token.")
]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What a user or the system got wrong becomes one line and exit code 2."""
    from ..errors import RetrievalError

    try:
        yield
    except RetrievalError as error:
        raise ConfigError(str(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{error.filename or 'index'}: {error.strerror or error}") from None


def values(assignments: list[str] | None, flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping.

    Raises:
        ConfigError: one is of another form.
    """
    return dict(parse_assignments(",".join([flag, *(assignments or [])])).options)


def check_host(host: str, token: str | None, danger: str) -> None:
    """Refuse to listen where others are without a token, and tokens that no header can carry.

    Raises:
        ConfigError: nobody would be asked for one (``danger`` says what follows), or could send it.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("--token: expected printable characters of ASCII without spaces, as headers carry them")
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError(f"--host {host}: {danger}; give --token, or set PILOTFISH_TOKEN")


def with_bar(work: Callable[[Callable[[str, int, int | None], None]], T]) -> T:
    """Do ``work`` under a bar that shows what it is told."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    console = Console(stderr=True)
    columns = (*columns, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None, rate="")

        def told(stage: str, done: int, total: int | None) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:.0f}/s" if speed else ""
            bar.update(task, description=stage, completed=done, total=total, rate=rate)

        return work(told)


def lines(prompt: str) -> Iterator[str]:
    """Lines of standard input that say something; with a prompt where somebody sits there."""
    while True:
        if sys.stdin.isatty():
            typer.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def tell(message: str) -> None:
    typer.echo(message, err=True)


@contextlib.contextmanager
def open_whole(
    folder: Path, encoder: str | None = None, device: str = "auto", precision: str = "float32"
) -> Iterator[Any]:
    """An index that is in one piece."""
    from .. import shards
    from ..index import Index

    if shards.is_sharded(folder):
        raise ConfigError(f"{folder}: is in shards, which are built, searched and served only; see docs/indexes.md")
    with Index.open(folder, encoder, device, precision) as index:
        yield index


@contextlib.contextmanager
def open_any(
    folder: Path,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    ray: str | None = None,
) -> Iterator[Any]:
    """An index, or shards."""
    from .. import shards

    if ray is None and not shards.is_sharded(folder):
        with open_whole(folder, encoder, device, precision) as index:
            yield index
        return
    if (encoder, device, precision) != (None, "auto", "float32"):
        raise ConfigError("--encoder, --device, --precision: shards are read as they were built")
    with shards.ShardedIndex(folder, ray) as index:
        yield index
