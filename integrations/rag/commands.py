"""`pilotfish rag`: answers from an index and a language model, on the command line or on a web page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer

from ...plugins.cli import extend_group, strip_control_characters
from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ...plugins.terminal import MEASURING, SEARCH
from ...retrieval.cli.index import sync_at_start
from ...retrieval.cli.options import AsJson, Host, SyncOption, Token, Where, all_filters, check_host, lines
from ...retrieval.errors import RetrievalError
from . import eval_command
from .cli_options import RagOptions, rag, rag_command


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Register the plugin."""
    cli.add_typer(rag, name="rag", rich_help_panel=SEARCH)
    extend_group(cli, "bench", eval_command.bench, MEASURING)


@rag_command("ask")
def ask(
    setup: RagOptions,
    arguments: list[str],
    question: Annotated[str, typer.Argument(help="Question to answer.")],
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, with citations and times. With --start, arguments after `--` are passed to the server."""

    async def work() -> None:
        async with contextlib.aclosing(answerer.answer(question, (), all_filters(where))) as events:
            if as_json:
                await _as_json(question, events)
            else:
                await _shown(events)
        await answerer.close()

    if not question.strip():
        raise ConfigError("QUESTION: is empty")
    # A server for one question starts sooner without compilation; `-- --no-enforce-eager` compiles.
    with setup.ready(["--enforce-eager", *arguments] if setup.start else arguments) as answerer:
        asyncio.run(work())


@rag_command("chat")
def chat(setup: RagOptions, arguments: list[str], where: Where = None) -> None:
    """Answer questions from standard input, one per line. Earlier turns are part of the prompt."""
    from . import prompt

    async def work() -> None:
        history: list[prompt.Message] = []
        for question in lines("\n> "):
            try:
                async with contextlib.aclosing(answerer.answer(question, history, all_filters(where))) as events:
                    found, text = await _shown(events)
            except (ConfigError, RetrievalError) as error:  # the next question may succeed
                typer.echo(strip_control_characters(f"\npilotfish: {error}"), err=True)
                continue
            history = prompt.follow_up_question(history, found, question, text)
        await answerer.close()

    with setup.ready(arguments) as answerer:
        asyncio.run(work())


@rag_command("serve")
def serve(
    setup: RagOptions,
    arguments: list[str],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8090,
    token: Token = None,
    read_only: Annotated[bool, typer.Option(help="Disable uploads of documents.")] = False,
    sync: SyncOption = None,
) -> None:
    """Serve a web page that answers questions. The index is created if there is none."""
    check_host(host, token, "others could read and add documents")
    with setup.ready(arguments, make=not read_only) as answerer:
        from ...retrieval import server as serving
        from .server import create_rag_app

        if sync:
            sync_at_start(answerer.index, sync, read_only)
        serving.run_server(create_rag_app(answerer.index, answerer, token, read_only, sync or ()), host, port)


async def _shown(events: AsyncIterator[Any]) -> tuple[Any, str]:
    """Print an answer while it is streamed, then its supporting passages; return the passages and the text."""
    from .answering import AnswerDone, AnswerText, PassagesFound

    passages: Any = ()
    text = ""
    async for event in events:
        match event:
            case PassagesFound():
                passages = event.passages
            case AnswerText():
                typer.echo(strip_control_characters(event.text), nl=False)
            case AnswerDone():
                text = event.text
                typer.echo("")
                _grounds(event, passages)
    return passages, text


def _grounds(done: Any, passages: Any) -> None:
    supporting = set(done.cited) | set(done.attributed)
    if done.cited or done.attributed:
        typer.echo("")
        how = "" if done.cited else "  (by its words; the answer cites no passage)"
        for p in passages:
            if p.number in supporting:
                typer.echo(strip_control_characters(f"[{p.number}] {p.id}: {p.snippet}{how}"))
    elif done.known:
        typer.echo("\n(the answer cites no passage, and no passage contains its words: do not rely on it)")
    if done.ended == "length":
        typer.echo("\n(the answer is cut off; raise --max-tokens for longer answers)")
    elif not done.text:
        typer.echo(f"(the answer is empty; finish reason of the server: {done.ended or 'none'})")
    took = done.milliseconds
    parts = [f"search {took['retrieval']:.0f} ms"]
    if "first_token" in took:
        parts.append(f"first token {took['first_token']:.0f} ms")
    parts.append(f"total {took['total']:.0f} ms")
    if done.tokens:
        parts.append(f"{done.tokens['prompt']} + {done.tokens['answer']} tokens")
    parts += [f"{value} {name.replace('_', ' ')}" for name, value in done.saved.items()]
    typer.echo(", ".join(parts), err=True)


async def _as_json(question: str, events: AsyncIterator[Any]) -> None:
    import json
    from dataclasses import asdict

    from .answering import AnswerDone, PassagesFound

    payload: dict[str, Any] = {"question": question}
    async for event in events:
        if isinstance(event, PassagesFound):
            payload |= {"passages": [asdict(p) for p in event.passages], "similarity": event.similarity}
        elif isinstance(event, AnswerDone):
            payload |= event.as_dict()
    typer.echo(json.dumps(payload, ensure_ascii=False))
