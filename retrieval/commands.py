"""`pilotfish index`: build, change, search and look after an index."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..plugins.cli import harmless
from ..plugins.config import ConfigError
from ..plugins.hookspecs import hookimpl
from .cli import (
    AsJson,
    Chunk,
    Device,
    EncoderOption,
    Folder,
    Host,
    K,
    NumberIds,
    Overlap,
    Paths,
    Precision,
    Ray,
    Set,
    Token,
    Where,
    Word,
    check_host,
    lines,
    refusals,
    tell,
    values,
    with_bar,
)
from .incoming import CHUNK_TOKENS, OVERLAP

index = typer.Typer(help="Put documents into an index, and find them again.", no_args_is_help=True)

USUAL = "xtr"  # kind of index


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the commands."""
    cli.add_typer(index, name="index")


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
        from .index import Index
        from .store.manifest import CURRENT

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
    with refusals(), _opened(folder, encoder, device, precision) as opened:
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
    with refusals(), _opened(folder) as opened:
        count = opened.delete(ids or [], where)
        tell(f"{folder}: {count} documents deleted, {len(opened)} left")


@index.command("search")
def search(
    folder: Folder,
    query: Annotated[
        list[str] | None, typer.Argument(help="What to look for; without, queries are read line by line.")
    ] = None,
    k: K = 10,
    where: Where = None,
    settings: Set = None,
    word: Word = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
    ray: Ray = None,
) -> None:
    """Find documents."""
    with refusals(), _for_reading(folder, encoder, ray=ray) as opened:
        given = _settings(settings) | _edits(word)
        for text in [" ".join(query)] if query else lines("query> "):
            hits = opened.search(text, k, where, **given)
            if as_json:
                found = [{"id": h.id, "score": h.score, "snippet": h.snippet, "metadata": h.metadata} for h in hits]
                typer.echo(json.dumps({"query": text, "hits": found}, ensure_ascii=False))
            else:
                _show(hits)


@index.command("explain")
def explain(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="A query.")],
    document: Annotated[str, typer.Argument(help="The id of a document.")],
    settings: Set = None,
    word: Word = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page here instead.")] = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
) -> None:
    """Show why a document has its score: what of the query met what of it."""
    with refusals(), _opened(folder, encoder) as opened:
        given = _settings(settings) | _edits(word)
        reasons, reading = opened.explain(query, document, **given), opened.reading(query, document, **given)
        found = opened.get(document)
    from . import pages

    if page is not None:
        with refusals():
            page.write_text(pages.explanation(query, document, found.text, reasons, reading), encoding="utf-8")
            tell(f"{page}: open it in a browser")
    if as_json:
        told = {"reasons": [vars(r) for r in reasons]} | (vars(reading) if reading is not None else {})
        typer.echo(json.dumps(told if reading is not None else told["reasons"], ensure_ascii=False))
    elif page is None:
        pages.show(reasons, reading)


@index.command("eval")
def evaluate(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="A BEIR folder with queries.jsonl and qrels.")],
    settings: Set = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
) -> None:
    """Measure nDCG@10, Recall@100 and MRR@10 on judged queries."""
    with refusals():
        from . import evaluation, tuning

        judged = evaluation.read(collection)
        with _opened(folder, encoder) as opened:
            found = tuning.evaluate(opened, judged, _settings(settings))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        typer.echo(f"{name:16}{value:.4f}" if isinstance(value, float) else f"{name:16}{value}")


@index.command("tune")
def tune(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="A BEIR folder whose queries are not those you will report.")],
    loss: Annotated[float, typer.Option(min=0, max=1, help="nDCG@10 that may be lost for speed.")] = 0.003,
    dry_run: Annotated[bool, typer.Option(help="Only tell.")] = False,
    encoder: EncoderOption = None,
) -> None:
    """Find how many lists to read, and what to impute, on judged queries; the index keeps it."""
    with refusals():
        from . import evaluation, tuning

        judged = evaluation.read(collection)
        with _opened(folder, encoder) as opened:
            tried = tuning.tune(opened, judged)
            best = tuning.choose(tried, loss)
            for trial in tried:
                mark = "*" if trial is best else " "
                typer.echo(
                    f"{mark} probes {trial.probes:4}  until {trial.until:7}  "
                    f"nDCG@10 {trial.ndcg:.4f}  {trial.ms:.2f} ms"
                )
            if not dry_run:
                opened.configure(probes=best.probes, until=best.until)
                tell(f"{folder}: probes={best.probes}, until={best.until} from now on")


@index.command("stats")
def stats(folder: Folder, as_json: AsJson = False) -> None:
    """Say what an index holds."""
    with refusals(), _for_reading(folder) as opened:
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
        from . import shards

        parts = [folder / name for name in shards.read(folder)] if shards.there(folder) else [folder]
        documents = 0
        for part in parts:
            with _opened(part) as opened:
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
    with refusals(), _opened(folder, encoder) as opened:
        with_bar(lambda told: opened.compact(relearn, told) or 0)
        tell(f"{folder}: {len(opened)} documents in {opened.stats()['segments']} segments")


@index.command("export")
def export(folder: Folder, out: Annotated[Path, typer.Argument(help="The file of the FAISS index.")]) -> None:
    """Write the tokens as a plain FAISS index, and beside it which document each is of."""
    with refusals(), _opened(folder) as opened:
        from .xtr import export as exporting

        tokens = exporting.write(opened, out)
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
        from . import server

        check_host(host, token, "others could change the index")
        with _for_reading(folder, encoder, device, precision, ray) as opened:
            _ = getattr(opened, "encoder", None)  # a wrong one is refused now, not at the first question
            server.run(server.create_app(opened, token, read_only), host, port)


# ------------------------------------------------------------------------------------------------------------ helpers


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """Of ``--set``; see `kinds.checked_settings`."""
    from .kinds import checked_settings

    return checked_settings(values(assignments, "--set"))


def _edits(words: list[str] | None) -> dict[str, Any]:
    """``WORD=FACTOR`` texts as the setting ``words``.

    Raises:
        ConfigError: one is of another form.
    """
    factors = {}
    for given in words or []:
        word, equals, factor = given.rpartition("=")
        try:
            factors[word] = float(factor)
        except ValueError:
            equals = ""
        if not equals or not word:
            raise ConfigError(f"--word {given}: expected WORD=FACTOR, as shark=2")
    return {"words": factors} if factors else {}


@contextlib.contextmanager
def _opened(
    folder: Path, encoder: str | None = None, device: str = "auto", precision: str = "float32"
) -> Iterator[Any]:
    from . import shards
    from .index import Index

    if shards.there(folder):
        raise ConfigError(f"{folder}: is in shards, which are built, searched and served only; see docs/indexes.md")
    with Index.open(folder, encoder, device, precision) as opened:
        yield opened


@contextlib.contextmanager
def _for_reading(
    folder: Path,
    encoder: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    ray: str | None = None,
) -> Iterator[Any]:
    """An index, or shards."""
    from . import shards

    if ray is None and not shards.there(folder):
        with _opened(folder, encoder, device, precision) as opened:
            yield opened
        return
    if (encoder, device, precision) != (None, "auto", "float32"):
        raise ConfigError("--encoder, --device, --precision: shards are read as they were built")
    with shards.ShardedIndex(folder, ray) as opened:
        yield opened


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
    from . import shards
    from .kinds import encoder_of, kind_of

    _chunks_fit(chunk_tokens, overlap)
    given = values(option, "--option")
    made_of, _ = kind_of(kind, given)
    loaded = encoder_of(made_of, encoder or made_of.default_encoder, "auto", "float32")
    source = _source(paths, lambda text: loaded.chunks(text, chunk_tokens, overlap), number_ids)
    made = with_bar(lambda told: shards.build(folder, source, count, kind, encoder, given, ray, told))
    tell(f"{folder}: {made} documents in {count} shards")


def _chunks_fit(size: int, overlap: int) -> None:
    if overlap >= size:
        raise ConfigError(f"--overlap {overlap}: has to be less than --chunk-tokens {size}")


def _chunker(opened: Any, size: int, overlap: int) -> Callable[[str], list[str]]:
    _chunks_fit(size, overlap)
    return lambda text: opened.encoder.chunks(text, size, overlap)


def _source(paths: list[str], chunk: Callable[[str], list[str]], number_ids: bool) -> Any:
    from .inputs import Source

    return Source(paths, chunk, number_ids)


def _show(hits: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "score", "id", "text")
    for place, hit in enumerate(hits, 1):
        table.add_row(str(place), f"{hit.score:.4f}", Text(harmless(hit.id)), Text(harmless(hit.snippet)))
    Console().print(table if hits else "nothing found")
