"""What every command of `pilotfish rag` asks for: an index, and the server of a language model."""

import asyncio
import contextlib
import functools
import inspect
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.cli import single_line
from ...plugins.config import ConfigError
from ...retrieval.cli.options import Folder, refusals

rag = typer.Typer(help="Answer questions from documents.", no_args_is_help=True)


@dataclass(frozen=True)
class RagOptions:
    """What every command asks for: an index, and the server of a language model."""

    folder: Folder
    server: Annotated[str, typer.Option(envvar="PILOTFISH_SERVER", help="The API of an OpenAI-compatible server.")] = (
        "http://127.0.0.1:8000/v1"
    )
    model: Annotated[str | None, typer.Option(help="As the server names it [default: the first that it has].")] = None
    key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="For the server.", show_default=False)] = "none"
    start: Annotated[
        str | None,
        typer.Option(help="Start a vLLM server of this model for as long as the command runs; see `serve`."),
    ] = None
    drafter: Annotated[list[str] | None, typer.Option(help="Of the server that is started: NAME[,key=value...].")] = (
        None
    )
    kv: Annotated[list[str] | None, typer.Option(help="Likewise, a KV policy.")] = None
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Passages of a prompt.")] = 4
    threshold: Annotated[
        float | None,
        typer.Option(help="How near the best passage has to come [default: what `rag eval --save` found, or 0]."),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 256

    @contextlib.contextmanager
    def ready(self, arguments: list[str], make: bool = False) -> Iterator[Any]:
        """An answerer on the index, and a server for it where one is to be started.

        Args:
            arguments: Further ones for that server.
            make: Make an index where there is none.
        """
        if self.start is None and (self.drafter or self.kv or arguments):
            stray = "--drafter" if self.drafter else "--kv" if self.kv else arguments[0]
            raise ConfigError(
                f"{stray}: no option of this command; arguments of a server go with --start MODEL, which begins one"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold: expected a number, got {self.threshold}")
        with refusals(), contextlib.ExitStack() as stack:
            from ...retrieval.index import Index
            from . import answering, connection, engine

            opened = stack.enter_context(new_index_folder(self.folder)) if make else Index.open(self.folder)
            index = stack.enter_context(opened)
            _ = index.encoder  # a wrong one is refused now
            server = self.server
            if self.start is not None:
                chosen = {kind: single_line(f"--{kind}", getattr(self, kind)) for kind in ("drafter", "kv")}
                plugins = [word for kind, name in chosen.items() if name for word in (f"--{kind}", name)]
                if sys.stderr.isatty():
                    typer.echo(f"starting {self.start} …", err=True)
                server = stack.enter_context(engine.started_server(self.start, [*plugins, *arguments]))
            model = asyncio.run(connection.named(server, self.model, self.key))
            yield answering.Answerer(index, server, model, self.key, self.k, self.threshold, self.max_tokens)


@contextlib.contextmanager
def new_index_folder(folder: Path, whole: bool = False) -> Iterator[Any]:
    """An index, made where there is none; one that was made goes again where what it was made for fails.

    Args:
        folder: Where.
        whole: Whether it goes even with documents in it, which are then but a part of those that were meant.
    """
    from ...retrieval.index import Index
    from ...retrieval.store.manifest import CURRENT

    new, there = not (folder / CURRENT).exists(), folder.exists()
    index = Index.open_or_create(folder)
    try:
        yield index
    except BaseException:
        if new and (whole or len(index) == 0):
            index.close()
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not there:
                folder.rmdir()
        raise


def rag_command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command to `rag` that has the options of `Setup` before its own.

    It is called with the set-up and with the arguments that are left, for a server that it starts.
    """
    shared = [f.name for f in fields(RagOptions)]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _, _, *own = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def run(context: typer.Context, **given: Any) -> None:
            setup = RagOptions(**{option: given.pop(option) for option in shared})
            function(setup, context.args, **given)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        asked = [context, *inspect.signature(RagOptions).parameters.values(), *own]
        each = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in asked]
        run.__signature__ = inspect.Signature(each)  # type: ignore[attr-defined] -- which typer reads
        run.__annotations__ = {p.name: p.annotation for p in each}
        rag.command(name, context_settings={"allow_extra_args": True})(run)
        return run

    return add
