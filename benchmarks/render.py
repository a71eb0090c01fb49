"""Write the tables of README.md and docs/ from the JSON under benchmarks/results, and from nothing else.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    exit code 1 when one is not current

Tables are written between ``<!-- table NAME -->`` and ``<!-- end -->``, and the text of a file of the project between
``<!-- file PATH -->`` and ``<!-- end -->``.
"""

import re
import statistics
import sys
from collections.abc import Callable

import compatibility
import drafter_tables
import gpu_tables
import kv_budget_tables
import losses
import memory_tables
import plugin_table
import rag_tables
import retrieval_tables
import tree_tables
import vision_tables
import window_layer_tables
from common import ROOT, STOCK, kv_figures, markdown, provenance, setting

BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FILE = re.compile(r"(<!-- file (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def bound(table: dict[tuple[str, str, int, int], dict[str, float]], batch: int, context: int) -> float:
    """Return the speed-up that a step would have if attention were free.

    It is the time of full attention over the median time of all settings at the shortest context, where they all read
    the same tokens unless their budget is below that context.
    """
    shortest = min(c for _, _, c, b in table if b == batch)
    short = [x["step_ms"] for (_, _, c, b), x in table.items() if (b, c) == (batch, shortest)]
    return table[STOCK, f"context_{context}", context, batch]["step_ms"] / statistics.median(short)


def kv_speed() -> str:
    """Return the table of decode step speed-ups by context and batch; the last row is the `bound`."""
    result, arms, table = kv_figures("kv")
    places = sorted({(b, c) for _, _, c, b in table if b})
    stock = [table[STOCK, f"context_{c}", c, b]["step_ms"] for b, c in places]
    rows = [["full attention, ms", *(f"{x:.1f}" for x in stock)]]
    for arm in arms:
        if arm != STOCK:
            cells = [table[arm, f"context_{c}", c, b]["step_speedup"] for b, c in places]
            rows.append([setting(arm), *(f"{x:.2f}" for x in cells)])
    rows.append(["*bound*", *(f"*{bound(table, b, c):.2f}*" for b, c in places)])
    return markdown(["", *(f"{c}, batch {b}" for b, c in places)], rows) + provenance(result)


def kv_quality() -> str:
    """Return the table of perplexity and divergence from full attention on texts."""
    _, arms, table = kv_figures("kv")
    places = [(d, c) for arm, d, c, b in table if arm == STOCK and not b and "nll" in table[arm, d, c, b]]
    rows = []
    for arm in arms:
        cells = [table[arm, d, c, 0] for d, c in places]
        texts = [
            f"{x['perplexity']:.2f}" + (f", {x['kl']:.3f}, {x['same_top']:.0%}" if "kl" in x else "") for x in cells
        ]
        rows.append([setting(arm), *texts])
    return markdown(["perplexity, KL, same top token", *(f"{d}, {c}" for d, c in places)], rows)


def kv_recall() -> str:
    """Return the table of needle recall and key-value retrieval."""
    _, arms, table = kv_figures("kv")
    needles = sorted({(c, d) for _, d, c, b in table if not b and "needle_recall" in table[STOCK, d, c, b]})
    keys = sorted({(c, d) for _, d, c, b in table if not b and "exact_match" in table[STOCK, d, c, b]})
    rows = []
    for arm in arms:
        found = [table[arm, d, c, 0] for c, d in needles]
        mean = sum(x["needle_recall"] for x in found) / max(len(found), 1)
        cells = [f"{x['needle_recall']:.0%}" for x in found]
        looked_up = [table[arm, d, c, 0] for c, d in keys]
        cells += [f"{mean:.1%}", *(f"{x['exact_match']:.0%}, {x['token_recall']:.0%}" for x in looked_up)]
        rows.append([setting(arm), *cells])
    head = [*(f"needles in {c}" for c, _ in needles), "all needles", *(f"{d}: exact, tokens" for _, d in keys)]
    return markdown(["", *head], rows)


def kv_short() -> str:
    """Return the table of step speed-ups at the longest context, and of quality, by setting."""
    _, arms, table = kv_figures("kv")
    places = sorted({(b, c) for _, _, c, b in table if b})
    longest = max(c for _, c in places)
    batches = sorted({b for b, c in places if c == longest})
    rows = []
    for arm in arms:
        values = {key[1:]: x for key, x in table.items() if key[0] == arm}
        kl = [x["kl"] for x in values.values() if "kl" in x]
        found = [x["needle_recall"] for x in values.values() if "needle_recall" in x]
        steps = [values[f"context_{longest}", longest, b] for b in batches]
        cells = [f"{x['step_speedup']:.2f}x" if "step_speedup" in x else f"{x['step_ms']:.1f} ms" for x in steps]
        rows.append([setting(arm), *cells, f"{sum(kl) / len(kl):.3f}" if kl else "", f"{sum(found) / len(found):.0%}"])
    rows.append(["*bound*", *(f"*{bound(table, b, longest):.2f}x*" for b in batches), "", ""])
    return markdown(["", *(f"{longest} tokens, batch {b}" for b in batches), "KL", "needles found"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "plugins": plugin_table.table,
    "kv_short": kv_short,
    "kv_speed": kv_speed,
    "kv_quality": kv_quality,
    "kv_recall": kv_recall,
    "kv_budgets": kv_budget_tables.table,
    "kv_budgets_qwen": lambda: kv_budget_tables.table(
        "kv_budgets_qwen", "kv_budgets_qwen_quality", "kv_budgets_qwen_gutenberg"
    ),
    "kv_window_layers_qwen": window_layer_tables.table,
    "memory_load": memory_tables.load_table,
    "memory_steps": memory_tables.steps,
    "memory_quality": memory_tables.quality,
    "memory_short": memory_tables.short,
    "drafters_twice": tree_tables.twice,
    "drafters_budget": tree_tables.budget,
    "device_drafting_cost": tree_tables.device_cost,
    "device_replay": tree_tables.device_replay,
    "drafters_suffix": lambda: drafter_tables.suffix_comparison(*drafter_tables.SUFFIX_RESULTS),
    "drafters_suffix_qwen": lambda: drafter_tables.suffix_comparison("drafters_suffix_qwen"),
    "drafter_trace": tree_tables.trace,
    "retrieval": retrieval_tables.retrieval,
    "retrieval_scifact": retrieval_tables.retrieval_scifact,
    "retrieval_curves": lambda: retrieval_tables.curves("retrieval_curves"),
    "retrieval_curves_long": lambda: retrieval_tables.curves(
        "retrieval_curves_long", "retrieval_curves_long_warp", "retrieval_curves_long_plaid"
    ),
    "bm25_baselines": lambda: retrieval_tables.sparse_baselines(("bm25", "bm25s")),
    "vdr_baselines": lambda: retrieval_tables.sparse_baselines(("vdr", "seismic", "bmp")),
    "retrieval_memory": retrieval_tables.retrieval_memory,
    "retrieval_words": retrieval_tables.retrieval_words,
    "retrieval_sparse_encoder": retrieval_tables.retrieval_sparse_encoder,
    "retrieval_hybrid": retrieval_tables.retrieval_hybrid,
    "vision_cost": vision_tables.cost,
    "vision_quality": vision_tables.quality,
    "training": retrieval_tables.training,
    "token_scale": retrieval_tables.token_scale,
    "query_encoding": retrieval_tables.query_encoding,
    "sparse_scale": retrieval_tables.sparse_scale,
    "drafters_sources": tree_tables.sources,
    "datastore_lookups": tree_tables.lookups,
    "drafters_twice_by_category": tree_tables.twice_by_category,
    "drafters": drafter_tables.overall,
    "drafters_by_category": drafter_tables.by_category,
    "drafters_batch": drafter_tables.in_batches,
    "drafters_short": drafter_tables.summary,
    "rag_speed": rag_tables.speed,
    "rag_quality": rag_tables.quality,
    "rag_speed_qwen": lambda: rag_tables.speed("rag_qwen"),
    "rag_quality_qwen": lambda: rag_tables.quality("rag_qwen"),
    "rag_load": rag_tables.load_table,
    "losses": losses.table,
    "compatibility": compatibility.table,
    "gpu_engine_h100": lambda: gpu_tables.engine("h100"),
    "gpu_engine_h200": lambda: gpu_tables.engine("h200"),
    "gpu_kernels_h100": lambda: gpu_tables.kernels("h100", before=False),
    "gpu_kernels_h200": lambda: gpu_tables.kernels("h200", before=True),
}


def rendered(text: str) -> str:
    """Return a document with its tables and files rewritten."""
    text = BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)
    return FILE.sub(lambda m: f"{m[1]}{_fenced(m[2])}{m[3]}", text)


def _fenced(name: str) -> str:
    """Return the text of a file as a block of code."""
    path = ROOT / name
    language = {".py": "python", ".toml": "toml", ".sh": "sh"}.get(path.suffix, "")
    return f"```{language}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"


def main() -> int:
    """Write or check all documents; return the exit code."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        sys.stdout.write(f"{path}: {'not current' if '--check' in sys.argv else 'written'}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
