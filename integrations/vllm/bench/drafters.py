"""Benchmark of drafters: every configuration (arm) is compared, prompt by prompt, with vLLM without speculation.

Two engines run at a time: stock vLLM and one with a drafter. Each prompt runs on both, in alternating order, so that a
drift of the machine's speed affects both. A Pilotfish drafter can be measured twice in its engine: *cold*, with a cache
that is empty at the first prompt, and *warm*, with a cache that is warm from other prompts (never the measured ones).
Or all prompts run a second time (``twice``), from which drafters that store outputs benefit.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID
from rich.table import Table

from ....plugins.config import ROOT, ConfigError, parse_assignments, unknown_key_message
from ....plugins.manager import plugins
from ....plugins.terminal import make_table, print_plain
from ...bench import record
from ...bench.record import Record
from ..drafting import compatibility
from ..engine import selection
from ..models import registry
from ..serving.command import check_model
from ..serving.progress import console as status
from ..serving.progress import counting_bar
from . import prompts as prompt_files
from .engine import EngineProcess, share_gpu
from .prompts import Prompt

STOCK = "none"
Arm = tuple[str, EngineProcess, str]  # label, engine, name of the drafter instance ("" for the only one)
WARM_PROMPTS = 16  # prompts that fill the warm cache before the measurement
QUEUES = 4  # number of queues
QUEUE = 3  # length of a queue, in batches
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class DrafterBenchmark:
    """Settings of the benchmark; see `pilotfish bench drafters --help`."""

    prompts: tuple[Path, ...]
    model: str
    arms: tuple[str, ...]
    sample: int
    sample_others: int
    max_tokens: int
    batch: int
    dtype: str
    seed: int
    out: Path
    warm: bool = True  # also measure with a warm cache
    twice: bool = False  # run all prompts a second time, from a cold cache only
    compiled: bool = False  # compile the model, as vLLM does by default


@dataclass(frozen=True)
class DrafterRun:
    """Answer of one engine to one or more prompts."""

    arm: str
    dataset: str
    category: str
    batch: int
    turn: int  # equal in all runs of the same prompts
    again: bool  # whether the prompts run for the second time
    answer: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answer["tokens"]))


# vLLM's own methods with the settings of its documentation.
VLLM_METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "suffix": {"num_speculative_tokens": 32},
}


def speculation(arm: str) -> dict[str, Any]:
    """Return the engine arguments of an arm: vLLM's own drafters by their method, plugins by their name.

    Each option follows an ``@``, as in ``rasd@verification=tree@nodes=40`` or ``suffix@num_speculative_tokens=64``.

    Raises:
        ConfigError: There is no such drafter.
    """
    if arm == STOCK:
        return {}
    drafters = plugins().classes("drafter")
    selected = parse_assignments(arm.replace("@", ","))
    if selected.name in VLLM_METHODS:
        method = {"method": selected.name, **VLLM_METHODS[selected.name], **selected.options}
        return {"speculative_config": method}
    if selected.name not in drafters:
        raise ConfigError(unknown_key_message(f"arm '{arm}'", selected.name, [*drafters, *VLLM_METHODS]))
    key = {"drafter": {"name": selected.name, **selected.options}}
    config = selection.read_config({ROOT: key})
    return {
        "additional_config": {ROOT: key},
        "speculative_config": {
            "method": "custom_class",
            "model": selection.PROPOSER_CLASS,
            "num_speculative_tokens": compatibility.default_draft_tokens(drafters[selected.name], config.verification),
        },
    }


def run_drafter_benchmark(plan: DrafterBenchmark) -> list[DrafterRun]:
    """Run the benchmark and print the table; the JSON is written after every arm, to lose little if interrupted."""
    runs: list[DrafterRun] = []
    for more in measure_arms(plan):
        runs += more
        raw = {"runs": [{**vars(r), "answer": {k: v for k, v in r.answer.items() if k != "tokens"}} for r in runs]}
        record.write_records(plan.out, summarize_runs(runs), raw, model=plan.model)
    print_drafter_table(summarize_runs(runs))
    status.print(f"written to {plan.out}", markup=False)
    return runs


def measure_arms(plan: DrafterBenchmark) -> Iterator[list[DrafterRun]]:
    """Run every arm in alternation with stock vLLM, one pair of engines after the other."""
    files = [prompt_files.read_prompts(path) for path in plan.prompts]
    record.check_output_path(plan.out)
    for arm in plan.arms:
        speculation(arm)
    check_model(plan.model)
    arms = list(plan.arms)
    if find_spec("arctic_inference") is None and any(arm.startswith("suffix") for arm in arms):
        status.print("skipping arm suffix: arctic-inference is not installed")
        arms = [arm for arm in arms if not arm.startswith("suffix")]
    samples = [
        prompt_files.sample_prompts(f, plan.sample if i == 0 else plan.sample_others, plan.seed)
        for i, f in enumerate(files)
    ]
    others = prompt_files.remaining_prompts(files[0], samples[0], WARM_PROMPTS + QUEUES * QUEUE * plan.batch, plan.seed)
    folder = registry.resolve_model(plan.model)
    with counting_bar() as bar:
        for arm in arms:
            yield measure_pair(plan, arm, folder, [p for sample in samples for p in sample], others, bar)


def measure_pair(
    plan: DrafterBenchmark, arm: str, folder: str, drawn: Sequence[Prompt], others: Sequence[Prompt], bar: Progress
) -> list[DrafterRun]:
    """Run all prompts on stock vLLM and on the arm, interleaved."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = MAX_MODEL_LEN - plan.max_tokens - 1

    def encode(prompt: Prompt) -> list[int]:
        return prompt_files.encode_prompt(tokenizer, prompt, longest)

    encoded = [encode(p) for p in drawn]
    common = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": plan.batch or 8,
        "enforce_eager": not plan.compiled,
        "enable_prefix_caching": False,  # else the second run of a prompt would skip its prefill
        "seed": 0,
        **share_gpu(2),
    }
    states = ("",)
    if plan.warm and not plan.twice and "additional_config" in speculation(arm):
        states = ("cold", "warm")
    passes = (False, True) if plan.twice else (False,)
    warm_up, batched = others[:WARM_PROMPTS], others[WARM_PROMPTS:]
    queues = len(batched) // (QUEUE * plan.batch) if plan.batch else 0
    total = len(passes) * len(drawn) * (1 + len(states)) + 2 * queues
    task = bar.add_task(f"{arm}: starting engines", total=total)
    with (
        tempfile.TemporaryDirectory() as logs,
        EngineProcess(common, Path(logs) / "stock.log") as stock,
        EngineProcess({**common, **speculation(arm)}, Path(logs) / "arm.log") as drafted,
    ):
        for engine in (stock, drafted):  # an engine's first steps are slow
            engine.ask(do="generate", prompts=[encoded[0][:32]], max_tokens=8)
        if "warm" in states:
            bar.update(task, description=f"{arm}: warming up")
            drafted.ask(do="use", drafter="warm")
            for i in range(0, len(warm_up), 8):
                drafted.ask(do="generate", prompts=[encode(p) for p in warm_up[i : i + 8]], max_tokens=plan.max_tokens)
        bar.update(task, description=arm)
        arms: list[Arm] = [(STOCK, stock, "")] + [(f"{arm}@{s}" if s else arm, drafted, s) for s in states]
        runs = []
        for again in passes:
            for i, (prompt, tokens) in enumerate(zip(drawn, encoded, strict=True)):
                more = _turn(arms, i, prompt.dataset, prompt.category, [tokens], plan.max_tokens, bar, task)
                runs += [replace(r, again=again) for r in more]
        if plan.batch:
            runs += _queues(plan, arms, batched, [encode(p) for p in batched], bar, task)
        # Label stock runs with the arm that they were paired with.
        return [replace(r, arm=f"{STOCK}|{arm}") if r.arm == STOCK else r for r in runs]


def _queues(
    plan: DrafterBenchmark,
    arms: list[Arm],
    prompts: Sequence[Prompt],
    encoded: list[list[int]],
    bar: Progress,
    task: TaskID,
) -> list[DrafterRun]:
    """Run queues of prompts, ``plan.batch`` at a time; no engine ran them before, since some drafters store outputs.

    A queue is longer than a batch because the time of a single batch is that of its slowest request, while the other
    slots are idle: a speed-up of the others would not be measured.
    """
    arms = [(arm, engine, state) for arm, engine, state in arms if state != "warm"]
    runs, length = [], QUEUE * plan.batch
    for turn, start in enumerate(range(0, len(prompts) - length + 1, length)):
        queue = encoded[start : start + length]
        more = _turn(arms, turn, prompts[start].dataset, "batch", queue, plan.max_tokens, bar, task)
        runs += [replace(r, batch=plan.batch) for r in more]
    return runs


def _turn(
    arms: list[Arm],
    turn: int,
    dataset: str,
    category: str,
    prompts: list[list[int]],
    max_tokens: int,
    bar: Progress,
    task: TaskID,
) -> list[DrafterRun]:
    """Run the same prompts on every arm; the first arm changes from turn to turn."""
    begin = turn % len(arms)
    runs = []
    for arm, engine, state in arms[begin:] + arms[:begin]:
        if state:
            engine.ask(do="use", drafter=state)
        answer = engine.ask(do="generate", prompts=prompts, max_tokens=max_tokens)
        runs.append(DrafterRun(arm, dataset, category, len(prompts), turn, False, answer))
        bar.advance(task)
    return runs


# ------------------------------------------------------------------------------------------------- from runs to metrics


def summarize_runs(runs: Sequence[DrafterRun]) -> list[Record]:
    """Return metrics relative to the stock runs of the same pair, by dataset, category and batch size.

    If prompts ran twice, ``DATASET`` has their first run, ``DATASET_again`` the second, and ``DATASET_twice`` both.
    """
    records: list[Record] = []
    arms = list(dict.fromkeys(r.arm for r in runs if not r.arm.startswith(STOCK)))
    for arm in arms:
        pair_of = f"{STOCK}|{arm.removesuffix('@cold').removesuffix('@warm')}"
        stock = {(r.dataset, r.batch, r.turn, r.again): r for r in runs if r.arm == pair_of}
        twice = any(r.again for r in runs if r.arm == arm)
        groups: dict[tuple[str, int], list[tuple[DrafterRun, DrafterRun]]] = defaultdict(list)
        for run in (r for r in runs if r.arm == arm):
            pair = (run, stock[run.dataset, run.batch, run.turn, run.again])
            endings = [("_again" if run.again else ""), *(["_twice"] if twice and run.batch == 1 else [])]
            for dataset in (run.dataset + ending for ending in endings):
                groups[dataset, run.batch].append(pair)
                if run.batch == 1:
                    groups[f"{dataset}/{run.category}", 1].append(pair)
        for (dataset, batch), pairs in groups.items():
            records += _figures(arm, dataset, {"batch": batch}, pairs)
    return records


def total(runs: Sequence[DrafterRun], key: str) -> float:
    """Return the sum of a count or time over runs."""
    return sum(r.answer[key] for r in runs)


def acceptance_length(runs: Sequence[DrafterRun]) -> float:
    """Return the mean number of tokens per verification step and request."""
    return total(runs, "emitted") / max(total(runs, "request_steps"), 1)


def _figures(
    arm: str, dataset: str, params: dict[str, Any], pairs: list[tuple[DrafterRun, DrafterRun]]
) -> list[Record]:
    arm_runs, stock = [p[0] for p in pairs], [p[1] for p in pairs]

    def speed(runs: Sequence[DrafterRun], key: str) -> float:
        count = sum(r.tokens for r in runs) if key == "seconds" else total(runs, "emitted")
        return count / max(total(runs, key), 1e-9)

    def ratio(key: str) -> tuple[float, list[float]]:
        # A geometric mean weighs all prompts equally; a ratio of sums would be dominated by a single stalled run.
        each = [x / y for a, b in pairs if (x := speed([a], key)) > 0 and (y := speed([b], key)) > 0] or [1.0]
        return statistics.geometric_mean(each), [round(x, 4) for x in each]

    same = [x == y for a, b in pairs for x, y in zip(a.answer["tokens"], b.answer["tokens"], strict=True)]
    steps = max(total(arm_runs, "request_steps"), 1)
    overall = ratio("seconds")
    rows = [
        ("speedup", overall[0], "x", overall[1]),
        ("median_speedup", statistics.median(overall[1]), "x", []),
        ("tokens_per_second", speed(arm_runs, "seconds"), "tokens/s", []),
        ("stock_tokens_per_second", speed(stock, "seconds"), "tokens/s", []),
        ("acceptance_length", acceptance_length(arm_runs), "tokens", []),
        ("drafted_per_step", total(arm_runs, "drafted") / steps, "tokens", []),
        ("identical_share", sum(same) / len(same), "", []),
    ]
    if params["batch"] == 1:  # in a batch, prompts and decoding overlap
        decode = ratio("decode_seconds")
        rows.insert(1, ("decode_speedup", decode[0], "x", decode[1]))
    if requests := sum(r.answer["proposing"].get("requests", 0) for r in arm_runs):
        seconds = sum(r.answer["proposing"]["seconds"] for r in arm_runs)
        rows.append(("proposal_ms", 1e3 * seconds / requests, "ms/request", []))
    return [Record("drafters", dataset, arm, m, round(v, 4), u, runs, params) for m, v, u, runs in rows]


def print_drafter_table(records: Sequence[Record]) -> None:
    """Print the overall metrics, one table per dataset and batch size."""
    numbers = ("speed-up", "decode only", "acceptance length", "identical", "proposal ms")
    tables: dict[tuple[str, int], Table] = {}
    figures: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for r in records:
        if "/" not in r.dataset:
            figures[r.dataset, r.params["batch"], r.arm][r.metric] = r.value
    for (dataset, batch, arm), f in figures.items():
        if (dataset, batch) not in tables:
            title = f"{dataset}, batch size {batch}"
            tables[dataset, batch] = make_table("drafter", *numbers, numbers=numbers, title=title)
        tables[dataset, batch].add_row(
            arm,
            f"{f['speedup']:.2f}x",
            f"{f['decode_speedup']:.2f}x" if "decode_speedup" in f else "",
            f"{f['acceptance_length']:.2f}",
            f"{f['identical_share']:.0%}",
            f"{f['proposal_ms']:.2f}" if "proposal_ms" in f else "",
        )
    print_plain(*tables.values())
