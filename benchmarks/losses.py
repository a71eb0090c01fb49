"""The comparisons that a plugin loses with its default settings, with their causes, from all result files."""

from typing import Any

import drafter_tables
from common import RESULTS, markdown

from pilotfish.integrations.bench import plots, report
from pilotfish.plugins.manager import HOOKS, plugins

MARGIN = 1.05  # smaller differences in speed are within the noise of the machine
LATENCY = "latency of a query, ms"
SPEED = {
    "speedup": ("speed-up", True),
    "query_ms_median": (LATENCY, False),
}  # metric: (title, whether higher is better)
RIVALS = {  # plugin: packages that do the same with the same data
    "rasd": ("suffix", "ngram"),
    "token_recycling": ("suffix", "ngram"),
    "bm25": ("bm25s",),
    "vdr": ("seismic", "bmp"),
    "xtr": ("fast_plaid", "xtr_warp"),
}
SAME_QUALITY = 0.97  # share of the quality that a faster index has to reach

ROUNDED = "bfloat16: one answer in ten differs, since logits are rounded differently in steps with more tokens"
SHORT_PROMPTS = "prompts of about 1,000 tokens: attention to the context is a small part of a step"
LARGE_PAGES = "the bound of a page of 32 tokens is looser than exact scores; the paper's pages have 16"
EVICTED = "it evicts all but the first and the latest tokens, and with them passages of the prompt"
PREFILL_DOMINATES = "short answers: prefill takes most of the time, and the plugin does not make it faster"
CAUSES = {  # (plugin, metric title): cause
    ("razor_attention", "answer speed-up"): "prefix caching is off; stock vLLM without it is as slow. Short contexts",
    ("razor_attention", "TTFT speed-up"): "prefix caching is off; stock vLLM without it is as slow. Short contexts",
    ("razor_attention", "decoding speed-up"): "short contexts: few KV blocks can be evicted",
    ("razor_attention", "needles found"): "one needle in thirty: no retrieval head attends to it",
    ("tidal_decode", "needles found"): "one needle in fifty: a selection layer did not select it",
    ("quest", "needles found"): LARGE_PAGES,
    ("rasd", "gold answer contained"): ROUNDED,
    ("rasd", "F1"): ROUNDED,
    ("rasd", "TTFT speed-up"): PREFILL_DOMINATES,
    ("tidal_decode", "answer speed-up"): SHORT_PROMPTS,
    ("tidal_decode", "decoding speed-up"): SHORT_PROMPTS,
    ("tidal_decode", "TTFT speed-up"): PREFILL_DOMINATES,
    ("streaming_llm", "needles found"): EVICTED,
    ("streaming_llm", "gold answer contained"): EVICTED,
    ("streaming_llm", "F1"): EVICTED,
    ("streaming_llm", "answer speed-up"): SHORT_PROMPTS,
    ("token_recycling", "TTFT speed-up"): PREFILL_DOMINATES,
    ("diversity", "needles found"): "it keeps tokens that differ, whether or not they matter to the question",
    ("vdr", "nDCG@10"): "no checkpoint for retrieval is embedded: its weights come from an untrained head",
    ("bm25", "nDCG@10"): "words must match; token vectors also match synonyms",
    ("dense", "nDCG@10"): "one vector for each document; MaxSim compares tokens",
    (
        "token_recycling",
        "speed-up",
    ): "suffix decoding copies whole passages: of the prompt, and on repeated prompts of earlier outputs",
    ("bm25", LATENCY): "half of the time is Python code around the loops: document frequencies, segments, filters",
}


def table() -> str:
    """Return the table of lost comparisons: for each plugin and metric the worst place.

    Raises:
        KeyError: A loss has no cause in `CAUSES`.
    """
    ours = {name for kind in HOOKS for name in plugins().classes(kind)}
    results = report.read_results([RESULTS])
    worst: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for loss in [*report.losses(results, ours), *_slower(_merge_drafters(results))]:
        plugin = report.base(loss["arm"])
        if report.is_default_arm(loss["arm"], plugin):
            worst.setdefault((plugin, loss["metric"]), []).append(loss)
    rows = []
    for (plugin, metric), found in sorted(worst.items()):
        loss = min(found, key=lambda one: one["share"])
        places = loss["where"] + (f", and {len(found) - 1} more" if len(found) > 1 else "")
        values = f"{loss['value']:.3g}", f"{loss['against']:.3g}"
        rows.append([plots.DISPLAY.get(plugin, plugin), metric, loss["by"], places, CAUSES[plugin, metric], *values])
    return markdown(
        ["plugin", "metric", "compared with", "where", "cause", "plugin's value", "other value"], rows, texts=5
    )


def _merge_drafters(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results with those of drafters on the same prompts as one, since each of them has some of the arms."""
    by_name = {result["name"]: result for result in results}
    parts = [by_name.pop(name) for name in drafter_tables.RESULTS]
    records = {(r["dataset"], r["arm"], r["metric"]): r for part in parts for r in part["records"]}
    return [{**parts[0], "records": list(records.values())}, *by_name.values()]


def _slower(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return where another package is faster than a plugin on the same data in the same run."""
    found = []
    for result in results:
        places = report.group_by_place(result)
        for (where, metric), records in places.items():
            if metric not in SPEED:
                continue
            title, more = SPEED[metric]
            for r in records:
                names = RIVALS.get(report.base(r["arm"]), ())
                rivals = [x for x in records if report.base(x["arm"]) in names and _as_good(x, places, where)]
                if not rivals:
                    continue
                best = (max if more else min)(rivals, key=lambda rival: rival["value"])
                ratio = r["value"] / best["value"] if more else best["value"] / r["value"]
                if ratio * MARGIN < 1:
                    found.append(
                        {"arm": r["arm"], "where": where, "metric": title, "value": r["value"], "share": ratio,
                         "by": plots.label_of(best["arm"]), "against": best["value"], "result": result["name"]}
                    )  # fmt: skip
    return found


def _as_good(record: dict[str, Any], places: dict[tuple[str, str], list[dict[str, Any]]], where: str) -> bool:
    """Return whether an approximate index finds nearly what exact search finds, where that was measured."""
    recall = [r["value"] for r in places.get((where, "exact_recall@10"), []) if r["arm"] == record["arm"]]
    return not recall or report.base(record["arm"]) == "bm25s" or recall[0] >= SAME_QUALITY
