"""Score explanations as bar charts: in a terminal, and as one self-contained HTML page."""

import html
from collections.abc import Sequence
from typing import Any

WIDTH = 24  # length of the longest bar in a terminal, in characters

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1c2430;
  background: #fff }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin-bottom: .4rem }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 2rem }
table { border-collapse: collapse; width: 100% } td { padding: .1rem .4rem; white-space: nowrap }
td.bar { width: 60%; min-width: 5rem } td.value { text-align: right; font-variant-numeric: tabular-nums }
.bar div { background: #2a78b8; height: .8rem; border-radius: 2px } .imputed div { background: #b6bec9 }
blockquote { border-left: 3px solid #d5dbe3; margin: 0; padding-left: 1rem; white-space: pre-wrap }
@media (prefers-color-scheme: dark) { body { background: #14181f; color: #dde3ea } .bar div { background: #5aa9e6 } }
"""


def explanation_html(query: str, name: str, text: str, reasons: Sequence[Any], reading: Any | None) -> str:
    """Return the HTML page that explains a score.

    Args:
        query: Query text.
        name: Id of the document.
        text: Text of the document; it is escaped.
        reasons: Parts of the score: objects of `plugins.contracts.ScoreExplanation`.
        reading: Term weights of query and document (`plugins.contracts.TermWeights`), or None.
    """
    shared = [
        (r.query if r.query == r.document else f"{r.query} → {r.document or 'imputed'}", r.score, r.imputed)
        for r in reasons
    ]
    columns = [_column("Contributions to the score", shared)]
    if reading is not None:
        columns = [
            _column("Terms of the query", [(w, v, False) for w, v in reading.query]),
            _column("Shared terms, products of weights", shared),
            _column("Terms of the document", [(w, v, False) for w, v in reading.document]),
        ]
    score = sum(r.score for r in reasons)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(query)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(query)}</h1><p>Document <b>{html.escape(name)}</b>, score {score:.4f}</p>"
        f"<blockquote>{html.escape(text)}</blockquote>"
        f'<div class="columns">{"".join(columns)}</div></body></html>\n'
    )


def _column(title: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    body = "".join(
        f'<tr class="{"imputed" if imputed else "found"}"><td>{html.escape(word)}</td>'
        f'<td class="bar"><div style="width:{max(100 * value / most, 0):.1f}%"></div></td>'
        f'<td class="value">{value:.3f}</td></tr>'
        for word, value, imputed in rows
    )
    return f"<section><h2>{title}</h2><table>{body or '<tr><td>nothing</td></tr>'}</table></section>"


def print_explanation(reasons: Sequence[Any], reading: Any | None) -> None:
    """Print a score explanation in a terminal."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def bar(value: float, most: float, style: str = "green") -> Text:
        return Text("█" * max(round(WIDTH * value / (most or 1.0)), 0), style=style)

    most = max((r.score for r in reasons), default=0.0)
    table = Table("query", "document", "adds", "")
    for r in reasons:
        met = Text("not retrieved, imputed", style="dim") if r.imputed else Text(r.document or "")
        table.add_row(Text(r.query), met, f"{r.score:.4f}", bar(r.score, most, "dim" if r.imputed else "green"))
    table.caption = f"score {sum(r.score for r in reasons):.4f}"
    console = Console()
    console.print(table)
    if reading is not None:
        sides = []
        for title, words in (("terms of the query", reading.query), ("terms of the document", reading.document)):
            side = Table(title, "weight", "")
            for word, weight in words:
                side.add_row(Text(word), f"{weight:.3f}", bar(weight, words[0][1]))
            sides.append(side)
        console.print(Columns(sides))
