"""`pilotfish datastore`: a corpus of token ids from which drafts are retrieved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ....plugins.config import ConfigError
from ....plugins.hookspecs import hookimpl
from ....plugins.terminal import TUNING

PIECE = 1 << 20  # characters tokenized at once

datastore = typer.Typer(help="Build and inspect a corpus from which drafts are retrieved.", no_args_is_help=True)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(datastore, name="datastore", rich_help_panel=TUNING)


@datastore.command("build")
def build(
    paths: Annotated[list[Path], typer.Argument(help="Text files, or folders of text files.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer is used: a folder, or an embedded model.")],
    out: Annotated[Path, typer.Option(help="Folder to write the datastore to.")] = Path("datastore"),
    suffix: Annotated[
        list[str] | None, typer.Option(help="Read only files with this suffix, e.g. .py; can be repeated.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Maximum number of tokens; sorting needs about 40 bytes of memory per token.")
    ] = 50_000_000,
) -> None:
    """Tokenize texts and build their suffix array. Files that are not UTF-8 text are skipped."""
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
    loaded = corpora.tokenizer_of(registry.resolve_model(tokenizer))
    skipped: list[Path] = []
    with counting_bar() as bar:
        task = bar.add_task("reading", total=len(files))

        def read() -> Iterator[list[int]]:
            for path in files:
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    skipped.append(path)
                else:
                    yield encode_texts(loaded, text)
                bar.advance(task)
            bar.update(task, description="sorting")

        try:
            about = store.build_datastore(
                out, read(), tokenizer, store.vocabulary_fingerprint(loaded.get_vocab()), max_tokens
            )
        except store.DatastoreError as error:
            raise ConfigError(str(error)) from None
    if skipped:
        console.print(f"skipped {len(skipped)} files that are not UTF-8 text, the first is {skipped[0]}", markup=False)
    if about.tokens >= max_tokens - 1:
        console.print(f"--max-tokens {max_tokens} is reached: stored {about.texts} of {len(files)} files", markup=False)
    console.print(f"written to {out}: {about.texts} texts, {about.tokens} tokens", markup=False)


@datastore.command("info")
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of a datastore.")],
    verify: Annotated[bool, typer.Option(help="Read all files and verify their checksums.")] = False,
) -> None:
    """Print the contents of a datastore. Exit with code 2 if it is damaged."""
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
    """Return all files with one of the endings, those of folders sorted by name and without hidden ones.

    Raises:
        ConfigError: A path does not exist, or there are no such files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise ConfigError(f"{path}: no such file or folder")
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    files = [path for path in files if not endings or path.name.endswith(endings)]
    if not files:
        raise ConfigError(f"{', '.join(map(str, paths))}: no files{' with this suffix' if endings else ''}")
    return files


def encode_texts(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, which is tokenized in pieces that end at line breaks."""
    ids: list[int] = []
    begin = 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + PIECE) + 1 if begin + PIECE < len(text) else len(text)
        if end <= begin:  # one long line
            end = begin + PIECE
        ids += tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        begin = end
    return ids
