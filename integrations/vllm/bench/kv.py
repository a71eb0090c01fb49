"""KV policies side by side: decode steps timed in turns, and what reading less does to the distributions.

All arms share one engine, one cache and one clock: the policy is changed between runs, stock attention being one of
them. Prompts are prefilled once with full attention, which no policy changes, and found again by prefix caching.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from ....plugins.config import ConfigError, parse_assignments
from ....plugins.manager import plugins
from .. import models
from ..progress import console as status
from ..progress import counting_bar
from ..serving import check_model
from . import record
from .engine import EngineProcess
from .record import Record

STOCK = "none"
WORKER = ("-m", "pilotfish.integrations.vllm.bench.kv_worker")
TURNS = 5
STEPS = 12  # timed in every turn
TEXTS = 4  # decoded together when distributions are compared


@dataclass(frozen=True)
class Plan:
    """What to measure; see `pilotfish bench kv --help`."""

    policy: str
    settings: tuple[str, ...]  # "key=value,..." for each arm
    texts: tuple[Path, ...]
    model: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    quality_context: int
    quality_tokens: int
    dtype: str
    out: Path


@dataclass(frozen=True)
class Arm:
    """One setting of the policy; None is stock attention."""

    label: str
    options: dict[str, Any] | None


def arms_of(plan: Plan) -> list[Arm]:
    """Stock attention, then every setting, checked.

    Raises:
        ConfigError: no such policy, or a setting that it refuses.
    """
    arms = [Arm(STOCK, None)]
    for setting in plan.settings:
        selection = parse_assignments(",".join(filter(None, (plan.policy, setting))))
        plugins().resolve("kv", selection)
        arms.append(Arm(f"{plan.policy}@{setting}" if setting else plan.policy, dict(selection.options)))
    return arms


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ConfigError: it cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {getattr(error, 'strerror', None) or error}") from None


def run(plan: Plan) -> list[Record]:
    """Measure, write the JSON after every part, print the figures."""
    arms = arms_of(plan)
    texts = {path: read_text(path) for path in plan.texts}
    record.check(plan.out)
    check_model(plan.model)
    folder = models.resolve(plan.model)
    encoded = _encode(folder, texts, plan)
    config = {
        "model": folder,
        "dtype": plan.dtype,
        "max_model_len": max(*plan.contexts, plan.quality_context + plan.quality_tokens) + TURNS * STEPS,
        "max_num_seqs": max(*plan.batches, TEXTS),
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "seed": 0,
        "additional_config": {"pilotfish": {"kv": plan.policy}},
    }
    records: list[Record] = []
    with counting_bar() as bar, tempfile.TemporaryDirectory() as logs:
        speeds, qualities = len(plan.contexts) * len(plan.batches), len(encoded)
        task = bar.add_task("starting the engine", total=speeds * TURNS * len(arms) + qualities * len(arms))
        with EngineProcess(config, Path(logs) / "engine.log", worker=WORKER) as engine:
            for part in _parts(plan, arms, encoded, engine, bar, task):
                records += part
                record.write(plan.out, records)
    show(records)
    status.print(f"written to {plan.out}", markup=False)
    return records


def _parts(
    plan: Plan, arms: list[Arm], encoded: dict[str, list[int]], engine: EngineProcess, bar: Progress, task: TaskID
) -> Iterator[list[Record]]:
    first = next(iter(encoded.values()))
    for context in plan.contexts:
        for batch in plan.batches:
            bar.update(task, description=f"context {context}, batch {batch}")
            yield speed(engine, arms, first, context, batch, bar, task)
    for dataset, tokens in encoded.items():
        bar.update(task, description=f"quality on {dataset}")
        yield quality(engine, arms, dataset, tokens, plan.quality_context, plan.quality_tokens, bar, task)


def speed(
    engine: EngineProcess, arms: list[Arm], tokens: list[int], context: int, batch: int, bar: Progress, task: TaskID
) -> list[Record]:
    """Decode steps of ``batch`` prompts of ``context`` tokens; the order of the arms changes from turn to turn."""
    stride = (len(tokens) - context) // max(batch, 1)
    prompts = [tokens[i * stride : i * stride + context] for i in range(batch)]
    engine.ask(do="policy", options=None)
    engine.ask(do="steps", prompts=prompts, count=1)  # prefill
    seconds: dict[str, list[float]] = {arm.label: [] for arm in arms}
    for turn in range(TURNS):
        for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
            engine.ask(do="policy", options=arm.options)
            seconds[arm.label].append(
                statistics.median(engine.ask(do="steps", prompts=prompts, count=STEPS)["seconds"])
            )
            bar.advance(task)
    params = {"batch": batch, "context": context}
    records = []
    for arm in arms:
        mine = seconds[arm.label]
        ratios = [a / b for a, b in zip(seconds[STOCK], mine, strict=True)]
        common = ("kv", f"context_{context}", arm.label)
        milliseconds = [round(1e3 * s, 3) for s in mine]
        records.append(Record(*common, "step_ms", statistics.median(milliseconds), "ms", milliseconds, params))
        if arm.options is not None:
            rounded = [round(r, 4) for r in ratios]
            records.append(Record(*common, "step_speedup", statistics.median(rounded), "x", rounded, params))
    return records


def quality(
    engine: EngineProcess,
    arms: list[Arm],
    dataset: str,
    tokens: list[int],
    context: int,
    length: int,
    bar: Progress,
    task: TaskID,
) -> list[Record]:
    """Divergence from full attention while texts are decoded token by token, each arm living with its own cache."""
    stride = (len(tokens) - context - length) // TEXTS
    prompts = [tokens[i * stride : i * stride + context] for i in range(TEXTS)]
    texts = [tokens[i * stride + context : i * stride + context + length] for i in range(TEXTS)]
    params = {"context": context, "tokens": length * TEXTS}
    records, reference = [], 0.0
    for arm in arms:
        engine.ask(do="policy", options=arm.options)
        answer = engine.ask(do="forced", prompts=prompts, texts=texts, keep=arm.options is None)
        nll = [statistics.fmean(x) for x in answer["nll"]]
        common = ("kv", dataset, arm.label)
        bar.advance(task)
        if arm.options is None:
            reference = statistics.fmean(nll)
            records.append(Record(*common, "nll", round(reference, 5), "nats", [round(x, 5) for x in nll], params))
            continue
        kl = [statistics.fmean(x) for x in answer["kl"]]
        same = statistics.fmean(x for row in answer["same"] for x in row)
        records += [
            Record(*common, "kl", round(statistics.fmean(kl), 5), "nats", [round(x, 5) for x in kl], params),
            Record(*common, "nll_delta", round(statistics.fmean(nll) - reference, 5), "nats", [], params),
            Record(*common, "same_top", round(same, 4), "", [], params),
        ]
    return records


def _encode(folder: str, texts: dict[Path, str], plan: Plan) -> dict[str, list[int]]:
    """Token ids by dataset, of texts long enough."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    need = max(max(plan.contexts) + max(plan.batches), TEXTS * (plan.quality_tokens + 32) + plan.quality_context)
    encoded: dict[str, list[int]] = {}
    for path, text in texts.items():
        ids = tokenizer(text[: 12 * need], add_special_tokens=False)["input_ids"]
        if len(ids) < need:
            raise ConfigError(f"--text {path}: {len(ids)} tokens, at least {need} are needed")
        encoded[path.absolute().parent.name] = ids
    return encoded


def show(records: list[Record]) -> None:
    """The figures as a table."""
    from rich.table import Table

    table = Table("dataset", "batch", "arm", "metric", "value")
    for r in records:
        table.add_row(r.dataset, json.dumps(r.params.get("batch", "")), r.arm, r.metric, f"{r.value:.4g} {r.unit}")
    Console().print(table)
