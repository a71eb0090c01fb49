"""Draw the figures of README and docs from the JSON under benchmarks/results, and from nothing else.

python benchmarks/plot.py            write them to docs/figures
python benchmarks/plot.py FOLDER     write them elsewhere
"""

import sys
from pathlib import Path
from typing import Any

from common import ROOT, read_records
from matplotlib.figure import Figure

from pilotfish.integrations.bench import plots


def needle_heat_map(records: list[dict[str, Any]]) -> Figure:
    """Draw the needle test: depth by context, one panel for full attention and for each setting."""
    cells = [r for r in records if r["metric"] == "needle_recall_at_depth"]
    arms = list(dict.fromkeys(r["arm"] for r in cells))
    lengths, depths = (sorted({r["params"][key] for r in cells}) for key in ("context", "depth"))
    figure = Figure(figsize=(2.2 * len(arms) + 1, 4.4), layout="constrained")
    axes = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    image: Any = None
    for arm, axis in zip(arms, axes, strict=True):
        grid = [[0.0] * len(lengths) for _ in depths]
        for r in (r for r in cells if r["arm"] == arm):
            grid[depths.index(r["params"]["depth"])][lengths.index(r["params"]["context"])] = r["value"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
        title = "full attention" if arm == plots.STOCK else arm.partition("@")[2].replace(",", ", ") or "default"
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
        axis.set_xlabel("context", fontsize=9)
    axes[0].set_ylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=list(axes), label="needles found", shrink=0.8)
    return figure


def main() -> None:
    """Draw all figures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "overview": plots.overview(read_records()),
        "kv_needles": needle_heat_map(read_records("kv")),
        "kv_speed_divergence": plots.kv_tradeoff(read_records("kv")),
        "kv_memory": plots.kv_memory(read_records("kv_memory")),
        "acceptance_by_category": plots.acceptance_by_category(read_records("drafters_budget")),
        "pruning": plots.pruning_tradeoff(read_records("vision")),
        "retrieval": plots.retrieval_latency(read_records("retrieval")),
    }
    for name, figure in drawn.items():
        if figure is None:
            raise SystemExit(f"benchmarks/results: no records for {name}")
        figure.savefig(folder / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
