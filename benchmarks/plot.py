"""Draw the figures of docs/ from the JSON under benchmarks/results, and from nothing else.

python benchmarks/plot.py            write them to docs/figures
python benchmarks/plot.py FOLDER     write them elsewhere
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FULL = "none"
BLUE, GREY = "#1f6f8b", "#9aa5b1"


def records(benchmark: str) -> list[dict[str, Any]]:
    """All records of a result file."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))["records"]


def label(arm: str) -> str:
    """An arm as people read it."""
    return "full attention" if arm == FULL else arm.partition("@")[2].replace(",", ", ") or "default"


def needles(found: list[dict[str, Any]], path: Path) -> None:
    """Heat maps of the needle test: depth by length, one for full attention and one for each setting."""
    import matplotlib.pyplot as plt

    cells = [r for r in found if r["metric"] == "needle_recall_at_depth"]
    arms = list(dict.fromkeys(r["arm"] for r in cells))
    lengths, depths = (sorted({r["params"][key] for r in cells}) for key in ("context", "depth"))
    figure, axes = plt.subplots(
        1, len(arms), figsize=(2.2 * len(arms) + 1, 4.4), layout="constrained", sharey=True, squeeze=False
    )
    image: Any = None
    for arm, axis in zip(arms, axes[0], strict=True):
        grid = [[0.0] * len(lengths) for _ in depths]
        for r in (r for r in cells if r["arm"] == arm):
            grid[depths.index(r["params"]["depth"])][lengths.index(r["params"]["context"])] = r["value"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
        axis.set_title(label(arm), fontsize=10)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
        axis.set_xlabel("context", fontsize=9)
    axes[0][0].set_ylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes[0].tolist(), label="found again", shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curve(found: list[dict[str, Any]], path: Path) -> None:
    """Speed of a step at the longest context against divergence from full attention, one point for each setting."""
    import matplotlib.pyplot as plt

    speeds = [r for r in found if r["metric"] == "step_speedup"]
    longest = max(r["params"]["context"] for r in speeds)
    batches = sorted({r["params"]["batch"] for r in speeds})
    divergence: dict[str, list[float]] = {}
    for r in (r for r in found if r["metric"] == "kl"):
        divergence.setdefault(r["arm"], []).append(r["value"])
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for batch, colour in zip(batches, (BLUE, "#d1783c", "#5b8c5a"), strict=False):
        points = sorted(
            (sum(divergence[r["arm"]]) / len(divergence[r["arm"]]), r["value"], label(r["arm"]))
            for r in speeds
            if (r["params"]["context"], r["params"]["batch"]) == (longest, batch) and r["arm"] in divergence
        )
        axis.plot(*zip(*[(x, y) for x, y, _ in points], strict=True), "o", color=colour, label=f"batch {batch}")
        for x, y, name in points:
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.plot([0], [1], "s", color=GREY, label="full attention")
    axis.set_xlabel("divergence from full attention (KL, nats; mean over texts and contexts)")
    axis.set_ylabel(f"times as fast, steps at {longest} tokens")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def quality(found: list[dict[str, Any]], path: Path) -> None:
    """nDCG@10 against the time of a search, one panel for each collection."""
    import matplotlib.pyplot as plt

    values: dict[tuple[str, str], dict[str, float]] = {}
    for r in found:
        values.setdefault((r["dataset"], r["arm"]), {})[r["metric"]] = r["value"]
    parts = (
        "codec",
        "cluster",
        "t_prime",
        "activation",
        "members",
        "exhaustive",
        "document_encoding",
        "query_encoding",
    )
    points = {
        key: v for key, v in values.items() if "ndcg@10" in v and not any(f"@{part}=" in key[1] for part in parts)
    }
    collections = list(dict.fromkeys(dataset for dataset, _ in points))
    figure, axes = plt.subplots(1, len(collections), figsize=(4.2 * len(collections), 4), layout="constrained")
    for collection, axis in zip(collections, axes, strict=True):
        for (dataset, arm), v in points.items():
            if dataset == collection:
                ours = arm.split("@")[0] in ("xtr", "vdr", "hybrid", "dense", "bm25")
                axis.scatter(v["query_ms_median"], v["ndcg@10"], color=BLUE if ours else GREY, zorder=3)
                axis.annotate(
                    arm.replace("@", " "),
                    (v["query_ms_median"], v["ndcg@10"]),
                    fontsize=7,
                    xytext=(4, 3),
                    textcoords="offset points",
                )
        axis.set_xscale("log")
        axis.set_title(collection, fontsize=10)
        axis.set_xlabel("ms of a search, without encoding", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nDCG@10", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw all figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    found = records("kv")
    needles(found, folder / "kv_needles.png")
    curve(found, folder / "kv_speed_divergence.png")
    quality(records("retrieval"), folder / "retrieval.png")


if __name__ == "__main__":
    main()
