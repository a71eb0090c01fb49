"""`pilotfish rag`: ask an index through a language model, on the command line or on a page."""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ...retrieval.cli import AsJson, Folder, Host, Token, Where, check_host, lines, refusals

rag = typer.Typer(help="Answer questions from documents.", no_args_is_help=True)


@dataclass(frozen=True)
class Setup:
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
    drafter: Annotated[str | None, typer.Option(help="Of the server that is started: NAME[,key=value...].")] = None
    kv: Annotated[str | None, typer.Option(help="Likewise, a KV policy.")] = None
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="Passages of a prompt.")] = 4
    threshold: Annotated[
        float | None,
        typer.Option(help="How near the best passage has to come [default: what `rag eval --save` found, or 0]."),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 256

    @contextlib.contextmanager
    def ready(self, arguments: list[str], make: str | None = None) -> Iterator[Any]:
        """An answerer on the index, and a server for it where one is to be started.

        Args:
            arguments: Further ones for that server.
            make: Kind of the index that is made where there is none; None where there has to be one.
        """
        if self.start is None and (self.drafter or self.kv or arguments):
            stray = "--drafter" if self.drafter else "--kv" if self.kv else arguments[0]
            raise ConfigError(
                f"{stray}: is for the server that --start MODEL begins; give it to your own server instead"
            )
        with refusals(), contextlib.ExitStack() as stack:
            from ...retrieval.index import Index
            from . import answering, engine
            from . import threshold as thresholds

            opened = Index.open_or_create(self.folder, make) if make else Index.open(self.folder)
            index = stack.enter_context(opened)
            _ = index.encoder  # a wrong one is refused now
            least = thresholds.read(self.folder) if self.threshold is None else self.threshold
            server = self.server
            if self.start is not None:
                chosen = [(f"--{kind}", name) for kind in ("drafter", "kv") if (name := getattr(self, kind))]
                typer.echo(f"starting {self.start} …", err=True)
                every = [*(word for pair in chosen for word in pair), *arguments]
                server = stack.enter_context(engine.started(self.start, every))
            model = asyncio.run(answering.named(server, self.model, self.key))
            yield answering.Answerer(index, server, model, self.key, self.k, least, self.max_tokens)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command to `rag` that has the options of `Setup` before its own.

    It is called with the set-up and with the arguments that are left, for a server that it starts.
    """
    shared = [f.name for f in fields(Setup)]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _, _, *own = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def run(context: typer.Context, **given: Any) -> None:
            setup = Setup(**{option: given.pop(option) for option in shared})
            function(setup, context.args, **given)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        asked = [context, *inspect.signature(Setup).parameters.values(), *own]
        each = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in asked]
        run.__signature__ = inspect.Signature(each)  # type: ignore[attr-defined] -- which typer reads
        run.__annotations__ = {p.name: p.annotation for p in each}
        rag.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run)
        return run

    return add


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(rag, name="rag")


@command("ask")
def ask(
    setup: Setup,
    arguments: list[str],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, with citations and times. Arguments after `--` go to the server that is started."""

    async def work() -> None:
        async with contextlib.aclosing(answerer.answer(question, (), where)) as events:
            if as_json:
                await _as_json(question, events)
            else:
                await _shown(events)
        await answerer.close()

    with setup.ready(arguments) as answerer:
        asyncio.run(work())


@command("chat")
def chat(setup: Setup, arguments: list[str], where: Where = None) -> None:
    """Ask again and again, each question read from a line; what was said before is remembered."""
    from . import prompt

    async def work() -> None:
        history: list[prompt.Message] = []
        for question in lines("\n> "):
            async with contextlib.aclosing(answerer.answer(question, history, where)) as events:
                found, text = await _shown(events)
            if found:
                turns = [prompt.question(found, question), {"role": "assistant", "content": text}]
                history = prompt.remembered([*history, *turns])
        await answerer.close()

    with setup.ready(arguments) as answerer:
        asyncio.run(work())


@command("serve")
def serve(
    setup: Setup,
    arguments: list[str],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8090,
    token: Token = None,
    read_only: Annotated[bool, typer.Option(help="Take no documents.")] = False,
) -> None:
    """Serve a page that answers questions; the folder's index is made where there is none."""
    check_host(host, token, "others could read and add documents")
    with setup.ready(arguments, None if read_only else "xtr") as answerer:
        from ...retrieval import server as serving
        from .server import create_app

        serving.run(create_app(answerer.index, answerer, token, read_only), host, port)


async def _shown(events: AsyncIterator[Any]) -> tuple[Any, str]:
    """Print an answer as it comes, then what it stands on; returns passages and text."""
    from .answering import Done, Found, Text

    passages: Any = ()
    text = ""
    async for event in events:
        match event:
            case Found():
                passages = event.passages
            case Text():
                typer.echo(event.text, nl=False)
            case Done():
                text = event.text
                typer.echo("")
                _grounds(event, passages)
    return passages, text


def _grounds(done: Any, passages: Any) -> None:
    named = set(done.cited) | set(done.attributed)
    if done.cited or done.attributed:
        typer.echo("")
        how = "" if done.cited else "  (by its words; the answer names none)"
        for p in passages:
            if p.number in named:
                typer.echo(f"[{p.number}] {p.id}: {p.snippet}{how}")
    elif done.known:
        typer.echo("\n(the answer names no passage, and its words are those of none: do not rely on it)")
    took = done.milliseconds
    parts = [f"search {took['retrieval']:.0f} ms"]
    if "first_token" in took:
        parts.append(f"first token {took['first_token']:.0f} ms")
    parts.append(f"all {took['total']:.0f} ms")
    if done.tokens:
        parts.append(f"{done.tokens['prompt']} + {done.tokens['answer']} tokens")
    parts += [f"{value} {name.replace('_', ' ')}" for name, value in done.saved.items()]
    typer.echo(", ".join(parts), err=True)


async def _as_json(question: str, events: AsyncIterator[Any]) -> None:
    import json
    from dataclasses import asdict

    from .answering import Done, Found

    told: dict[str, Any] = {"question": question}
    async for event in events:
        if isinstance(event, Found):
            told |= {"passages": [asdict(p) for p in event.passages], "similarity": event.similarity}
        elif isinstance(event, Done):
            told |= asdict(event)
    typer.echo(json.dumps(told, ensure_ascii=False))
