"""`pilotfish index`: commands that search an index, explain scores, evaluate and tune it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...plugins.cli import strip_control_characters
from ...plugins.config import ConfigError
from ...plugins.terminal import make_table, print_plain
from .options import (
    AsJson,
    EncoderOption,
    Folder,
    K,
    Ray,
    Set,
    Where,
    Word,
    all_filters,
    lines,
    open_any,
    open_whole,
    refusals,
    tell,
    values,
)

asking = typer.Typer()

BAR_WIDTH = 24  # length of the longest bar of an explanation, in characters


@asking.command("search")
def search(
    folder: Folder,
    query: Annotated[
        list[str] | None, typer.Argument(help="Query; without one, queries are read from standard input, one per line.")
    ] = None,
    k: K = 10,
    where: Where = None,
    settings: Set = None,
    word: Word = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
    ray: Ray = None,
) -> None:
    """Search an index for documents."""
    with refusals(), open_any(folder, encoder, ray=ray) as opened:
        options = _settings(settings) | _edits(word)
        for text in [" ".join(query)] if query else lines("query> "):
            hits = opened.search(text, k, all_filters(where), **options)
            if as_json:
                results = [{"id": h.id, "score": h.score, "snippet": h.snippet, "metadata": h.metadata} for h in hits]
                typer.echo(json.dumps({"query": text, "hits": results}, ensure_ascii=False))
            else:
                _show(hits)


@asking.command("explain")
def explain(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="Query text.")],
    document: Annotated[str, typer.Argument(help="Id of the document.")],
    settings: Set = None,
    word: Word = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write an HTML page to this file instead.")] = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
) -> None:
    """Explain the score of a document. Shows which query token or term matched which of the document."""
    with refusals(), open_whole(folder, encoder) as opened:
        options = _settings(settings) | _edits(word)
        reasons, term_weights = (
            opened.explain(query, document, **options),
            opened.term_weights(query, document, **options),
        )
        stored = opened.get(document)
    if page is not None:
        with refusals():
            from .. import explain_html

            page.write_text(
                explain_html.explanation_html(query, document, stored.text, reasons, term_weights), encoding="utf-8"
            )
            tell(f"{page}: open it in a browser")
    if as_json:
        payload = {"reasons": [vars(r) for r in reasons]} | (vars(term_weights) if term_weights is not None else {})
        typer.echo(json.dumps(payload if term_weights is not None else payload["reasons"], ensure_ascii=False))
    elif page is None:
        print_explanation(reasons, term_weights)


@asking.command("eval")
def evaluate(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="BEIR folder with queries.jsonl and qrels.")],
    settings: Set = None,
    as_json: AsJson = False,
    encoder: EncoderOption = None,
) -> None:
    """Measure nDCG@10, Recall@100 and MRR@10 on queries with qrels."""
    with refusals():
        from .. import evaluation, tuning

        test_collection = evaluation.read_collection(collection)
        with open_whole(folder, encoder) as opened:
            metrics = tuning.evaluate_index(opened, test_collection, _settings(settings))
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    for name, value in metrics.items():
        typer.echo(f"{name:16}{value:.4f}" if isinstance(value, float) else f"{name:16}{value}")


@asking.command("tune")
def tune(
    folder: Folder,
    collection: Annotated[Path, typer.Argument(help="BEIR folder; its queries should not be those of your report.")],
    loss: Annotated[float, typer.Option(min=0, max=1, help="nDCG@10 that may be lost for speed.")] = 0.003,
    dry_run: Annotated[bool, typer.Option(help="Print the trials only; do not change the index.")] = False,
    encoder: EncoderOption = None,
) -> None:
    """Tune nprobe and t' on queries with qrels. Stores them in the index."""
    with refusals():
        from .. import evaluation, tuning

        test_collection = evaluation.read_collection(collection)
        with open_whole(folder, encoder) as opened:
            trials = tuning.tune_settings(opened, test_collection)
            best = tuning.fastest_trial(trials, loss)
            for trial in trials:
                mark = "*" if trial is best else " "
                typer.echo(
                    f"{mark} nprobe {trial.nprobe:4}  t' {trial.t_prime:7}  nDCG@10 {trial.ndcg:.4f}  {trial.ms:.2f} ms"
                )
            if not dry_run:
                opened.configure(nprobe=best.nprobe, t_prime=best.t_prime)
                tell(f"{folder}: nprobe={best.nprobe}, t_prime={best.t_prime} from now on")


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    """Return the search settings of ``--set``; see `registry.check_settings`."""
    from ..registry import check_settings

    return check_settings(values(assignments, "--set"))


def _edits(words: list[str] | None) -> dict[str, Any]:
    """Convert ``WORD=FACTOR`` texts to the setting ``term_boosts``.

    Raises:
        ConfigError: A text does not have this form.
    """
    factors = {}
    for assignment in words or []:
        word, equals, factor = assignment.rpartition("=")
        try:
            factors[word] = float(factor)
        except ValueError:
            equals = ""
        if not equals or not word:
            raise ConfigError(f"--word {assignment}: expected WORD=FACTOR, for example shark=2")
    return {"term_boosts": factors} if factors else {}


def _show(hits: list[Any]) -> None:
    from rich.text import Text

    table = make_table("rank", "score", "id", "text", numbers=("rank", "score"))
    for place, hit in enumerate(hits, 1):
        table.add_row(
            str(place),
            f"{hit.score:.4f}",
            Text(strip_control_characters(hit.id)),
            Text(strip_control_characters(hit.snippet)),
        )
    print_plain(table if hits else "nothing found")


def print_explanation(reasons: Sequence[Any], reading: Any | None) -> None:
    """Print a score explanation in a terminal."""
    from rich.text import Text

    def bar(value: float, most: float, style: str = "green") -> Text:
        return Text("█" * max(round(BAR_WIDTH * value / (most or 1.0)), 0), style=style)

    most = max((r.score for r in reasons), default=0.0)
    table = make_table("query", "document", "contribution", numbers=("contribution",))
    table.add_column("", no_wrap=True)
    for r in reasons:
        met = Text("not retrieved, imputed", style="dim") if r.imputed else Text(r.document or "")
        table.add_row(Text(r.query), met, f"{r.score:.4f}", bar(r.score, most, "dim" if r.imputed else "green"))
    table.caption = f"score {sum(r.score for r in reasons):.4f}"
    tables: list[Any] = [table] if reasons else ["this index type has no scores of single tokens or terms"]
    if reading is not None:
        for title, words in (("terms of the query", reading.query), ("terms of the document", reading.document)):
            side = make_table(title, "weight", numbers=("weight",))
            side.add_column("", no_wrap=True)
            for word, weight in words:
                side.add_row(Text(word), f"{weight:.3f}", bar(weight, words[0][1]))
            tables.append(side)
    print_plain(*tables)
