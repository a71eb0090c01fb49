"""Options of all commands of `pilotfish rag`: an index, and the server of a language model."""

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

from ...plugins.cli import at_most_one
from ...plugins.config import ConfigError
from ...retrieval.cli.options import Folder, refusals

rag = typer.Typer(help="Answer questions from documents.", no_args_is_help=True)


@dataclass(frozen=True)
class RagOptions:
    """The options of all `rag` commands."""

    folder: Folder
    server: Annotated[str, typer.Option(envvar="PILOTFISH_SERVER", help="URL of an OpenAI-compatible API.")] = (
        "http://127.0.0.1:8000/v1"
    )
    model: Annotated[str | None, typer.Option(help="Model name [default: the server's first model].")] = None
    key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="API key of the server.", show_default=False)] = (
        "none"
    )
    start: Annotated[
        str | None,
        typer.Option(help="Start a vLLM server with this model for the duration of the command; see `serve`."),
    ] = None
    drafter: Annotated[list[str] | None, typer.Option(help="Drafter of the started server: NAME[,key=value...].")] = (
        None
    )
    kv: Annotated[list[str] | None, typer.Option(help="KV policy of the started server.")] = None
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Number of passages in a prompt.")] = 4
    threshold: Annotated[
        float | None,
        typer.Option(help="Smallest similarity of the best passage [default: that of `rag eval --save`, or 0]."),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 256

    @contextlib.contextmanager
    def ready(self, arguments: list[str], make: bool = False) -> Iterator[Any]:
        """Yield an answerer on the index, and start a server for it if the options say so.

        Args:
            arguments: Further arguments of the started server.
            make: Whether to create an index if there is none.

        Raises:
            ConfigError: An option is invalid, or the server cannot be reached or started.
        """
        if self.start is None and (self.drafter or self.kv or arguments):
            stray = "--drafter" if self.drafter else "--kv" if self.kv else arguments[0]
            raise ConfigError(
                f"{stray}: not an option of this command; arguments of a server need --start MODEL, which starts one"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold: expected a number, got {self.threshold}")
        with refusals(), contextlib.ExitStack() as stack:
            from ...retrieval.index import Index
            from . import answering, connection, engine

            opened = stack.enter_context(new_index_folder(self.folder)) if make else Index.open(self.folder)
            index = stack.enter_context(opened)
            _ = index.encoder  # validates the encoder before the server is started
            server = self.server
            if self.start is not None:
                selected = {kind: at_most_one(f"--{kind}", getattr(self, kind)) for kind in ("drafter", "kv")}
                plugins = [word for kind, name in selected.items() if name for word in (f"--{kind}", name)]
                if sys.stderr.isatty():
                    typer.echo(f"starting {self.start} …", err=True)
                server = stack.enter_context(engine.started_server(self.start, [*plugins, *arguments]))
            model = asyncio.run(connection.named(server, self.model, self.key))
            yield answering.Answerer(index, server, model, self.key, self.k, self.threshold, self.max_tokens)


@contextlib.contextmanager
def new_index_folder(folder: Path, whole: bool = False) -> Iterator[Any]:
    """Open an index or create one; a new index is deleted if the body of the ``with`` statement fails.

    Args:
        folder: Folder of the index.
        whole: Whether a new index is deleted even if it contains documents, which are incomplete then.
    """
    from ...retrieval.index import Index
    from ...retrieval.store.manifest import CURRENT

    new, existed = not (folder / CURRENT).exists(), folder.exists()
    index = Index.open_or_create(folder)
    try:
        yield index
    except BaseException:
        if new and (whole or len(index) == 0):
            index.close()
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed:
                folder.rmdir()
        raise


def rag_command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a command to `rag`, with the options of `RagOptions` before its own.

    The function is called with the options, and with the remaining arguments for a server that is started.
    """
    shared = [f.name for f in fields(RagOptions)]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _, _, *own = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> None:
            setup = RagOptions(**{option: values.pop(option) for option in shared})
            function(setup, context.args, **values)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *inspect.signature(RagOptions).parameters.values(), *own]
        each = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(each)  # type: ignore[attr-defined] -- read by typer
        run.__annotations__ = {p.name: p.annotation for p in each}
        rag.command(name, context_settings={"allow_extra_args": True})(run)
        return run

    return add
