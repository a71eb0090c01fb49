"""Plots of benchmark records: gain against quality, acceptance length, KV memory, retrieval latency.

Each function takes the records of result files (see `record`) and returns a matplotlib figure, or None where the
records do not hold what it shows. `pilotfish report` embeds them; ``benchmarks/plot.py`` writes those of README and
docs.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .gains import STOCK, Records, gains, mean, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "token_recycling": "#1f6f8b",
    "rasd": "#d1783c",
    "tidal_decode": "#5b8c5a",
    "razor_attention": "#8c4a6b",
    "globalcom2": "#b59a2d",
    "aim": "#7a6fb0",
    "diversity": "#4fa3a5",
    "xtr": "#2f5597",
    "vdr": "#a3553a",
    "hybrid": "#3a7d44",
}
GREY = "#8a95a1"
DISPLAY = {
    "token_recycling": "Token Recycling",
    "rasd": "RASD",
    "tidal_decode": "TidalDecode",
    "razor_attention": "RazorAttention",
    "quest": "Quest",
    "streaming_llm": "StreamingLLM",
    "globalcom2": "GlobalCom2",
    "aim": "AIM",
    "xtr": "XTR",
    "vdr": "VDR",
}


def color_of(arm: str) -> str:
    """Return the color of an arm's plugin; grey for other systems."""
    return COLORS.get(arm.partition("@")[0], GREY)


def label_of(arm: str) -> str:
    """Return an arm as readers see it: plugin and settings."""
    if arm == STOCK:
        return "stock"
    return arm.replace(f"{STOCK}|", "stock next to ").replace("@", " ").replace(",", " ")


def overview(records: Records) -> "Figure | None":
    """Draw gain next to quality, one row for each plugin."""
    rows = gains(records)
    if not rows:
        return None
    figure, (speed, quality) = _figures(9, 0.9 + 0.42 * len(rows), 2)
    at = list(range(len(rows)))
    colors = [color_of(r.plugin) for r in rows]
    bars = speed.barh(at, [r.gain for r in rows], color=colors, height=0.6)
    speed.bar_label(bars, [f"{r.gain:.2g}x" for r in rows], padding=3, fontsize=8)
    speed.axvline(1, color=GREY, linewidth=1)
    speed.set_yticks(at, [f"{DISPLAY.get(r.plugin, r.plugin)}\nvs {r.baseline}" for r in rows], fontsize=8)
    speed.set_xlim(0, 1.15 * max(r.gain for r in rows))
    speed.set_title("speed relative to the baseline", fontsize=9)
    kept = [0.0 if r.kept is None else 100 * r.kept for r in rows]
    bars = quality.barh(at, kept, color=colors, height=0.6, alpha=0.75)
    texts = ["not measured: tokens are merged" if r.kept is None else f"{100 * r.kept:.0f}%  {r.quality}" for r in rows]
    quality.bar_label(bars, texts, padding=3, fontsize=8)
    quality.axvline(100, color=GREY, linewidth=1)
    quality.set_yticks([])
    quality.set_xlim(0, 165)
    quality.set_xticks([0, 50, 100], ["0", "50", "100%"])
    quality.set_title("quality relative to the baseline", fontsize=9)
    for axis in (speed, quality):
        axis.invert_yaxis()
    return figure


def kv_tradeoff(records: Records) -> "Figure | None":
    """Draw step speed-up against KL divergence, one point for each setting of a KV policy."""
    speeds = select(records, "step_speedup")
    divergence = {arm: mean(select(records, "kl", arm)) for arm in {r["arm"] for r in speeds}}
    speeds = [r for r in speeds if divergence[r["arm"]] is not None]
    if not speeds:
        return None
    longest = max(r["params"]["context"] for r in speeds)
    speeds = [r for r in speeds if r["params"]["context"] == longest]
    figure, axis = _figure(8, 4.6)
    markers = dict(zip(sorted({r["params"]["batch"] for r in speeds}), "os^Dv", strict=False))
    for r in speeds:
        point = (divergence[r["arm"]], r["value"])
        axis.plot(*point, markers.get(r["params"]["batch"], "o"), color=color_of(r["arm"]))
    for batch, marker in markers.items():
        axis.plot([], [], marker, color=GREY, label=f"batch {batch}")
    axis.plot([0], [1], "*", color=GREY, markersize=11, label="full attention")
    axis.margins(x=0.22, y=0.12)
    axis.set_xlabel("KL divergence from full attention, nats (mean over texts and contexts)")
    axis.set_ylabel(f"decode step speed-up at {longest} tokens")
    axis.legend(frameon=False, fontsize=8)
    labelled = [r for r in speeds if r["params"]["batch"] == max(markers)]
    _label_points(axis, [(divergence[r["arm"]] or 0.0, r["value"], label_of(r["arm"])) for r in labelled])
    return figure


def pruning_tradeoff(records: Records) -> "Figure | None":
    """Draw prefill speed-up against needle retention, one point for each setting of a visual pruner."""
    points = []
    for r in select(records, "needle_recall"):
        prefill = mean([x for x in select(records, "prefill_speedup", r["arm"]) if x["dataset"] == "single"])
        if prefill is not None:
            points.append((r["value"], prefill, r["arm"]))
    if not points:
        return None
    figure, axis = _figure(8, 4)
    for recall, prefill, arm in points:
        axis.plot(recall, prefill, "o", color=color_of(arm))
    axis.plot([1], [1], "*", color=GREY, markersize=11)
    axis.margins(x=0.2, y=0.12)
    axis.set_xlabel("needle retention (share of a pasted object's tokens that is kept)")
    axis.set_ylabel("prefill speed-up")
    _label_points(axis, [*((x, y, label_of(arm)) for x, y, arm in points), (1, 1, "all visual tokens")])
    return figure


def acceptance_by_category(records: Records) -> "Figure | None":
    """Draw the acceptance length of every drafter by category of prompts."""
    lengths = [r for r in records if r["metric"] == "acceptance_length" and r["params"].get("batch") == 1]
    by_file: dict[Any, list[dict[str, Any]]] = {}
    for r in lengths:
        if "/" in r["dataset"] and "_again" not in r["dataset"] and "_twice" not in r["dataset"]:
            by_file.setdefault(r.get("file"), []).append(r)
    if not by_file:
        return None
    measured = [[r for r in rs if "@nodes=" not in r["arm"] and "@warm" not in r["arm"]] for rs in by_file.values()]
    chosen = max(measured, key=lambda rs: (len({r["dataset"] for r in rs}), len({r["arm"] for r in rs})))
    arms = list(dict.fromkeys(r["arm"] for r in chosen))
    categories = sorted({r["dataset"] for r in chosen})
    figure, axis = _figure(8, 1.2 + 0.3 * len(categories))
    for arm, marker in zip(arms, "osD^vP*X", strict=False):
        cells = {r["dataset"]: r["value"] for r in chosen if r["arm"] == arm}
        present = [c for c in categories if c in cells]
        axis.plot(
            [cells[c] for c in present],
            [categories.index(c) for c in present],
            marker,
            label=label_of(arm),
            color=color_of(arm),
            alpha=0.85,
        )
    axis.axvline(1, color=GREY, linewidth=1)
    axis.set_yticks(range(len(categories)), categories, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("acceptance length (tokens per verification step)")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def kv_memory(records: Records) -> "Figure | None":
    """Draw the KV cache of one request against its context."""
    sizes = select(records, "kv_mib", batch=1)
    if not sizes:
        return None
    figure, axis = _figure(8, 3.8)
    for arm in dict.fromkeys(r["arm"] for r in sizes):
        points = sorted((r["params"]["context"], r["value"]) for r in sizes if r["arm"] == arm)
        style = "--" if arm == STOCK else "-"
        axis.plot(*zip(*points, strict=True), f"o{style}", color=color_of(arm), label=label_of(arm))
        axis.annotate(label_of(arm), points[-1], textcoords="offset points", xytext=(6, 0), fontsize=7.5)
    axis.margins(x=0.2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("KV cache of a request, MiB")
    return figure


def retrieval_latency(records: Records) -> "Figure | None":
    """Draw nDCG@10 against the time of a search, one panel for each collection."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for metric in ("ndcg@10", "query_ms_median"):
        for r in select(records, metric):
            values.setdefault((r["dataset"], r["arm"]), {}).setdefault(metric, r["value"])
    points: dict[str, list[tuple[float, float, str]]] = {}  # by collection: ms, nDCG@10, arm
    for (dataset, arm), v in values.items():
        if len(v) == 2 and _is_main_setting(arm):
            points.setdefault(dataset, []).append((v["query_ms_median"], v["ndcg@10"], arm))
    if not points:
        return None
    columns = min(len(points), 2)
    rows = -(-len(points) // columns)
    figure, axes = _figures(5 * columns, 3.6 * rows, columns, rows)
    for axis in axes[len(points) :]:
        axis.set_axis_off()
    for (collection, found), axis in zip(points.items(), axes, strict=False):
        for ms, ndcg, arm in found:
            axis.scatter(ms, ndcg, color=color_of(arm), zorder=3)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")  # matplotlib's own labels are TeX, which SVG shows as text
        axis.xaxis.set_minor_formatter("")
        axis.margins(x=0.25, y=0.1)
        axis.set_title(collection, fontsize=10)
        axis.set_xlabel("ms per search, without encoding", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("nDCG@10", fontsize=9)
    for found, axis in zip(points.values(), axes, strict=False):
        _label_points(axis, [(ms, ndcg, label_of(arm)) for ms, ndcg, arm in found])
    return figure


def _is_main_setting(arm: str) -> bool:
    """Whether a retrieval arm differs from the default in how it is searched, not in how the index is built."""
    built = ("codec", "cluster", "activation", "members", "exhaustive", "document_encoding", "query_encoding")
    return not any(f"@{name}=" in arm for name in (*built, "t_prime", "encoder"))


# What a report leads with: heading, caption, and the function that draws it.
LEADING: tuple[tuple[str, str, Callable[[Records], "Figure | None"]], ...] = (
    ("Gain and quality", "Each plugin with its default settings, against the baseline named below it.", overview),
    ("KV policies", "Step speed-up against divergence from full attention; each point is a setting.", kv_tradeoff),
    ("Visual pruning", "Prefill speed-up against needle retention; each point is a setting.", pruning_tradeoff),
    ("Acceptance length by category", "Tokens per verification step; outputs are identical.", acceptance_by_category),
    ("KV memory", "KV cache of a request against its context.", kv_memory),
    ("Retrieval", "Quality against latency; grey points are other systems.", retrieval_latency),
)


# Where a label may be relative to its point, in points: right and left, then ever further above and below.
OFFSETS = [(6 * side, y) for y in (3, -9, 12, -18, 21, -27, 30, -36) for side in (1, -1)]


def _label_points(axis: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Label points, each at the first place where its label hides no point and no earlier label.

    Call this last: the places depend on the limits and the layout of the figure.

    Args:
        axis: Panel with the points.
        points: x, y and label of each point.
    """
    from matplotlib.transforms import Bbox

    figure: Any = axis.figure
    figure.draw_without_rendering()  # lays the panels out
    style: Any = {"textcoords": "offset points", "fontsize": 7.5, "in_layout": False}
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axis.transData.transform([p[:2] for p in points])]
    for x, y, text in points:
        label = axis.annotate(text, (x, y), xytext=(0, 0), **style)
        for dx, dy in OFFSETS:
            label.set_position((dx, dy))
            label.set_horizontalalignment("left" if dx > 0 else "right")
            box = label.get_window_extent()
            if axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and not any(box.overlaps(b) for b in taken):
                break
        taken.append(label.get_window_extent())
        dx, dy = label.xyann
        if abs(dy) > 9:  # a line to the point
            axis.annotate("", (x, y), xytext=(dx, dy + 3), arrowprops=line, **style)


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure, axes = _figures(width, height, 1)
    return figure, axes[0]


def _figures(width: float, height: float, columns: int, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """Make a figure with a grid of panels, without frames at top and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
