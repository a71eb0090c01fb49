"""`pilotfish index`: build, change, serve and look after an index; see `asking_commands` for the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.cli import extend_group
from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ..validation import CHUNK_TOKENS, OVERLAP
from .options import (
    AsJson,
    Chunk,
    Device,
    EncoderOption,
    Folder,
    Host,
    NumberIds,
    Overlap,
    Paths,
    Precision,
    Ray,
    Token,
    Where,
    check_host,
    open_any,
    open_whole,
    refusals,
    tell,
    values,
    with_bar,
)
from .search import asking

index = typer.Typer(help="Put documents into an index, and find them again.", no_args_is_help=True)

USUAL = "xtr"  # kind of index


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    extend_group(cli, "index", index)
    extend_group(cli, "index", asking)


@index.command("build")
def build(
    folder: Folder,
    paths: Paths,
    kind: Annotated[
        str | None, typer.Option(help="A kind of index, xtr where nothing is said; see `pilotfish plugins`.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of that kind, NAME=VALUE; may be repeated.")
    ] = None,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    chunk_tokens: Chunk = CHUNK_TOKENS,
    overlap: Overlap = OVERLAP,
    number_ids: NumberIds = False,
    resume: Annotated[bool, typer.Option(help="Go on with a build that was interrupted.")] = False,
    shards: Annotated[int, typer.Option(min=1, max=4096, help="Partition the documents into so many indexes.")] = 1,
    ray: Ray = None,
) -> None:
    """Make an index of documents."""
    with refusals():
        from ..index import Index
        from ..store.manifest import CURRENT

        if shards > 1 or ray is not None:
            if resume:
                raise ConfigError("--resume: a build of shards is begun anew")
            if (device, precision) != ("auto", "float32"):
                raise ConfigError("--device, --precision: a build of shards has auto and float32 only")
            _build_shards(folder, paths, shards, kind or USUAL, encoder, option, chunk_tokens, overlap, number_ids, ray)
            return

        if resume and (folder / CURRENT).exists():
            opened = Index.open(folder, encoder, device, precision)
            if kind not in (None, opened.kind.name):
                raise ConfigError(f"--kind {kind}: {folder} is of kind {opened.kind.name}")
        else:
            _source(paths, lambda text: [text], number_ids)  # refuse before anything is made
            _chunks_fit(chunk_tokens, overlap)
            opened = Index.create(folder, kind or USUAL, encoder, values(option, "--option"), device, precision)
        with opened as made:
            source = _source(paths, _chunker(made, chunk_tokens, overlap), number_ids)
            count = with_bar(lambda told: (made.resume if resume else made.add)(source, told))
            if len(made) == count and made.stats()["segments"] > 1:
                made.compact()
            tell(f"{folder}: {count} documents added, {len(made)} in all")


@index.command("add")
def add(
    folder: Folder,
    paths: Paths,
    upsert: Annotated[bool, typer.Option(help="Replace documents whose ids are there already.")] = False,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    chunk_tokens: Chunk = CHUNK_TOKENS,
    overlap: Overlap = OVERLAP,
    number_ids: NumberIds = False,
) -> None:
    """Add documents; searches go on meanwhile."""
    with refusals(), open_whole(folder, encoder, device, precision) as opened:
        source = _source(paths, _chunker(opened, chunk_tokens, overlap), number_ids)
        count = with_bar(lambda told: (opened.upsert if upsert else opened.add)(source, told))
        tell(f"{folder}: {count} documents added, {len(opened)} in all")


@index.command("delete")
def delete(
    folder: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    where: Where = None,
) -> None:
    """Delete documents by id or by a filter."""
    if not ids and where is None:
        raise ConfigError("delete: name ids, or give --where FILTER")
    with refusals(), open_whole(folder) as opened:
        count = opened.delete(ids or [], where)
        tell(f"{folder}: {count} documents deleted, {len(opened)} left")


@index.command("stats")
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Say what an index holds."""
    with refusals(), open_any(folder) as opened:
        found = opened.stats()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        shown = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{name:20}{shown}")


@index.command("check")
def check(folder: Folder) -> None:
    """Read all of an index and compare checksums; exit code 2 if it is damaged."""
    with refusals():
        from .. import shards

        parts = [folder / name for name in shards.read_shards(folder)] if shards.is_sharded(folder) else [folder]
        documents = 0
        for part in parts:
            with open_whole(part) as opened:
                opened.check()
                documents += len(opened)
        typer.echo(f"{folder}: {documents} documents, all right")


@index.command("compact")
def compact(
    folder: Folder,
    relearn: Annotated[
        bool, typer.Option(help="Encode all anew, and learn from it: for an index that has grown manyfold.")
    ] = False,
    encoder: EncoderOption = None,
) -> None:
    """Write an index anew without what was deleted."""
    with refusals(), open_whole(folder, encoder) as opened:
        with_bar(lambda told: opened.compact(relearn, told) or 0)
        tell(f"{folder}: {len(opened)} documents in {opened.stats()['segments']} segments")


@index.command("export")
def export(folder: Folder, out: Annotated[Path, typer.Argument(help="The file of the FAISS index.")]) -> None:
    """Write the tokens as a plain FAISS index, and beside it which document each is of."""
    with refusals(), open_whole(folder) as opened:
        from ..xtr import export as exporting

        tokens = exporting.export_to_faiss(opened, out)
        tell(f"{out}: {tokens} vectors; documents in {out}.documents.jsonl")


@index.command("serve")
def serve(
    folder: Folder,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8080,
    token: Token = None,
    read_only: Annotated[bool, typer.Option(help="Take no documents.")] = False,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    ray: Ray = None,
) -> None:
    """Serve an index over HTTP: search, add, delete, health, metrics, and an OpenAPI page."""
    with refusals():
        from .. import server

        check_host(host, token, "others could change the index")
        with open_any(folder, encoder, device, precision, ray) as opened:
            _ = getattr(opened, "encoder", None)  # a wrong one is refused now, not at the first question
            server.run_server(server.create_index_app(opened, token, read_only), host, port)


def _build_shards(
    folder: Path,
    paths: list[str],
    count: int,
    kind: str,
    encoder: str | None,
    option: list[str] | None,
    chunk_tokens: int,
    overlap: int,
    number_ids: bool,
    ray: str | None,
) -> None:
    from .. import shards
    from ..registry import resolve_encoder, resolve_index_kind

    _chunks_fit(chunk_tokens, overlap)
    given = values(option, "--option")
    made_of, _ = resolve_index_kind(kind, given)
    loaded = resolve_encoder(made_of, encoder or made_of.default_encoder, "auto", "float32")
    source = _source(paths, lambda text: loaded.chunks(text, chunk_tokens, overlap), number_ids)
    made = with_bar(lambda told: shards.build_shards(folder, source, count, kind, encoder, given, ray, told))
    tell(f"{folder}: {made} documents in {count} shards")


def _chunks_fit(size: int, overlap: int) -> None:
    if overlap >= size:
        raise ConfigError(f"--overlap {overlap}: has to be less than --chunk-tokens {size}")


def _chunker(opened: Any, size: int, overlap: int) -> Callable[[str], list[str]]:
    _chunks_fit(size, overlap)
    return lambda text: opened.encoder.chunks(text, size, overlap)


def _source(paths: list[str], chunk: Callable[[str], list[str]], number_ids: bool) -> Any:
    from ..loaders import DocumentSource

    return DocumentSource(paths, chunk, number_ids)
