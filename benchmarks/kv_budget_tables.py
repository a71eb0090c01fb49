"""Table of KV policies at equal budgets: `make bench-budgets`."""

import statistics

from common import STOCK, kv_figures, markdown, provenance

# Policies that keep the whole cache; those that free blocks, their quality and their steps.
RESULTS = ("kv_budgets", "kv_budgets_streaming", "kv_budgets_streaming_steps")
NAMES = {"tidal_decode": "TidalDecode", "quest": "Quest", "streaming_llm": "StreamingLLM"}


def table(*names: str) -> str:
    """Return the table of some results: speed-up of a decode step by context, divergence, and needle recall."""
    found: dict[str, dict[tuple[str, int, int], dict[str, float]]] = {}
    sources = ""
    for name in names or RESULTS:
        result, _, values = kv_figures(name)
        for (arm, dataset, context, batch), figures in values.items():
            found.setdefault(arm, {})[dataset, context, batch] = figures
        sources += provenance(result)
    contexts = sorted({context for _, context, batch in found.pop(STOCK) if batch})
    rows: list[tuple[int, list[str]]] = []
    for arm, values in found.items():
        policy, _, budget = arm.partition("@budget=")
        timed = [values.get((f"context_{c}", c, 1)) for c in contexts]
        steps = ["" if x is None else f"{x['step_speedup']:.2f}x" for x in timed]
        forms = (("kl", "{:.3f}"), ("same_top", "{:.0%}"), ("needle_recall", "{:.0%}"))
        cells = [f"{int(budget):,}", NAMES[policy], *steps, *(_mean(values, metric, form) for metric, form in forms)]
        rows.append((int(budget), cells))
    rows.sort(key=lambda row: row[0])  # stable: within a budget the order of the results
    head = ["budget, tokens", "policy", *(f"step at {c:,}" for c in contexts), "KL", "same top token", "needles"]
    return markdown(head, [cells for _, cells in rows], texts=2) + sources


def _mean(values: dict[tuple[str, int, int], dict[str, float]], metric: str, form: str) -> str:
    """Return the mean of a metric over the texts; nothing if it was not measured."""
    measured = [figures[metric] for figures in values.values() if metric in figures]
    return form.format(statistics.fmean(measured)) if measured else ""
