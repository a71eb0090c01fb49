"""The main job in one command (`make demo`): a stock vLLM engine, with and without Token Recycling, on real prompts.

Prints a table and writes `out/demo.json` and `out/demo.png`.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pilotfish.integrations.vllm.bench.drafters import STOCK, DrafterBenchmark, DrafterRun, run_drafter_benchmark
from pilotfish.integrations.vllm.models.embedded import SMOLLM2
from pilotfish.integrations.vllm.serving.progress import fetch_with_bar

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
            hot=False,
        )
    )
    stock = {r.turn: r for r in runs if r.arm.startswith(STOCK)}
    pairs = [(stock[r.turn], r) for r in runs if not r.arm.startswith(STOCK)]
    show(pairs, arguments.drafter)
    plot(pairs, arguments.drafter, arguments.out / "demo.png")
    Console().print(f"plot: {arguments.out / 'demo.png'}")


def speed(runs: list[DrafterRun]) -> float:
    """Tokens per second over several runs."""
    return sum(r.tokens for r in runs) / sum(r.answer["seconds"] for r in runs)


def accepted(runs: list[DrafterRun]) -> float:
    """Tokens that one step yields for a request, on average."""
    return sum(r.answer["emitted"] for r in runs) / max(1, sum(r.answer["request_steps"] for r in runs))


def show(pairs: list[tuple[DrafterRun, DrafterRun]], drafter: str) -> None:
    table = Table(
        "prompts",
        "stock tokens/s",
        f"{drafter} tokens/s",
        "ratio",
        "accepted length",
        "identical",
        title="Greedy decoding",
    )
    categories = list(dict.fromkeys(a.category for a, _ in pairs))
    for category in [*categories, "all"]:
        chosen = [p for p in pairs if category in (p[0].category, "all")]
        before, after = [a for a, _ in chosen], [b for _, b in chosen]
        same = all(a.answer["tokens"] == b.answer["tokens"] for a, b in chosen)
        x, y = speed(before), speed(after)
        cells = (f"{x:.1f}", f"{y:.1f}", f"{y / x:.2f}x", f"{accepted(after):.2f}", "yes" if same else "NO")
        table.add_row(
            category, *cells, style="bold" if category == "all" else None, end_section=category == categories[-1]
        )
    Console().print(table)


def plot(pairs: list[tuple[DrafterRun, DrafterRun]], drafter: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    places = range(len(pairs))
    axes.bar([p - 0.2 for p in places], [speed([a]) for a, _ in pairs], 0.4, label="stock vLLM", color="#9aa5b1")
    axes.bar([p + 0.2 for p in places], [speed([b]) for _, b in pairs], 0.4, label=drafter, color="#1f6f8b")
    axes.set_xticks(list(places), [a.category for a, _ in pairs], rotation=35, ha="right")
    axes.set_ylabel("tokens per second")
    ratio = speed([b for _, b in pairs]) / speed([a for a, _ in pairs])
    axes.set_title(f"SmolLM2-135M-Instruct, one request at a time: {ratio:.2f} times the tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
