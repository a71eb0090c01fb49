"""`pilotfish datastore`: a corpus of texts as token ids, from which drafts are retrieved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ....plugins.config import ConfigError
from ....plugins.hookspecs import hookimpl

PIECE = 1 << 20  # characters that are tokenised at once

datastore = typer.Typer(help="A corpus of texts from which drafts are retrieved.", no_args_is_help=True)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(datastore, name="datastore")


@datastore.command("build")
def build(
    paths: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    tokenizer: Annotated[str, typer.Option(help="The model whose tokens are stored: a folder, or an embedded model.")],
    out: Annotated[Path, typer.Option(help="The folder of the datastore.")] = Path("datastore"),
    suffix: Annotated[
        list[str] | None, typer.Option(help="Take only files with such an ending, .py; may be repeated.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens at most; sorting takes about 40 bytes of memory for each.")
    ] = 50_000_000,
) -> None:
    """Tokenise texts and sort what follows what; files that are no UTF-8 text are passed over."""
    from ....plugins.drafting import datastore as store
    from ..bench import corpora
    from ..models import registry
    from ..serving.command import check_model
    from ..serving.progress import console, counting_bar

    try:
        store.check_datastore_path(out)
    except store.DatastoreError as error:
        raise ConfigError(f"--out {error}") from None
    check_model(tokenizer)
    files = find(paths, tuple(suffix or ()))
    found = corpora.tokenizer_of(registry.resolve_model(tokenizer))
    passed: list[Path] = []
    with counting_bar() as bar:
        task = bar.add_task("reading", total=len(files))

        def read() -> Iterator[list[int]]:
            for path in files:
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    passed.append(path)
                else:
                    yield encode_texts(found, text)
                bar.advance(task)
            bar.update(task, description="sorting")

        try:
            about = store.build_datastore(
                out, read(), tokenizer, store.vocabulary_fingerprint(found.get_vocab()), max_tokens
            )
        except store.DatastoreError as error:
            raise ConfigError(str(error)) from None
    if passed:
        console.print(f"passed over {len(passed)} files that are no UTF-8 text, {passed[0]} first", markup=False)
    if about.tokens >= max_tokens - 1:
        console.print(f"--max-tokens {max_tokens} is reached: {about.texts} of {len(files)} files are in", markup=False)
    console.print(f"written to {out}: {about.texts} texts, {about.tokens} tokens", markup=False)


@datastore.command("info")
def info(
    folder: Annotated[Path, typer.Argument(help="The folder of a datastore.")],
    verify: Annotated[bool, typer.Option(help="Read all of it, and compare checksums.")] = False,
) -> None:
    """Say what a datastore holds; exit code 2 if it is damaged."""
    from ....plugins.drafting.datastore import Datastore, DatastoreError

    try:
        about = Datastore(folder, verify).info
    except DatastoreError as error:
        raise ConfigError(str(error)) from None
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"tokenizer  {about.tokenizer} ({about.fingerprint})")
    typer.echo(f"texts      {about.texts}")
    typer.echo(f"tokens     {about.tokens}")
    typer.echo(f"size       {size / 2**20:.1f} MiB")
    if verify:
        typer.echo("checksums  right")


def find(paths: list[Path], endings: tuple[str, ...]) -> list[Path]:
    """All files, those of folders in the order of their names; hidden ones of folders are left out.

    Raises:
        ConfigError: a path does not exist, or nothing is left.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise ConfigError(f"{path}: no such file or folder")
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    found = [path for path in found if not endings or path.name.endswith(endings)]
    if not found:
        raise ConfigError(f"{', '.join(map(str, paths))}: no files{' with such an ending' if endings else ''}")
    return found


def encode_texts(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, cut at the ends of lines so that no piece is long."""
    ids: list[int] = []
    begin = 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + PIECE) + 1 if begin + PIECE < len(text) else len(text)
        if end <= begin:  # one long line
            end = begin + PIECE
        ids += tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        begin = end
    return ids
