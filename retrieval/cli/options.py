"""Shared parts of the index commands: options, one-line errors, progress bar, lines of input."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ...plugins.config import ConfigError, parse_assignments
from ..defaults import LOCK_TIMEOUT

T = TypeVar("T")

Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]
Paths = Annotated[
    list[str], typer.Argument(help="Files or folders: jsonl, csv, parquet, text, md, html, pdf; - for stdin.")
]
SyncPaths = Annotated[list[str], typer.Argument(help="Files and folders that the index is to contain.")]
SyncOption = Annotated[
    list[str] | None,
    typer.Option(help="File or folder to synchronize the index with, at start and by POST /sync; repeatable."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Metadata filter, for example: year >= 2020 AND lang in (en, de); repeatable, and then all have to hold."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Search setting, NAME=VALUE; repeatable.")]
Word = Annotated[
    list[str] | None,
    typer.Option(help="Term boost of a VDR index: WORD=FACTOR multiplies a weight, 0 bans the term; repeatable."),
]
EncoderOption = Annotated[str | None, typer.Option(help="Name of an encoder, or folder of a checkpoint.")]
Device = Annotated[str, typer.Option(help="Device of the encoder: cpu, cuda or auto.")]
Precision = Annotated[str, typer.Option(help="Precision of the encoder: float32, bfloat16, float16 or int8.")]
Chunk = Annotated[int, typer.Option(min=8, max=8192, help="Tokens per chunk of a text.")]
Overlap = Annotated[int, typer.Option(min=0, help="Tokens that consecutive chunks share.")]
NumberIds = Annotated[bool, typer.Option(help="Give record numbers as ids to records without an id.")]
BadFiles = Annotated[
    Literal["skip", "stop"],
    typer.Option(help="What to do about files that cannot be read: skip them, or stop before anything is written."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of files to ignore in folders, as in .gitignore, which is respected; repeatable."),
]
LockTimeout = Annotated[float, typer.Option(min=0, help="Seconds to wait while another process changes the index.")]
K = Annotated[int, typer.Option("-k", min=1, max=10_000, help="Maximum number of hits.")]
Ray = Annotated[str | None, typer.Option(help="Ray cluster for the shards: its address, auto, or local.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Host = Annotated[str, typer.Option(help="Address to listen on; any but loopback requires a token.")]
Token = Annotated[str | None, typer.Option(envvar="PILOTFISH_TOKEN", help="Bearer token that clients have to send.")]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Convert errors of the user or of the system to one line and exit code 2."""
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
    """Parse ``NAME=VALUE`` texts to a mapping.

    Raises:
        ConfigError: A text does not have this form.
    """
    return dict(parse_assignments(",".join([flag, *(assignments or [])])).options)


def check_host(host: str, token: str | None, danger: str) -> None:
    """Check that a server on a public address has a token, and that a header can carry the token.

    Raises:
        ConfigError: The token is missing or invalid; ``danger`` names the consequence of a missing one.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("--token: expected printable ASCII characters without spaces, which HTTP headers can carry")
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError(f"--host {host}: {danger}; give --token, or set PILOTFISH_TOKEN")


def with_bar(work: Callable[[Callable[[str, int, int | None], None]], T]) -> T:
    """Run ``work`` under a progress bar, and pass it the callback that updates the bar."""
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

        def on_progress(stage: str, done: int, total: int | None) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:.0f}/s" if speed else ""
            bar.update(task, description=stage, completed=done, total=total, rate=rate)

        return work(on_progress)


def lines(prompt: str) -> Iterator[str]:
    """Iterate over the non-empty lines of standard input, with a prompt if it is a terminal."""
    while True:
        if sys.stdin.isatty():
            typer.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def tell(message: str) -> None:
    """Write a message to standard error."""
    typer.echo(message, err=True)


@contextlib.contextmanager
def open_whole(
    folder: Path,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    lock_timeout: float = LOCK_TIMEOUT,
) -> Iterator[Any]:
    """Open an index that is not sharded."""
    from .. import shards
    from ..index import Index

    if shards.is_sharded(folder):
        raise ConfigError(f"{folder}: is in shards, which can only be built, searched and served; see docs/indexes.md")
    with Index.open(folder, encoder, device, precision, lock_timeout) as index:
        yield index


@contextlib.contextmanager
def open_any(
    folder: Path,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    ray: str | None = None,
) -> Iterator[Any]:
    """Open an index or a sharded index."""
    from .. import shards

    if ray is None and not shards.is_sharded(folder):
        with open_whole(folder, encoder, device, precision) as index:
            yield index
        return
    if (encoder, device, precision) != (None, "auto", "float32"):
        raise ConfigError("--encoder, --device, --precision: shards are opened with the encoder of their build")
    with shards.ShardedIndex(folder, ray) as index:
        yield index


def all_filters(where: list[str] | None) -> str | None:
    """Return one filter for all values of ``--where``; None without any."""
    if not where:
        return None
    return where[0] if len(where) == 1 else " AND ".join(f"({text})" for text in where)
