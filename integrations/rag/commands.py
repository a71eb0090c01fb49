"""`pilotfish rag`: ask an index through a language model, on the command line or on a page."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ...retrieval.commands import Folder, Where, refusals

rag = typer.Typer(help="Answer questions from documents.", no_args_is_help=True)

Server = Annotated[str, typer.Option(envvar="PILOTFISH_SERVER", help="The API of an OpenAI-compatible server.")]
Model = Annotated[str | None, typer.Option(help="As the server names it [default: the first that it has].")]
Key = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="For the server.", show_default=False)]
Start = Annotated[
    str | None, typer.Option(help="Start a vLLM server of this model for as long as the command runs; see `serve`.")
]
Drafter = Annotated[str | None, typer.Option(help="Of the server that is started: NAME[,key=value...].")]
Kv = Annotated[str | None, typer.Option(help="Likewise, a KV policy.")]
K = Annotated[int, typer.Option("-k", min=1, max=100, help="Passages of a prompt.")]
Threshold = Annotated[
    float | None,
    typer.Option(help="How near the best passage has to come [default: what `rag eval --save` found, or 0]."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer, at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
USUAL_SERVER = "http://127.0.0.1:8000/v1"


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(rag, name="rag")


@rag.command("ask", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def ask(
    context: typer.Context,
    folder: Folder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    server: Server = USUAL_SERVER,
    model: Model = None,
    key: Key = "none",
    start: Start = None,
    drafter: Drafter = None,
    kv: Kv = None,
    k: K = 4,
    where: Where = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = 256,
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

    with _ready(folder, server, model, key, start, drafter, kv, context.args, k, threshold, max_tokens) as answerer:
        asyncio.run(work())


@rag.command("chat", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def chat(
    context: typer.Context,
    folder: Folder,
    server: Server = USUAL_SERVER,
    model: Model = None,
    key: Key = "none",
    start: Start = None,
    drafter: Drafter = None,
    kv: Kv = None,
    k: K = 4,
    where: Where = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = 256,
) -> None:
    """Ask again and again, each question read from a line; what was said before is remembered."""
    from . import prompt

    async def work() -> None:
        history: list[prompt.Message] = []
        for question in _questions():
            found, text = (), ""
            async with contextlib.aclosing(answerer.answer(question, history, where)) as events:
                found, text = await _shown(events)
            if found:
                turns = [prompt.question(found, question), {"role": "assistant", "content": text}]
                history = prompt.remembered([*history, *turns])
        await answerer.close()

    with _ready(folder, server, model, key, start, drafter, kv, context.args, k, threshold, max_tokens) as answerer:
        asyncio.run(work())


@rag.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback want a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8090,
    token: Annotated[
        str | None, typer.Option(envvar="PILOTFISH_TOKEN", help="What clients have to send as a bearer token.")
    ] = None,
    read_only: Annotated[bool, typer.Option(help="Take no documents.")] = False,
    server: Server = USUAL_SERVER,
    model: Model = None,
    key: Key = "none",
    start: Start = None,
    drafter: Drafter = None,
    kv: Kv = None,
    k: K = 4,
    threshold: Threshold = None,
    max_tokens: MaxTokens = 256,
) -> None:
    """Serve a page that answers questions; the folder's index is made where there is none."""
    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise ConfigError(f"--host {host}: others could read and add documents; give --token, or set PILOTFISH_TOKEN")
    make = None if read_only else "xtr"
    given = (folder, server, model, key, start, drafter, kv, context.args, k, threshold, max_tokens, make)
    with _ready(*given) as answerer:
        from ...retrieval import server as serving
        from .server import create_app

        serving.run(create_app(answerer.index, answerer, token, read_only), host, port)


@contextlib.contextmanager
def _ready(
    folder: Path,
    server: str,
    model: str | None,
    key: str,
    start: str | None,
    drafter: str | None,
    kv: str | None,
    arguments: list[str],
    k: int,
    threshold: float | None,
    max_tokens: int,
    make: str | None = None,
) -> Iterator[Any]:
    """An answerer on the index in a folder, and a server for it where one is to be started."""
    if start is None and (drafter or kv or arguments):
        stray = "--drafter" if drafter else "--kv" if kv else arguments[0]
        raise ConfigError(f"{stray}: is for the server that --start MODEL begins; give it to your own server instead")
    with refusals(), contextlib.ExitStack() as stack:
        from ...retrieval.index import Index
        from . import engine
        from . import threshold as thresholds
        from .answering import Answerer

        opened = Index.open_or_create(folder, make) if make else Index.open(folder)
        index = stack.enter_context(opened)
        _ = index.encoder  # a wrong one is refused now
        least = thresholds.read(folder) if threshold is None else threshold
        if start is not None:
            chosen = [*(("--drafter", drafter) if drafter else ()), *(("--kv", kv) if kv else ()), *arguments]
            typer.echo(f"starting {start} …", err=True)
            server = stack.enter_context(engine.started(start, chosen))
        answerer = Answerer(index, server, model, key, k, least, max_tokens)
        asyncio.run(_connected(answerer))
        yield Answerer(index, server, answerer.model, key, k, least, max_tokens)


async def _connected(answerer: Any) -> None:
    """Ask for the model, on an event loop of its own: connections do not outlive theirs."""
    await answerer.connect()
    await answerer.close()


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


def _questions() -> Iterator[str]:
    """Lines of standard input; with a prompt where somebody sits there."""
    while True:
        if sys.stdin.isatty():
            typer.echo("\n> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
