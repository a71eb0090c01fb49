"""`pilotfish index`: commands that build, change, maintain and serve an index; see `cli.search` for the others."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.cli import extend_group, strip_control_characters
from ...plugins.config import ConfigError
from ...plugins.hookspecs import hookimpl
from ...plugins.terminal import SEARCH, make_table, print_plain
from ..defaults import CHUNK_TOKENS, LOCK_TIMEOUT, OVERLAP
from .options import (
    AsJson,
    BadFiles,
    Chunk,
    Device,
    EncoderOption,
    Folder,
    Host,
    Ignore,
    LockTimeout,
    NumberIds,
    Overlap,
    Paths,
    Precision,
    Ray,
    SyncOption,
    SyncPaths,
    Token,
    Where,
    all_filters,
    check_host,
    open_any,
    open_whole,
    refusals,
    tell,
    values,
    with_bar,
)
from .search import asking

index = typer.Typer(help="Build, search and serve document indexes.", no_args_is_help=True)

USUAL = "xtr"  # default index type


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Register the group of commands."""
    extend_group(cli, "index", index, SEARCH)
    extend_group(cli, "index", asking, SEARCH)


@index.command("build")
def build(
    folder: Folder,
    paths: Paths,
    kind: Annotated[str | None, typer.Option(help="Index type, xtr by default; see `pilotfish plugins`.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the index type, NAME=VALUE; repeatable.")] = None,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    chunk_tokens: Chunk = CHUNK_TOKENS,
    overlap: Overlap = OVERLAP,
    number_ids: NumberIds = False,
    bad_files: BadFiles = "skip",
    ignore: Ignore = None,
    resume: Annotated[bool, typer.Option(help="Resume an interrupted build.")] = False,
    shards: Annotated[int, typer.Option(min=1, max=4096, help="Number of shards; documents are partitioned.")] = 1,
    ray: Ray = None,
) -> None:
    """Build an index of documents."""
    with refusals():
        from ..build import build_folder
        from ..index import Index
        from ..loaders import Chunker
        from ..shards import build_shards, shard_encoder
        from ..store.manifest import CURRENT

        source = _source(paths, number_ids, bad_files, ignore)
        _chunks_fit(chunk_tokens, overlap)
        if shards > 1 or ray is not None:
            if resume:
                raise ConfigError("--resume: a build of shards cannot be resumed; build into a new folder")
            if (device, precision) != ("auto", "float32"):
                raise ConfigError("--device, --precision: a build of shards supports only auto and float32")
            with build_folder(folder) as partial:
                options = values(option, "--option")
                loaded = shard_encoder(kind or USUAL, encoder, options)
                source.chunk = Chunker(lambda: loaded, chunk_tokens, overlap)
                added = with_bar(
                    lambda progress: build_shards(
                        partial, source, shards, kind or USUAL, encoder, options, ray, progress
                    )
                )
            _tell_skipped(source)
            tell(f"{folder}: {added} documents in {shards} shards")
            return

        complete = resume and (folder / CURRENT).exists()
        with contextlib.nullcontext(folder) if complete else build_folder(folder, resume) as place:
            if resume and (place / CURRENT).exists():
                opened = Index.open(place, encoder, device, precision)
            else:
                opened = Index.create(place, kind or USUAL, encoder, values(option, "--option"), device, precision)
            with opened as built:
                if kind not in (None, built.kind.name):
                    raise ConfigError(f"--kind {kind}: {folder} is of kind {built.kind.name}")
                source.chunk = Chunker(lambda: built.encoder, chunk_tokens, overlap)
                count = with_bar(lambda progress: (built.resume if resume else built.add)(source, progress))
                if not len(built):
                    raise ConfigError(f"{', '.join(paths)}: no documents")
                if len(built) == count and built.stats()["segments"] > 1:
                    built.compact()
                total = len(built)
        _tell_skipped(source)
        tell(f"{folder}: {count} documents added, {total} in all")


@index.command("add")
def add(
    folder: Folder,
    paths: Paths,
    upsert: Annotated[bool, typer.Option(help="Replace documents whose ids are in the index already.")] = False,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    chunk_tokens: Chunk = CHUNK_TOKENS,
    overlap: Overlap = OVERLAP,
    number_ids: NumberIds = False,
    bad_files: BadFiles = "skip",
    ignore: Ignore = None,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Add documents, or files again; searches continue meanwhile.

    The documents of a file replace all that the index has of that file.
    """
    with refusals(), open_whole(folder, encoder, device, precision, lock_timeout) as opened:
        from ..loaders import Chunker

        source = _source(paths, number_ids, bad_files, ignore)
        _chunks_fit(chunk_tokens, overlap)
        source.chunk = Chunker(lambda: opened.encoder, chunk_tokens, overlap)
        count = with_bar(lambda progress: (opened.upsert if upsert else opened.add)(source, progress))
        _tell_skipped(source)
        tell(f"{folder}: {count} documents added, {len(opened)} in all")


@index.command("sync")
def sync(
    folder: Folder,
    paths: SyncPaths,
    dry_run: Annotated[bool, typer.Option(help="Print the differences, and leave the index as it is.")] = False,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    chunk_tokens: Chunk = CHUNK_TOKENS,
    overlap: Overlap = OVERLAP,
    number_ids: NumberIds = False,
    bad_files: BadFiles = "skip",
    ignore: Ignore = None,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Make the files of an index those of PATHS, in one commit.

    Adds new files, replaces changed ones, and deletes the documents of files that no longer exist. Documents that were
    not read from a file stay.
    """
    with refusals(), open_whole(folder, encoder, device, precision, lock_timeout) as opened:
        _chunks_fit(chunk_tokens, overlap)
        report = with_bar(
            lambda progress: opened.sync(
                paths,
                chunk_tokens,
                overlap,
                number_ids,
                bad_files == "skip",
                ignore or (),
                dry_run,
                progress,
            )
        )
        total = len(opened)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "documents": total}))
        return
    if dry_run:
        for change in ("added", "changed", "removed"):
            for name in getattr(report, change):
                typer.echo(strip_control_characters(f"{change:8}{name}"))
    _tell_skipped(report)
    tell(f"{folder}: {report}" + ("; nothing was written" if dry_run else f", {total} in all"))


@index.command("delete")
def delete(
    folder: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    where: Where = None,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Delete documents by id or by a filter."""
    if not ids and not where:
        raise ConfigError("delete: name ids, or give --where FILTER")
    with refusals(), open_whole(folder, lock_timeout=lock_timeout) as opened:
        count = opened.delete(ids or [], all_filters(where))
        tell(f"{folder}: {count} documents deleted, {len(opened)} left")


@index.command("stats")
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Show the contents and sizes of an index."""
    with refusals(), open_any(folder) as opened:
        statistics = opened.stats()
    if as_json:
        typer.echo(json.dumps(statistics))
        return
    print_statistics(statistics)


def print_statistics(statistics: dict[str, Any]) -> None:
    """Print the statistics of an index as a table."""
    table = make_table("statistic", "value")
    for name, value in statistics.items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(name, str(text))
    print_plain(table)


@index.command("check")
def check(folder: Folder) -> None:
    """Read all files of an index and compare checksums. Exit with code 2 if it is damaged."""
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
    retrain: Annotated[
        bool, typer.Option(help="Encode all documents again and retrain; for an index that has grown manyfold.")
    ] = False,
    encoder: EncoderOption = None,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Rewrite an index without deleted documents."""
    with refusals(), open_whole(folder, encoder, lock_timeout=lock_timeout) as opened:
        with_bar(lambda progress: opened.compact(retrain, progress) or 0)
        tell(f"{folder}: {len(opened)} documents in {opened.stats()['segments']} segments")


@index.command("export")
def export(folder: Folder, out: Annotated[Path, typer.Argument(help="File of the FAISS index.")]) -> None:
    """Export the token vectors to a FAISS index. The document ids of the vectors go to a file next to it."""
    with refusals(), open_whole(folder) as opened:
        from ..xtr import export as exporting

        tokens = exporting.export_to_faiss(opened, out)
        tell(f"{out}: {tokens} vectors; documents in {out}.documents.jsonl")


@index.command("serve")
def serve(
    folder: Folder,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8080,
    token: Token = None,
    read_only: Annotated[bool, typer.Option(help="Do not add or delete documents.")] = False,
    encoder: EncoderOption = None,
    device: Device = "auto",
    precision: Precision = "float32",
    sync: SyncOption = None,
    ray: Ray = None,
) -> None:
    """Serve an index over HTTP. Endpoints: search, add, delete, sync, health, metrics, and an OpenAPI page."""
    with refusals():
        from .. import server

        check_host(host, token, "others could change the index")
        with open_any(folder, encoder, device, precision, ray) as opened:
            _ = getattr(opened, "encoder", None)  # reports a wrong encoder before the first query
            if sync:
                sync_at_start(opened, sync, read_only)
            server.run_server(server.create_index_app(opened, token, read_only, sync or ()), host, port)


def sync_at_start(opened: Any, paths: list[str], read_only: bool) -> None:
    """Synchronize the index of a server with files before it listens.

    Raises:
        ConfigError: The server is read-only, or the index is sharded.
    """
    from ..index import Index

    if read_only or not isinstance(opened, Index):
        raise ConfigError("--sync: changes the index, which is " + ("read-only" if read_only else "sharded"))
    report = with_bar(lambda progress: opened.sync(paths, progress=progress))
    _tell_skipped(report)
    tell(f"{opened.folder}: {report}")


def _chunks_fit(size: int, overlap: int) -> None:
    if overlap >= size:
        raise ConfigError(f"--overlap {overlap}: has to be less than --chunk-tokens {size}")


def _source(paths: list[str], number_ids: bool, bad_files: str, ignore: list[str] | None) -> Any:
    """Find the files; with ``--bad-files stop``, read all of them, so that a bad one is reported before any change."""
    from ..loaders import DocumentSource

    source = DocumentSource(paths, lambda text: [text], number_ids, bad_files == "skip", ignore or ())
    if bad_files == "stop":
        source.check()
    return source


def _tell_skipped(source: Any) -> None:
    """Report files that were skipped, wholly or in part."""
    for reason in source.skipped.values():
        tell(strip_control_characters(f"skipped {' '.join(reason.split())}"))
