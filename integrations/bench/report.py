"""`pilotfish report`: one page from the JSON of all measurements; it opens without network, and hides no loss."""

import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import write_text

from ...plugins.config import ConfigError

TEMPLATE = Path(__file__).parent / "page" / "report.html"
STOCK = "none"


@dataclass(frozen=True)
class Measure:
    """How a metric is read.

    Attributes:
        name: As records have it.
        title: As people read it.
        better: 1 where more is better, -1 where less is; 0 where it depends.
        ratio: Whether it is one against stock of the same run, so that below 1 is a loss.
        drawn: Whether it is drawn.
    """

    name: str
    title: str
    better: int
    ratio: bool = False
    drawn: bool = False

    @property
    def heading(self) -> str:
        """Title, and which way is better."""
        return self.title + {1: ", more is better", -1: ", less is better", 0: ""}[self.better]


MEASURES = (
    Measure("speedup", "speed-up", 1, True, True),
    Measure("answer_speedup", "speed-up of answers", 1, True, True),
    Measure("step_speedup", "speed-up of steps", 1, True, True),
    Measure("load_speedup", "throughput under load", 1, True, True),
    Measure("prefill_speedup", "speed-up of prefill", 1, True, True),
    Measure("ttft_speedup", "speed-up of the first token", 1, True),
    Measure("first_token_speedup", "speed-up of the first token", 1, True),
    Measure("decode_speedup", "speed-up of decoding", 1, True),
    Measure("capacity_ratio", "capacity", 1, True, True),
    Measure("accepted_length", "tokens per step", 1),
    Measure("identical_share", "identical outputs", 1),
    Measure("kl", "KL from full attention, nats", -1, drawn=True),
    Measure("nll_delta", "nats lost per token", -1),
    Measure("needle_recall", "needles found", 1, drawn=True),
    Measure("exact_match", "exact match", 1),
    Measure("kv_ratio", "cache held", -1),
    Measure("ndcg@10", "nDCG@10", 1, drawn=True),
    Measure("recall@100", "recall@100", 1),
    Measure("query_ms_median", "ms of a search", -1, drawn=True),
    Measure("query_ms_p95", "ms, 95th percentile", -1),
    Measure("build_s", "seconds to build", -1),
    Measure("bytes_per_token", "bytes per token", -1),
    Measure("prompt_tokens", "prompt tokens", -1, drawn=True),
    Measure("coverage", "coverage", 1),
    Measure("recall@4", "passages found", 1),
    Measure("contains", "answers that hold the known one", 1, drawn=True),
    Measure("f1", "F1", 1),
    Measure("citation_precision", "citations that are right", 1),
    Measure("honest_refusals", "honest refusals", 1),
    Measure("wrong_refusals", "wrong refusals", -1),
    Measure("first_token_ms", "ms to the first token", -1),
    Measure("answer_ms_median", "ms of an answer", -1),
    Measure("cached_share", "prompt tokens cached", 1),
)
NAMED = {m.name: m for m in MEASURES}
JUDGED = ("ndcg@10", "needle_recall", "contains", "f1", "exact_match")  # what quality is compared by
NOISE = 0.02  # of a ratio: less is none


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of files, and of those in folders; each is a `record.write` file, with ``name``.

    Raises:
        ConfigError: one cannot be read, or is none; or there are none.
    """
    files = [f for p in paths for f in (sorted(p.glob("*.json")) if p.is_dir() else [p])]
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            needed = {"machine", "versions", "command", "date", "records"}
            if not isinstance(result, dict) or not needed <= result.keys():
                raise ValueError("it has other keys")
            if not isinstance(result["machine"], dict) or not isinstance(result["versions"], dict):
                raise ValueError("machine and versions are no objects")
            for r in result["records"]:
                texts, value = (r["dataset"], r["arm"], r["metric"]), r["value"]
                if not all(isinstance(t, str) for t in texts) or not isinstance(r["params"], dict):
                    raise ValueError("a record's dataset, arm and metric are texts, its params an object")
                if not "".join(texts).encode().decode().isprintable():
                    raise ValueError(f"{texts}: characters that cannot be printed")
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"{', '.join(texts)}: {value!r} is no finite number")
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ConfigError(f"{file}: not a file of measurements ({error})") from None
        results.append({**result, "name": file.stem})
    if not results:
        raise ConfigError(f"{', '.join(map(str, paths))}: holds no measurements")
    return results


def write_report(results: Sequence[dict[str, Any]], plugins: Iterable[str], out: Path) -> None:
    """Write the page.

    Args:
        results: See `read`.
        plugins: Names of ours; other arms are what they are compared with.
        out: The file.

    Raises:
        ConfigError: jinja2 or matplotlib is not there.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'pilotfish[report]'") from None

    ours = set(plugins)
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = [_section(result) for result in results]
    summary = [row for plugin in sorted(ours) if (row := _summary(plugin, results))]
    write_text(out, page.render(sections=sections, summary=summary, losses=losses(results, ours)))


def base(arm: str) -> str:
    """The plugin of an arm."""
    return arm.partition("@")[0]


def record_place(r: dict[str, Any]) -> str:
    """Where a record was measured: its dataset, and its context, depth or batch where there are several."""
    more = [f"{key} {r['params'][key]}" for key in ("context", "depth", "batch") if r["params"].get(key) is not None]
    return ", ".join([r["dataset"], *(m for m in more if m.replace(" ", "_") not in r["dataset"])])


def losses(results: Sequence[dict[str, Any]], ours: set[str]) -> list[dict[str, Any]]:
    """Where a plugin is slower than stock, or of less quality than what it is compared with, worst first."""
    found = []
    for result in results:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for r in _plain(result["records"]):
            groups.setdefault((record_place(r), r["metric"]), []).append(r)
        for (where, metric), records in groups.items():
            measure = NAMED.get(metric)
            others = [r for r in records if base(r["arm"]) not in ours]
            if measure is not None and measure.ratio:
                least, by = 1.0, "stock"
            elif measure is not None and metric in JUDGED and others:
                best = max(others, key=lambda r: r["value"])
                least, by = best["value"], _label(best["arm"])
            else:
                continue
            found += [
                {"arm": r["arm"], "where": where, "metric": measure.title, "value": r["value"], "against": least,
                 "by": by, "share": r["value"] / (least or 1), "result": result["name"]}
                for r in records if base(r["arm"]) in ours and r["value"] < least * (1 - NOISE)
            ]  # fmt: skip
    return sorted(found, key=lambda loss: loss["share"])


def _plain(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without categories of datasets and depths of needles, which tables of all have."""
    return [r for r in records if "/" not in r["dataset"] and "depth" not in r["params"]]


def _summary(plugin: str, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a plugin gains and costs with its own settings: medians over places, worst, best."""
    rows = []
    for measure in MEASURES:
        values = [
            r["value"]
            for result in results
            for r in _plain(result["records"])
            if r["metric"] == measure.name and r["arm"] in (plugin, f"{plugin}@cold")
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


def _section(result: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a file."""
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for r in result["records"]:
        by_metric.setdefault(r["metric"], []).append(r)
    known = [m for m in MEASURES if m.name in by_metric]
    others = [Measure(name, name.replace("_", " "), 0) for name in by_metric if name not in NAMED]
    tables = [_table(m, by_metric[m.name]) for m in (*known, *others)]
    drawn = [(m, _plain(by_metric[m.name])) for m in known if m.drawn]
    return {
        "name": result["name"],
        "machine": result["machine"],
        "versions": result["versions"],
        "command": result["command"],
        "date": result["date"],
        "tables": tables,
        "plots": [_bars(m, records) for m, records in drawn if records],
    }


def _grid(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Arms, places, and ``(arm, place) -> value``."""
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
            "arm": _label(a),
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
    return {"title": measure.heading, "places": places, "rows": rows, "open": measure.drawn}


def _label(arm: str) -> str:
    """An arm as people read it; stock arms name what they ran beside."""
    return "stock" if arm == STOCK else arm.replace(f"{STOCK}|", "stock beside ").replace("@", " ")


def _figure(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _bars(measure: Measure, records: Sequence[dict[str, Any]]) -> str:
    """Bars by place, a group for each arm; as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    arms, places, cells = _grid(records)
    height = 0.8 / len(arms)
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "pilotfish", "text.parse_math": False, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(8, 0.7 + 0.19 * len(arms) * len(places) + 0.25 * len(places)), layout="constrained")
        axis = figure.subplots()
        for i, arm in enumerate(arms):
            at = [y + i * height for y, p in enumerate(places) if (arm, p) in cells]
            widths = [cells[arm, p] for p in places if (arm, p) in cells]
            bars = axis.barh(
                at, widths, height * 0.9, label=_label(arm), color=f"C{i % 10}", alpha=1 if i < 10 else 0.5
            )
            axis.bar_label(bars, [_figure(w) for w in widths], padding=2, fontsize=7)
        axis.set_yticks([y + 0.4 - height / 2 for y in range(len(places))], places, fontsize=8)
        axis.invert_yaxis()
        if measure.ratio:
            axis.axvline(1, color="#a3201b", linewidth=1)
        axis.set_title(measure.heading, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]
