"""Tables of drafters on 96 prompts of Spec-Bench and 32 of HumanEval: `pilotfish bench drafters`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bootstrap import bootstrap_interval, compare_paired
from common import STOCK, figures, load, markdown, provenance
from tree_tables import label

# The same prompts in all files. Where several have the same arm, the last one counts.
SUFFIX_RESULTS = ("drafters_suffix", "drafters_suffix_rasd", "drafters_suffix_token_recycling")
RESULTS = ("drafters_documented", *SUFFIX_RESULTS)


def overall() -> str:
    """Return the table of all drafters by dataset, each prompt seen once."""
    results, table, runs, lengths, arms = _merged(RESULTS)
    rows = []
    for dataset in ("spec_bench", "humaneval"):
        for arm in arms:
            x = table[dataset, 1, arm]
            rows.append(
                [
                    f"{dataset}, {len(runs[dataset, arm])}",
                    label(arm),
                    _interval(runs[dataset, arm]),
                    f"{x['decode_speedup']:.2f}",
                    f"{x['median_speedup']:.2f}",
                    f"{lengths[dataset, arm]:.2f}",
                    f"{x['identical_share']:.0%}",
                    f"{x['proposal_ms']:.2f}" if "proposal_ms" in x else "",
                ]
            )
    head = ["prompts", "drafter", "speed-up", "decoding only", "median", "acceptance length", "identical"]
    return markdown([*head, "proposal ms"], rows, texts=2) + "".join(map(provenance, results))


def by_category() -> str:
    """Return the table of speed-ups by category of prompts; bold: the fastest, and those that tie with it."""
    _, table, runs, _, arms = _merged(RESULTS)
    rows = []
    for place in sorted({d for d, *_ in table if "/" in d and not d.split("/")[0].endswith(("_again", "_twice"))}):
        fastest = max(arms, key=lambda arm: bootstrap_interval(runs[place, arm])[0])
        ties = [a for a in arms if compare_paired(runs[place, a], runs[place, fastest]).startswith("tie")]
        cells = [f"{bootstrap_interval(runs[place, arm])[0]:.2f}" for arm in arms]
        bold = [f"**{cell}**" if arm in ties else cell for arm, cell in zip(arms, cells, strict=True)]
        rows.append([place, str(len(runs[place, fastest])), *bold])
    return markdown(["category", "prompts", *map(label, arms)], rows)


def in_batches() -> str:
    """Return the table of drafters with several requests in a batch, with the lowest and highest run."""
    result = load("drafters_batch")
    table = figures(result)
    runs = {(r["dataset"], r["arm"]): r["runs"] for r in result["records"] if r["params"]["batch"] > 1 and r["runs"]}
    rows = []
    for (dataset, batch, arm), x in table.items():
        if batch > 1:
            each = runs[dataset, arm]
            tie = "tie, " if min(each) <= 1 <= max(each) else ""
            spread = f"{tie}{x['speedup']:.2f} ({min(each):.2f} to {max(each):.2f})"
            rows.append([f"{dataset}, batch {batch}", label(arm), spread])
    return markdown(["prompts", "drafter", "speed-up"], rows, texts=2) + provenance(result)


def suffix_comparison(*benchmarks: str) -> str:
    """Return the speed-ups with 95 % confidence intervals, and RASD relative to each other arm, paired by prompt.

    Args:
        benchmarks: Result files with the same prompts. Where several have the same arm, the last one counts.
    """
    results, table, runs, lengths, arms = _merged(benchmarks)
    rows = []
    for dataset in dict.fromkeys(d for d, *_ in table if "/" not in d and not d.endswith(("_again", "_twice"))):
        for arm in arms:
            cells = []
            for place in (dataset, f"{dataset}_again"):
                cells += [_interval(runs[place, arm]), f"{lengths[place, arm]:.2f}"]
                cells.append("" if arm == "rasd" else compare_paired(runs[place, "rasd"], runs[place, arm]))
            same = all(table[p, 1, arm]["identical_share"] == 1 for p in (dataset, f"{dataset}_again"))
            rows.append([f"{dataset}, {len(runs[dataset, arm])}", label(arm), *cells, "yes" if same else "no"])
    one = ["speed-up", "acceptance length", "RASD vs. this arm"]
    head = ["prompts", "drafter", *(f"{x}, {turn}" for turn in ("first", "second") for x in one), "identical"]
    return markdown(head, rows, texts=2) + "".join(map(provenance, results))


def summary() -> str:
    """Return the speed-up of each drafter over whole datasets, with 95 % confidence intervals over prompts."""
    results, table, runs, lengths, arms = _merged(SUFFIX_RESULTS)
    rows = []
    for arm in arms:
        cells = [_interval(runs[dataset, arm], unit="x") for dataset in ("spec_bench", "humaneval")]
        same = table["spec_bench", 1, arm]["identical_share"]
        rows.append([label(arm), *cells, f"{lengths['spec_bench', arm]:.2f}", f"{same:.0%}"])
    head = ["drafter", "speed-up on Spec-Bench", "on HumanEval", "acceptance length", "identical outputs"]
    return markdown(head, rows) + "".join(map(provenance, results))


def _interval(ratios: Sequence[float], unit: str = "") -> str:
    mean, low, high = bootstrap_interval(ratios)
    return f"{mean:.2f}{unit} ({low:.2f} to {high:.2f})"


def _merged(benchmarks: Sequence[str]) -> tuple[Any, Any, Any, Any, list[str]]:
    """Return the results, their figures, speed-ups by prompt, acceptance lengths, and arms; the last file counts."""
    results = [load(benchmark) for benchmark in benchmarks]
    table = {key: values for result in results for key, values in figures(result).items()}
    speedups = [r for result in results for r in result["records"] if r["metric"] == "speedup"]
    runs = {(r["dataset"], r["arm"]): r["runs"] for r in speedups}
    lengths = {key: length for result in results for key, length in _acceptance_lengths(result).items()}
    arms = sorted({arm for _, _, arm in table}, key=lambda arm: (arm.startswith(("token_recycling", "rasd")), arm))
    return results, table, runs, lengths, arms


def _acceptance_lengths(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Return the number of tokens per verification step, by dataset and arm.

    The tokens are those of the stock run beside each run: early results count tokens after the end of an answer too.
    """
    tokens: dict[tuple[str, str], int] = defaultdict(int)
    steps: dict[tuple[str, str], int] = defaultdict(int)
    runs = result["raw"]["runs"]
    stock = {(r["arm"], r["dataset"], r["turn"], r["again"]): r for r in runs if r["arm"].startswith(f"{STOCK}|")}
    for run in runs:
        pair = stock.get((f"{STOCK}|{run['arm']}", run["dataset"], run["turn"], run["again"]))
        if pair is not None:
            key = run["dataset"] + ("_again" if run["again"] else ""), run["arm"]
            tokens[key] += pair["answer"]["emitted"]
            steps[key] += run["answer"]["request_steps"]
    return {key: tokens[key] / steps[key] for key in tokens}
