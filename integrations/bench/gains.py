"""Gain and quality of every plugin with its default settings, from benchmark records."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[dict[str, Any]]

STOCK = "none"


@dataclass(frozen=True)
class Gain:
    """What a plugin gains with its default settings, and what remains of the quality.

    Attributes:
        plugin: Name of the plugin.
        gain: Speed relative to the baseline.
        kept: Quality relative to the baseline, 1 for equal; None where it was not measured.
        baseline: What the plugin is compared with.
        quality: How quality is measured.
    """

    plugin: str
    gain: float
    kept: float | None
    baseline: str
    quality: str


def is_overall(record: dict[str, Any]) -> bool:
    """Return whether a record is of a whole dataset, not of one of its categories or of a single needle depth."""
    return "/" not in record["dataset"] and "depth" not in record["params"]


def select(records: Records, metric: str, arm: str | None = None, **params: Any) -> list[dict[str, Any]]:
    """Return the overall records of a metric with the default model, of one arm or all, with the given params."""
    return [
        r
        for r in records
        if r["metric"] == metric
        and (arm is None or r["arm"] == arm)
        and is_overall(r)
        and "model" not in r["params"]
        and all(r["params"].get(key) == value for key, value in params.items())
    ]


def mean(records: Records) -> float | None:
    """Return the mean of the records' values; None where there are none."""
    return statistics.fmean(r["value"] for r in records) if records else None


def gains(records: Records) -> list[Gain]:
    """Return gain and quality of every plugin that the records measure with its default settings."""
    found = [
        *(_drafter_gain(records, plugin) for plugin in DRAFTERS),
        _tidal_gain(records),
        _razor_gain(records),
        *(_pruner_gain(records, arm) for arm in ("globalcom2@retain=0.25", "aim")),
        _xtr_gain(records),
        _vdr_gain(records),
    ]
    return [gain for gain in found if gain is not None]


DRAFTERS = ("token_recycling", "rasd")


def _drafter_gain(records: Records, plugin: str) -> Gain | None:
    records = _file_of_most_prompts(records, "speedup", plugin)
    seen_once = [r for r in select(records, "speedup", plugin, batch=1) if r["dataset"] in ("spec_bench", "humaneval")]
    speedup = mean(seen_once)
    identical = mean(select(records, "identical_share", plugin))
    if speedup is None or identical is None:
        return None
    return Gain(plugin, speedup, identical, "no speculation", "identical outputs")


def _file_of_most_prompts(records: Records, metric: str, arm: str) -> Records:
    """Return the records of the file that measures an arm on most prompts; of several such files, the last by name."""
    prompts: dict[str, int] = {}
    for r in select(records, metric, arm):
        prompts[str(r.get("file"))] = prompts.get(str(r.get("file")), 0) + len(r["runs"])
    if not prompts:
        return []
    name = max(prompts, key=lambda file: (prompts[file], file))
    return [r for r in records if str(r.get("file")) == name]


def _tidal_gain(records: Records) -> Gain | None:
    steps = select(records, "step_speedup", "tidal_decode")
    if not steps:
        return None
    longest = max(r["params"]["context"] for r in steps)
    batch = max(r["params"]["batch"] for r in steps if r["params"]["context"] == longest)
    gain = mean([r for r in steps if (r["params"]["context"], r["params"]["batch"]) == (longest, batch)])
    kept = _needles_kept(records, "tidal_decode")
    return (
        None
        if gain is None
        else Gain("tidal_decode", gain, kept, f"full attention, {longest} tokens, batch {batch}", "needles found")
    )


def _razor_gain(records: Records) -> Gain | None:
    gain = mean(select(records, "load_speedup", "razor_attention"))
    kept = _needles_kept(records, "razor_attention")
    return None if gain is None else Gain("razor_attention", gain, kept, "full KV cache, under load", "needles found")


def _needles_kept(records: Records, policy: str) -> float | None:
    """Return a policy's needle recall relative to stock attention, over the contexts of the file with most of them."""
    by_file: dict[Any, list[dict[str, Any]]] = {}
    for r in select(records, "needle_recall", policy):
        by_file.setdefault(r.get("file"), []).append(r)
    if not by_file:
        return None
    name, found = max(by_file.items(), key=lambda item: len(item[1]))
    stock = mean([r for r in select(records, "needle_recall", STOCK) if r.get("file") == name])
    recall = mean(found)
    return recall / stock if recall is not None and stock else None


def _pruner_gain(records: Records, arm: str) -> Gain | None:
    prefill = mean([r for r in select(records, "prefill_speedup", arm) if r["dataset"] == "single"])
    kept = mean(select(records, "needle_recall", arm))
    name = arm.partition("@")[0]
    return None if prefill is None else Gain(name, prefill, kept, "prefill of all visual tokens", "needle retention")


def _xtr_gain(records: Records) -> Gain | None:
    """Compare XTR with xtr-warp-rs, the fastest other implementation, over the collections that both search."""
    ratios = []
    for r in select(records, "query_ms_median", "xtr_warp"):
        same = [x for x in records if x["dataset"] == r["dataset"] and x.get("file") == r.get("file")]
        seconds = mean(select(same, "query_ms_median", "xtr"))
        quality = mean(select(same, "ndcg@10", "xtr"))
        other = mean(select(same, "ndcg@10", "xtr_warp"))
        if seconds and quality and other:
            ratios.append((r["value"] / seconds, quality / other))
    if not ratios:
        return None
    gain = statistics.geometric_mean(g for g, _ in ratios)
    return Gain("xtr", gain, statistics.fmean(k for _, k in ratios), "xtr-warp-rs", "nDCG@10")


def _vdr_gain(records: Records) -> Gain | None:
    """Compare VDR's exact search, which skips blocks, with the best exhaustive product over the same postings."""
    ours = mean(select(records, "query_ms_median", "blocks@k=10"))
    others = [mean(select(records, "query_ms_median", arm)) for arm in ("scipy_lists@k=10", "scipy_rows@k=10")]
    measured = [x for x in others if x is not None]
    if ours is None or not measured:
        return None
    return Gain("vdr", min(measured) / ours, 1.0, "best SciPy product, 1M documents", "exact results")
