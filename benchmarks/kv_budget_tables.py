"""Table of KV policies at equal budgets: `make bench-budgets`."""

from common import STOCK, kv_figures, markdown, provenance

RESULTS = ("kv_budgets", "kv_budgets_streaming")  # policies that keep the whole cache, and those that free blocks
NAMES = {"tidal_decode": "TidalDecode", "quest": "Quest", "streaming_llm": "StreamingLLM"}


def table() -> str:
    """Return the table: speed-up of a decode step by context, divergence, and needle recall."""
    rows: list[tuple[int, list[str]]] = []
    contexts: list[int] = []
    sources = ""
    for name in RESULTS:
        result, arms, values = kv_figures(name)
        contexts = contexts or sorted({c for arm, _, c, b in values if b and arm == STOCK})
        for arm in arms:
            policy, _, budget = arm.partition("@budget=")
            if arm == STOCK:
                continue
            found = {key[1:]: x for key, x in values.items() if key[0] == arm}
            timed = [found.get((f"context_{c}", c, 1)) for c in contexts]
            steps = ["" if x is None else f"{x['step_speedup']:.2f}x" for x in timed]
            kl = [x["kl"] for x in found.values() if "kl" in x]
            same = [x["same_top"] for x in found.values() if "same_top" in x]
            needles = [x["needle_recall"] for x in found.values() if "needle_recall" in x]
            quality = [f"{sum(kl) / len(kl):.3f}", f"{sum(same) / len(same):.0%}"]
            cells = [*steps, *quality, f"{sum(needles) / len(needles):.0%}"]
            rows.append((int(budget), [f"{int(budget):,}", NAMES[policy], *cells]))
        sources += provenance(result)
    rows.sort(key=lambda row: row[0])  # stable: within a budget the order of the results
    head = ["budget, tokens", "policy", *(f"step at {c:,}" for c in contexts), "KL", "same top token", "needles"]
    return markdown(head, [cells for _, cells in rows], texts=2) + sources
