"""Drafters side by side: every arm shares its runs, prompt by prompt, with an engine that does not speculate.

Two engines live at a time: stock vLLM and one with a drafter. Each prompt is run on both, in alternating order, so that
a machine whose speed drifts slows both. Our drafters can be measured twice in their engine: *cold* with tables that are
empty at the first prompt, *hot* with tables that have seen other prompts before (never the measured ones). Or all
prompts come a second time (``twice``), which drafters that keep outputs profit from.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from ....plugins.config import ROOT, ConfigError, parse_assignments, unknown_key_message
from ....plugins.manager import plugins
from ...bench import record
from ...bench.record import Record
from ..drafting import compatibility
from ..engine import selection
from ..models import registry
from ..serving.command import check_model
from ..serving.progress import console as status
from ..serving.progress import counting_bar
from . import prompts as prompt_files
from .engine import EngineProcess
from .prompts import Prompt

STOCK = "none"
Arm = tuple[str, EngineProcess, str]  # label, engine, name of the drafter's tables ("" where there are none)
HOT_PROMPTS = 16  # seen by the hot tables before anything is measured
QUEUES = 4
QUEUE = 3  # prompts of a queue, in batches
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class DrafterBenchmark:
    """What to measure; see `pilotfish bench drafters --help`."""

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
    hot: bool = True  # measure tables that have seen other prompts, too
    twice: bool = False  # run all prompts a second time, and the tables cold only


@dataclass(frozen=True)
class DrafterRun:
    """One or more prompts through one engine."""

    arm: str
    dataset: str
    category: str
    batch: int
    turn: int  # runs of the same prompts have the same
    again: bool  # the prompts come for the second time
    answer: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answer["tokens"]))


def speculation(arm: str) -> dict[str, Any]:
    """Engine arguments of an arm: vLLM's own drafters as its documentation sets them, ours by plugin name.

    Options stand behind an @ each, as in ``rasd@verification=tree@nodes=40``.

    Raises:
        ConfigError: no such arm.
    """
    if arm == STOCK:
        return {}
    if arm == "ngram":
        return {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 5,
                "prompt_lookup_min": 2,
                "prompt_lookup_max": 4,
            }
        }
    if arm == "suffix":
        return {"speculative_config": {"method": "suffix", "num_speculative_tokens": 16}}
    drafters = plugins().classes("drafter")
    chosen = parse_assignments(arm.replace("@", ","))
    if chosen.name not in drafters:
        raise ConfigError(unknown_key_message(f"arm '{arm}'", chosen.name, [*drafters, "ngram", "suffix"]))
    key = {"drafter": {"name": chosen.name, **chosen.options}}
    config = selection.read_config({ROOT: key})
    return {
        "additional_config": {ROOT: key},
        "speculative_config": {
            "method": "custom_class",
            "model": selection.PROPOSER_CLASS,
            "num_speculative_tokens": compatibility.default_draft_tokens(drafters[chosen.name], config.verification),
        },
    }


def run_drafter_benchmark(plan: DrafterBenchmark) -> list[DrafterRun]:
    """Measure, write the JSON (anew after every arm, so that an interrupt loses one arm only), print the table."""
    runs: list[DrafterRun] = []
    for more in measure_arms(plan):
        runs += more
        raw = {"runs": [{**vars(r), "answer": {k: v for k, v in r.answer.items() if k != "tokens"}} for r in runs]}
        record.write_records(plan.out, summarize_runs(runs), raw)
    print_drafter_table(summarize_runs(runs))
    status.print(f"written to {plan.out}", markup=False)
    return runs


def measure_arms(plan: DrafterBenchmark) -> Iterator[list[DrafterRun]]:
    """Run every arm beside stock vLLM, one pair of engines after the other."""
    files = [prompt_files.read_prompts(path) for path in plan.prompts]
    record.check_output_path(plan.out)
    for arm in plan.arms:
        speculation(arm)
    check_model(plan.model)
    arms = list(plan.arms)
    if "suffix" in arms and find_spec("arctic_inference") is None:
        status.print("arm suffix is left out: arctic-inference is not installed")
        arms.remove("suffix")
    drawn = [
        prompt_files.sample_prompts(f, plan.sample if i == 0 else plan.sample_others, plan.seed)
        for i, f in enumerate(files)
    ]
    others = prompt_files.remaining_prompts(files[0], drawn[0], HOT_PROMPTS + QUEUES * QUEUE * plan.batch, plan.seed)
    folder = registry.resolve_model(plan.model)
    with counting_bar() as bar:
        for arm in arms:
            yield measure_pair(plan, arm, folder, [p for d in drawn for p in d], others, bar)


def measure_pair(
    plan: DrafterBenchmark, arm: str, folder: str, drawn: Sequence[Prompt], others: Sequence[Prompt], bar: Progress
) -> list[DrafterRun]:
    """Run all prompts on stock vLLM and on the arm, in turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = MAX_MODEL_LEN - plan.max_tokens - 1

    def encode(prompt: Prompt) -> list[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"][:longest]

    encoded = [encode(p) for p in drawn]
    common = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": plan.batch or 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,  # else the second run of a prompt would find its prompt processed
        "seed": 0,
    }
    states = ("",)
    if plan.hot and not plan.twice and "additional_config" in speculation(arm):
        states = ("cold", "hot")
    passes = (False, True) if plan.twice else (False,)
    heating, batched = others[:HOT_PROMPTS], others[HOT_PROMPTS:]
    queues = len(batched) // (QUEUE * plan.batch) if plan.batch else 0
    total = len(passes) * len(drawn) * (1 + len(states)) + 2 * queues
    task = bar.add_task(f"{arm}: starting engines", total=total)
    with (
        tempfile.TemporaryDirectory() as logs,
        EngineProcess(common, Path(logs) / "stock.log") as stock,
        EngineProcess({**common, **speculation(arm)}, Path(logs) / "arm.log") as drafted,
    ):
        for engine in (stock, drafted):  # the first steps of an engine are slow
            engine.ask(do="generate", prompts=[encoded[0][:32]], max_tokens=8)
        if "hot" in states:
            bar.update(task, description=f"{arm}: heating")
            drafted.ask(do="use", drafter="hot")
            for i in range(0, len(heating), 8):
                drafted.ask(do="generate", prompts=[encode(p) for p in heating[i : i + 8]], max_tokens=plan.max_tokens)
        bar.update(task, description=arm)
        arms: list[Arm] = [(STOCK, stock, "")] + [(f"{arm}@{s}" if s else arm, drafted, s) for s in states]
        runs = []
        for again in passes:
            for i, (prompt, tokens) in enumerate(zip(drawn, encoded, strict=True)):
                more = _turn(arms, i, prompt.dataset, prompt.category, [tokens], plan.max_tokens, bar, task)
                runs += [replace(r, again=again) for r in more]
        if plan.batch:
            runs += _queues(plan, arms, batched, [encode(p) for p in batched], bar, task)
        # Which stock runs belong to which arm: the pair ran together.
        return [replace(r, arm=f"{STOCK}|{arm}") if r.arm == STOCK else r for r in runs]


def _queues(
    plan: DrafterBenchmark,
    arms: list[Arm],
    prompts: Sequence[Prompt],
    encoded: list[list[int]],
    bar: Progress,
    task: TaskID,
) -> list[DrafterRun]:
    """Queues of prompts, of which ``plan.batch`` run at a time; no engine has met them (some drafters remember).

    A queue, since the last request of a lone batch decides its end: drafting would pay for seven that wait for one.
    """
    arms = [(arm, engine, state) for arm, engine, state in arms if state != "hot"]
    runs, length = [], QUEUE * plan.batch
    for turn, start in enumerate(range(0, len(prompts) - length + 1, length)):
        chosen = encoded[start : start + length]
        more = _turn(arms, turn, prompts[start].dataset, "batch", chosen, plan.max_tokens, bar, task)
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
    """The same prompts through every arm; who begins changes from turn to turn."""
    begin = turn % len(arms)
    runs = []
    for arm, engine, state in arms[begin:] + arms[:begin]:
        if state:
            engine.ask(do="use", drafter=state)
        answer = engine.ask(do="generate", prompts=prompts, max_tokens=max_tokens)
        runs.append(DrafterRun(arm, dataset, category, len(prompts), turn, False, answer))
        bar.advance(task)
    return runs


# ------------------------------------------------------------------------------------------------- from runs to figures


def summarize_runs(runs: Sequence[DrafterRun]) -> list[Record]:
    """Ratios against the stock runs of the same pair, by dataset, category and batch size.

    Where prompts came twice, ``DATASET`` is their first time, ``DATASET_again`` their second, ``DATASET_twice`` both.
    """
    records: list[Record] = []
    arms = list(dict.fromkeys(r.arm for r in runs if not r.arm.startswith(STOCK)))
    for arm in arms:
        pair_of = f"{STOCK}|{arm.removesuffix('@cold').removesuffix('@warm')}"
        stock = {(r.dataset, r.batch, r.turn, r.again): r for r in runs if r.arm == pair_of}
        twice = any(r.again for r in runs if r.arm == arm)
        groups: dict[tuple[str, int], list[tuple[DrafterRun, DrafterRun]]] = defaultdict(list)
        for mine in (r for r in runs if r.arm == arm):
            pair = (mine, stock[mine.dataset, mine.batch, mine.turn, mine.again])
            endings = [("_again" if mine.again else ""), *(["_twice"] if twice and mine.batch == 1 else [])]
            for dataset in (mine.dataset + ending for ending in endings):
                groups[dataset, mine.batch].append(pair)
                if mine.batch == 1:
                    groups[f"{dataset}/{mine.category}", 1].append(pair)
        for (dataset, batch), pairs in groups.items():
            records += _figures(arm, dataset, {"batch": batch}, pairs)
    return records


def _figures(
    arm: str, dataset: str, params: dict[str, Any], pairs: list[tuple[DrafterRun, DrafterRun]]
) -> list[Record]:
    def total(runs: Sequence[DrafterRun], key: str) -> float:
        return sum(r.answer[key] for r in runs)

    mine, stock = [p[0] for p in pairs], [p[1] for p in pairs]

    def speed(runs: Sequence[DrafterRun], key: str) -> float:
        count = sum(r.tokens for r in runs) if key == "seconds" else total(runs, "emitted")
        return count / max(total(runs, key), 1e-9)

    def ratio(key: str) -> tuple[float, list[float]]:
        # The geometric mean over prompts: every prompt counts the same, and a stall of the machine in one run, which
        # would rule a ratio of sums, weighs as little as it should.
        each = [x / y for a, b in pairs if (x := speed([a], key)) > 0 and (y := speed([b], key)) > 0] or [1.0]
        return statistics.geometric_mean(each), [round(x, 4) for x in each]

    same = [x == y for a, b in pairs for x, y in zip(a.answer["tokens"], b.answer["tokens"], strict=True)]
    steps = max(total(mine, "request_steps"), 1)
    whole = ratio("seconds")
    rows = [
        ("speedup", whole[0], "x", whole[1]),
        ("median_speedup", statistics.median(whole[1]), "x", []),
        ("tokens_per_second", speed(mine, "seconds"), "tokens/s", []),
        ("stock_tokens_per_second", speed(stock, "seconds"), "tokens/s", []),
        ("accepted_length", total(mine, "emitted") / steps, "tokens", []),
        ("drafted_per_step", total(mine, "drafted") / steps, "tokens", []),
        ("identical_share", sum(same) / len(same), "", []),
    ]
    if params["batch"] == 1:  # in a batch, prompts and decoding overlap
        decode = ratio("decode_seconds")
        rows.insert(1, ("decode_speedup", decode[0], "x", decode[1]))
    if requests := sum(r.answer["proposing"].get("requests", 0) for r in mine):
        seconds = sum(r.answer["proposing"]["seconds"] for r in mine)
        rows.append(("proposal_ms", 1e3 * seconds / requests, "ms/request", []))
    return [Record("drafters", dataset, arm, m, round(v, 4), u, runs, params) for m, v, u, runs in rows]


def print_drafter_table(records: Sequence[Record]) -> None:
    """The overall figures as a table."""
    from rich.table import Table

    table = Table("dataset", "batch", "arm", "speed-up", "decode only", "accepted length", "identical", "proposal ms")
    figures: dict[tuple[str, int, str], dict[str, float]] = defaultdict(dict)
    for r in records:
        if "/" not in r.dataset:
            figures[r.dataset, r.params["batch"], r.arm][r.metric] = r.value
    for (dataset, batch, arm), f in figures.items():
        table.add_row(
            dataset,
            str(batch),
            arm,
            f"{f['speedup']:.2f}x",
            f"{f['decode_speedup']:.2f}x" if "decode_speedup" in f else "",
            f"{f['accepted_length']:.2f}",
            f"{f['identical_share']:.0%}",
            f"{f['proposal_ms']:.2f}" if "proposal_ms" in f else "",
        )
    Console().print(table)
