"""Serve real prompts with a stock vLLM engine, with and without a drafter (`make demo`).

Prints a table of speed-up and acceptance length, and writes ``out/demo.json`` and ``out/demo.png``.
"""

import argparse
from pathlib import Path

from rich.console import Console

from pilotfish.integrations.vllm.bench.drafters import (
    STOCK,
    DrafterBenchmark,
    DrafterRun,
    acceptance_length,
    run_drafter_benchmark,
    total,
)
from pilotfish.integrations.vllm.models.embedded import SMOLLM2
from pilotfish.integrations.vllm.serving.progress import fetch_with_bar
from pilotfish.plugins.terminal import make_table

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--drafter", default="token_recycling")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sample", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()

    fetch_with_bar(SMOLLM2)
    runs = run_drafter_benchmark(
        DrafterBenchmark(
            prompts=(arguments.prompts,),
            model=SMOLLM2.name,
            arms=(arguments.drafter,),
            sample=arguments.sample,
            sample_others=1,
            max_tokens=arguments.max_tokens,
            batch=0,
            dtype="float32",  # outputs can then be compared token by token
            seed=0,
            out=arguments.out / "demo.json",
            warm=False,
        )
    )
    stock = {r.turn: r for r in runs if r.arm.startswith(STOCK)}
    pairs = [(stock[r.turn], r) for r in runs if not r.arm.startswith(STOCK)]
    print_table(pairs, arguments.drafter)
    plot(pairs, arguments.drafter, arguments.out / "demo.png")
    Console().print(f"plot: {arguments.out / 'demo.png'}")


def tokens_per_second(runs: list[DrafterRun]) -> float:
    """Return the tokens per second over several runs."""
    return sum(r.tokens for r in runs) / total(runs, "seconds")


def print_table(pairs: list[tuple[DrafterRun, DrafterRun]], drafter: str) -> None:
    """Print stock vLLM and the drafter side by side, by category of prompts."""
    numbers = ("stock tok/s", "drafter tok/s", "speed-up", "acceptance length")
    table = make_table("prompts", *numbers, "identical", numbers=numbers, title=f"Greedy decoding with {drafter}")
    categories = list(dict.fromkeys(a.category for a, _ in pairs))
    for category in [*categories, "all"]:
        selected = [p for p in pairs if category in (p[0].category, "all")]
        before, after = [a for a, _ in selected], [b for _, b in selected]
        same = all(a.answer["tokens"] == b.answer["tokens"] for a, b in selected)
        x, y = tokens_per_second(before), tokens_per_second(after)
        cells = (f"{x:.1f}", f"{y:.1f}", f"{y / x:.2f}x", f"{acceptance_length(after):.2f}", "yes" if same else "NO")
        table.add_row(
            category, *cells, style="bold" if category == "all" else None, end_section=category == categories[-1]
        )
    Console().print(table)


def plot(pairs: list[tuple[DrafterRun, DrafterRun]], drafter: str, path: Path) -> None:
    """Draw tokens per second with and without the drafter, prompt by prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    positions = range(len(pairs))
    axes.bar(
        [p - 0.2 for p in positions],
        [tokens_per_second([a]) for a, _ in pairs],
        0.4,
        label="stock vLLM",
        color="#9aa5b1",
    )
    axes.bar(
        [p + 0.2 for p in positions], [tokens_per_second([b]) for _, b in pairs], 0.4, label=drafter, color="#1f6f8b"
    )
    axes.set_xticks(list(positions), [a.category for a, _ in pairs], rotation=35, ha="right")
    axes.set_ylabel("tokens per second")
    ratio = tokens_per_second([b for _, b in pairs]) / tokens_per_second([a for a, _ in pairs])
    axes.set_title(f"SmolLM2-135M-Instruct, one request at a time: {ratio:.2f} times the tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
