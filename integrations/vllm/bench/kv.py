"""Benchmark of KV policies: interleaved timings of decode steps, and the effect of sparse reads on distributions.

All configurations (arms) share one engine, one KV cache and one clock: the policy is changed between runs, and stock
attention is one of the configurations. Prompts are prefilled once with full attention, which no policy changes; later
runs reuse them through prefix caching.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ....plugins.config import ConfigError, Selection, parse_assignments
from ....plugins.manager import plugins
from ....plugins.terminal import format_number, make_table, print_plain
from ...bench import record
from ...bench.record import Record
from ..models import registry
from ..serving.command import check_engine, check_model
from ..serving.progress import console as status
from ..serving.progress import counting_bar
from . import corpora, needle_in_haystack
from .engine import EngineProcess
from .kv_work import ROOM, STOCK, TEXTS, KVArm, KVBenchmark, KVWork, _named, max_positions, run_parts

WORKER = ("-m", "pilotfish.integrations.vllm.bench.kv_worker")


def arms_of(plan: KVBenchmark) -> list[KVArm]:
    """Return the configurations: stock attention, then every setting after a check.

    Raises:
        ConfigError: The policy does not exist, or it refuses a setting.
    """
    arms = [KVArm(STOCK, None)]
    if len(set(plan.settings)) < len(plan.settings):
        raise ConfigError("--setting: the same setting is given twice")
    policies = plugins().classes("kv")
    for setting in plan.settings:
        named = setting.partition(",")[0] in policies
        selection = parse_assignments(setting if named else ",".join(filter(None, (plan.policy, setting))))
        cls, _ = plugins().resolve("kv", selection)
        if cls.frees_blocks != policies[plan.policy].frees_blocks:  # type: ignore[attr-defined]
            raise ConfigError(
                f"--setting {setting}: {selection.name} and {plan.policy} cannot share an engine, because one of them "
                "frees KV blocks; measure them separately"
            )
        label = setting.replace(",", "@", 1) if named else f"{plan.policy}@{setting}" if setting else plan.policy
        arms.append(KVArm(label, dict(selection.options), selection.name))
    return arms


def run_kv_benchmark(plan: KVBenchmark) -> list[Record]:
    """Run the benchmark, write the JSON after every part, and print the results."""
    arms = arms_of(plan)
    texts = {name: corpora.read_corpus(path) for name, path in _named(plan.texts).items()} or {
        "sample": corpora.sample_corpus()
    }
    haystack = next(iter(texts.values())) if plan.haystack is None else corpora.read_corpus(plan.haystack, "--haystack")
    record.check_output_path(plan.out)
    if not plan.longest:
        raise ConfigError("no contexts are given: there is nothing to measure")
    check_model(plan.model)
    folder = registry.resolve_model(plan.model)
    for arm in arms[1:]:
        cls, options = plugins().resolve("kv", Selection(arm.policy, arm.options or {}))
        check_engine(cls, options, plan.model, 0, allow_untested=False)
    if (limit := max_positions(folder)) is not None and plan.longest + ROOM > limit:
        subject = f"contexts of {plan.longest} tokens"
        raise ConfigError(f"{subject}: {plan.model} has {limit} positions, {ROOM} are for decoding")
    work = KVWork(plan, arms, folder, corpora.tokenizer_of(folder), texts, haystack)
    if plugins().get("kv", plan.policy).frees_blocks:  # type: ignore[attr-defined]
        from . import kv_memory

        records = kv_memory.run_memory_benchmark(work)
    else:
        records = _in_one_engine(work)
    print_kv_table(records)
    status.print(f"written to {plan.out}", markup=False)
    return records


def _in_one_engine(work: "KVWork") -> list[Record]:
    """Run all parts in one engine; the policy is changed between runs."""
    plan = work.plan
    config = {
        "model": work.folder,
        "dtype": plan.dtype,
        "max_model_len": plan.longest + ROOM,
        "max_num_seqs": max(*plan.batches, TEXTS, needle_in_haystack.ROUNDS, plan.needles),
        "max_num_batched_tokens": 2048,
        "enforce_eager": plan.eager,
        # A full CUDA graph would keep the policy with which it was captured.
        "compilation_config": {"cudagraph_mode": "PIECEWISE"},
        "async_scheduling": False,  # tokens could not be recomputed
        "enable_prefix_caching": True,
        "seed": 0,
        "additional_config": {"pilotfish": {"kv": _engine_policy(work.arms)}},
    }
    parts = list(work.parts())  # raises for texts that are too short, before an engine starts
    with counting_bar() as bar, tempfile.TemporaryDirectory() as logs:
        task = bar.add_task("starting the engine", total=len(parts))
        with EngineProcess(config, Path(logs) / "engine.log", worker=WORKER) as engine:
            return run_parts(
                [(description, partial(part, engine)) for description, part in parts], plan.out, plan.model, bar, task
            )


def _engine_policy(arms: list[KVArm]) -> dict[str, Any]:
    """Return the policy with which the engine starts: one that keeps the bounds of pages that the others need.

    Raises:
        ConfigError: Settings need bounds in different layers.
    """
    if any(arm.policy == "quest" for arm in arms):
        return {"name": "quest", "full_layers": 0}
    in_two_passes = [arm for arm in arms if (arm.options or {}).get("select") == "two_pass"]
    layers = [[(arm.options or {}).get(key) for key in ("select_layers", "profile")] for arm in in_two_passes]
    if any(of_arm != layers[0] for of_arm in layers):
        raise ConfigError("--setting: settings with select=two_pass need the same selection layers in one engine")
    first = in_two_passes[0] if in_two_passes else arms[1]
    return {"name": first.policy, **((first.options or {}) if in_two_passes else {})}


def print_kv_table(records: list[Record]) -> None:
    """Print the results, one table per dataset, batch size and context length."""
    tables: dict[str, Table] = {}
    for r in records:
        if "depth" in r.params:
            continue
        conditions = [f"{key} {json.dumps(r.params[key])}" for key in ("batch", "context") if key in r.params]
        title = ", ".join([r.dataset, *(c for c in conditions if c.replace(" ", "_") != r.dataset)])
        if title not in tables:
            tables[title] = make_table("configuration", "metric", "value", "unit", numbers=("value",), title=title)
        tables[title].add_row(r.arm, r.metric, format_number(r.value), r.unit)
    print_plain(*tables.values())
