"""`pilotfish report`: one HTML page from benchmark records, with plots first and every loss listed."""

import dataclasses
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import write_text

from ...plugins.commands import default_value
from ...plugins.config import ConfigError
from ...plugins.manager import HOOKS, plugins
from . import plots
from .gains import is_overall

TEMPLATE = Path(__file__).parent / "page" / "report.html"


@dataclass(frozen=True)
class Measure:
    """How a metric is shown.

    Attributes:
        name: Name of the metric in records.
        title: Heading for readers.
        better: 1 where a larger value is better, -1 where a smaller one is, 0 where it depends.
        ratio: Whether the value is relative to stock in the same run, so that below 1 is a loss.
    """

    name: str
    title: str
    better: int
    ratio: bool = False

    @property
    def heading(self) -> str:
        """Title, and which direction is better."""
        return self.title + {1: ", higher is better", -1: ", lower is better", 0: ""}[self.better]


MEASURES = (
    Measure("speedup", "speed-up", 1, True),
    Measure("answer_speedup", "answer speed-up", 1, True),
    Measure("step_speedup", "decode step speed-up", 1, True),
    Measure("load_speedup", "throughput under load", 1, True),
    Measure("prefill_speedup", "prefill speed-up", 1, True),
    Measure("ttft_speedup", "TTFT speed-up", 1, True),
    Measure("first_token_speedup", "TTFT speed-up", 1, True),
    Measure("decode_speedup", "decoding speed-up", 1, True),
    Measure("capacity_ratio", "capacity in the same memory", 1, True),
    Measure("acceptance_length", "acceptance length", 1),
    Measure("identical_share", "identical outputs", 1),
    Measure("kl", "KL divergence from full attention, nats", -1),
    Measure("nll_delta", "NLL difference, nats per token", -1),
    Measure("needle_recall", "needles found", 1),
    Measure("exact_match", "exact match", 1),
    Measure("kv_reduction", "KV cache reduction", 1),
    Measure("ndcg@10", "nDCG@10", 1),
    Measure("recall@100", "recall@100", 1),
    Measure("query_ms_median", "ms per search", -1),
    Measure("query_ms_p95", "ms per search, p95", -1),
    Measure("build_s", "seconds to build", -1),
    Measure("bytes_per_token", "bytes per token", -1),
    Measure("prompt_tokens", "prompt tokens", -1),
    Measure("coverage", "coverage", 1),
    Measure("recall@4", "recall@4", 1),
    Measure("contains", "gold answer contained", 1),
    Measure("f1", "F1", 1),
    Measure("citation_precision", "citation precision", 1),
    Measure("true_abstentions", "true abstentions", 1),
    Measure("false_abstentions", "false abstentions", -1),
    Measure("first_token_ms", "TTFT, ms", -1),
    Measure("answer_ms_median", "ms per answer", -1),
    Measure("cached_share", "prompt tokens cached", 1),
)
NAMED = {m.name: m for m in MEASURES}
QUALITY = ("ndcg@10", "needle_recall", "contains", "f1", "exact_match")  # metrics by which quality is compared
NOISE = 0.02  # smaller relative differences are ties


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read result files, and those in folders; each result gets the ``name`` of its file.

    Raises:
        ConfigError: A file cannot be read, or is not a result file; or there are none.
    """
    files = [f for p in paths for f in (sorted(p.glob("*.json")) if p.is_dir() else [p])]
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            needed = {"machine", "versions", "command", "date", "records"}
            if not isinstance(result, dict) or not needed <= result.keys():
                raise ValueError("unexpected keys")
            if not isinstance(result["machine"], dict) or not isinstance(result["versions"], dict):
                raise ValueError("machine and versions are not objects")
            for r in result["records"]:
                texts, value = (r["dataset"], r["arm"], r["metric"]), r["value"]
                if not all(isinstance(t, str) for t in texts) or not isinstance(r["params"], dict):
                    raise ValueError("dataset, arm and metric of a record must be strings, its params an object")
                if not "".join(texts).encode().decode().isprintable():
                    raise ValueError(f"{texts}: unprintable characters")
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"{', '.join(texts)}: {value!r} is not a finite number")
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ConfigError(f"{file}: not a result file ({error})") from None
        results.append({**result, "name": file.stem})
    if not results:
        raise ConfigError(f"{', '.join(map(str, paths))}: no result files")
    return results


def write_report(results: Sequence[dict[str, Any]], names: Iterable[str], out: Path) -> None:
    """Write the page.

    Args:
        results: Result of `read_results`.
        names: Names of Pilotfish's plugins; other arms are baselines.
        out: Path of the HTML file.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'pilotfish[report]'") from None

    ours = set(names)
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    records = [{**r, "file": result["name"]} for result in results for r in result["records"]]
    options = {
        "svg.fonttype": "none",
        "svg.hashsalt": "pilotfish",
        "text.parse_math": False,
        "font.family": "sans-serif",
    }
    with mpl.rc_context(options):
        drawn = [(title, caption, draw(records)) for title, caption, draw in plots.LEADING]
        leading = [{"title": t, "caption": c, "svg": _svg(figure)} for t, c, figure in drawn if figure is not None]
    sections = [_section(result) for result in results]
    summary = [row for plugin in sorted(ours) if (row := _summary(plugin, results))]
    write_text(out, page.render(plots=leading, sections=sections, summary=summary, losses=losses(results, ours)))


def base(arm: str) -> str:
    """Return the plugin of an arm."""
    return arm.partition("@")[0]


def record_place(r: dict[str, Any]) -> str:
    """Return where a record was measured: its dataset, and its context, depth or batch where there are several."""
    more = [f"{key} {r['params'][key]}" for key in ("context", "depth", "batch") if r["params"].get(key) is not None]
    return ", ".join([r["dataset"], *(m for m in more if m.replace(" ", "_") not in r["dataset"])])


def group_by_place(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the overall records of a result by (place, metric): those that can be compared."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in filter(is_overall, result["records"]):
        groups.setdefault((record_place(r), r["metric"]), []).append(r)
    return groups


def losses(results: Sequence[dict[str, Any]], ours: set[str]) -> list[dict[str, Any]]:
    """Return where a plugin is slower than stock, or below the best baseline in quality, worst first."""
    losses_found = []
    for result in results:
        for (where, metric), records in group_by_place(result).items():
            measure = NAMED.get(metric)
            baselines = [r for r in records if base(r["arm"]) not in ours]
            if measure is not None and measure.ratio:
                least, by = 1.0, "stock"
            elif measure is not None and metric in QUALITY and baselines:
                best = max(baselines, key=lambda r: r["value"])
                least, by = best["value"], plots.label_of(best["arm"])
            else:
                continue
            losses_found += [
                {"arm": r["arm"], "where": where, "metric": measure.title, "value": r["value"], "against": least,
                 "by": by, "share": r["value"] / (least or 1), "result": result["name"]}
                for r in records if base(r["arm"]) in ours and r["value"] < least * (1 - NOISE)
            ]  # fmt: skip
    return sorted(losses_found, key=lambda loss: loss["share"])


def _summary(plugin: str, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Summarise a plugin with its default settings: median, worst and best value of each metric."""
    rows = []
    for measure in MEASURES:
        values = [
            r["value"]
            for result in results
            for r in filter(is_overall, result["records"])
            if r["metric"] == measure.name and is_default_arm(r["arm"], plugin)
        ]
        if values and measure.better:
            worst, best = (min, max) if measure.better > 0 else (max, min)
            rows.append(
                {
                    "measure": measure.title,
                    "median": _figure(statistics.median(values)),
                    "worst": _figure(worst(values)),
                    "best": _figure(best(values)),
                    "places": len(values),
                    "loses": measure.ratio and worst(values) < 1 - NOISE,
                }
            )
    return {"plugin": plugin, "rows": rows} if rows else None


def is_default_arm(arm: str, plugin: str) -> bool:
    """Return whether an arm is a plugin with its default settings, named or not (``globalcom2@retain=0.25``)."""
    name, *settings = arm.split("@")
    if name != plugin:
        return False
    registered = (plugins().classes(kind).get(plugin) for kind in HOOKS)
    defaults = {
        f"{f.name}={default_value(f)}" for cls in registered if cls is not None for f in dataclasses.fields(cls.Options)
    }
    return all(s == "cold" or s in defaults for s in settings)


def _section(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a result file."""
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for r in result["records"]:
        by_metric.setdefault(r["metric"], []).append(r)
    known = [m for m in MEASURES if m.name in by_metric]
    others = [Measure(name, name.replace("_", " "), 0) for name in by_metric if name not in NAMED]
    tables = [_table(m, by_metric[m.name]) for m in (*known, *others)]
    return {
        "name": result["name"],
        "machine": result["machine"],
        "versions": result["versions"],
        "command": result["command"],
        "date": result["date"],
        "tables": tables,
    }


def _grid(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Return arms, places, and the value of each (arm, place)."""
    cells = {(r["arm"], record_place(r)): r["value"] for r in records}
    arms, places = (list(dict.fromkeys(each)) for each in zip(*cells, strict=True))
    return arms, places, cells


def _table(measure: Measure, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    arms, places, cells = _grid(records)
    best: dict[str, float] = {}
    if measure.better:
        choose = max if measure.better > 0 else min
        best = {p: choose(cells[a, p] for a in arms if (a, p) in cells) for p in places}
    rows = [
        {
            "arm": plots.label_of(a),
            "cells": [
                {
                    "text": _figure(cells[a, p]) if (a, p) in cells else "",
                    "best": (a, p) in cells and len(arms) > 1 and cells[a, p] == best.get(p),
                    "loses": measure.ratio and cells.get((a, p), 1.0) < 1 - NOISE,
                }
                for p in places
            ],
        }
        for a in arms
    ]
    return {"title": measure.heading, "places": places, "rows": rows}


def _figure(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _svg(figure: Any) -> str:
    """Return a figure as an SVG element, the same for the same records."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    return svg[svg.index("<svg") :]
