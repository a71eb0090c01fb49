"""Score explanations as bar charts in one self-contained HTML page."""

import html
from collections.abc import Sequence
from typing import Any

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
