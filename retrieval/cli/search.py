"""`pilotfish index`: search an index, ask why and how well it finds, and tune it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.cli import strip_control_characters
from ...plugins.config import ConfigError
from .options import (
    AsJson,
    EncoderOption,
    Folder,
    K,
    Ray,
    Set,
    Where,
    Word,
    lines,
    open_any,
    open_whole,
    refusals,
    tell,
    values,
)

asking = typer.Typer()


@asking.command("search")
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
    with refusals(), open_any(folder, encoder, ray=ray) as opened:
        given = _settings(settings) | _edits(word)
        for text in [" ".join(query)] if query else lines("query> "):
            hits = opened.search(text, k, where, **given)
            if as_json:
                found = [{"id": h.id, "score": h.score, "snippet": h.snippet, "metadata": h.metadata} for h in hits]
                typer.echo(json.dumps({"query": text, "hits": found}, ensure_ascii=False))
            else:
                _show(hits)


@asking.command("explain")
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
    with refusals(), open_whole(folder, encoder) as opened:
        given = _settings(settings) | _edits(word)
        reasons, reading = opened.explain(query, document, **given), opened.term_weights(query, document, **given)
        found = opened.get(document)
    from .. import explain_html

    if page is not None:
        with refusals():
            page.write_text(
                explain_html.explanation_html(query, document, found.text, reasons, reading), encoding="utf-8"
            )
            tell(f"{page}: open it in a browser")
    if as_json:
        told = {"reasons": [vars(r) for r in reasons]} | (vars(reading) if reading is not None else {})
        typer.echo(json.dumps(told if reading is not None else told["reasons"], ensure_ascii=False))
    elif page is None:
        explain_html.print_explanation(reasons, reading)


@asking.command("eval")
def evaluate(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="A BEIR folder with queries.jsonl and qrels.")],
    settings: Set = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
) -> None:
    """Measure nDCG@10, Recall@100 and MRR@10 on judged queries."""
    with refusals():
        from .. import evaluation, tuning

        judged = evaluation.read_collection(collection)
        with open_whole(folder, encoder) as opened:
            found = tuning.evaluate_index(opened, judged, _settings(settings))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        typer.echo(f"{name:16}{value:.4f}" if isinstance(value, float) else f"{name:16}{value}")


@asking.command("tune")
def tune(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="A BEIR folder whose queries are not those you will report.")],
    loss: Annotated[float, typer.Option(min=0, max=1, help="nDCG@10 that may be lost for speed.")] = 0.003,
    dry_run: Annotated[bool, typer.Option(help="Only tell.")] = False,
    encoder: EncoderOption = None,
) -> None:
    """Find how many lists to read, and what to impute, on judged queries; the index keeps it."""
    with refusals():
        from .. import evaluation, tuning

        judged = evaluation.read_collection(collection)
        with open_whole(folder, encoder) as opened:
            tried = tuning.tune_settings(opened, judged)
            best = tuning.fastest_trial(tried, loss)
            for trial in tried:
                mark = "*" if trial is best else " "
                typer.echo(
                    f"{mark} nprobe {trial.nprobe:4}  t' {trial.t_prime:7}  nDCG@10 {trial.ndcg:.4f}  {trial.ms:.2f} ms"
                )
            if not dry_run:
                opened.configure(nprobe=best.nprobe, t_prime=best.t_prime)
                tell(f"{folder}: nprobe={best.nprobe}, t_prime={best.t_prime} from now on")


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """Of ``--set``; see `kinds.checked_settings`."""
    from ..registry import check_settings

    return check_settings(values(assignments, "--set"))


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
    return {"term_boosts": factors} if factors else {}


def _show(hits: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "score", "id", "text")
    for place, hit in enumerate(hits, 1):
        table.add_row(
            str(place),
            f"{hit.score:.4f}",
            Text(strip_control_characters(hit.id)),
            Text(strip_control_characters(hit.snippet)),
        )
    Console().print(table if hits else "nothing found")
