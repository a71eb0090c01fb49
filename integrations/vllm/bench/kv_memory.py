"""Benchmark of KV policies that free memory: capacity, load, step times, divergence and needles against stock vLLM.

The KV entries that a policy retains decide the layout of the cache, so every configuration (arm) has its own engine.
Configurations run one after the other, except for step times, which are measured on two engines with interleaved runs.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ...bench.record import Record
from ..serving.progress import counting_bar
from . import needle_in_haystack
from .engine import EngineProcess, share_gpu
from .kv_work import ROOM, STOCK, TEXTS, KVArm, KVWork, divergence_records, run_parts
from .needle_in_haystack import NeedleQuestion

WORKER = ("-m", "pilotfish.integrations.vllm.bench.memory_worker")
MEMORY = 512 << 20  # bytes of KV cache under load, small enough that requests have to wait
COMPLETION = 150  # tokens decoded by each request of the load
TURNS, STEPS = 5, 12  # turns, and decode steps timed in each
CHUNK = 2048  # tokens per prefill step


class KVMemoryWork(KVWork):
    """Parts of a benchmark that starts an engine for every configuration."""

    def config(self, arm: KVArm, longest: int, **more: Any) -> dict[str, Any]:
        """Return the engine arguments of a configuration."""
        policy = {} if arm.options is None else {"pilotfish": {"kv": {"name": arm.policy, **arm.options}}}
        return {
            "model": self.folder,
            "dtype": self.plan.dtype,
            "max_model_len": longest + ROOM,
            "max_num_batched_tokens": CHUNK,
            "enforce_eager": self.plan.eager,
            "async_scheduling": False,
            "enable_prefix_caching": False,
            "seed": 0,
            "additional_config": policy,
            **more,
        }

    def parts_in(self, logs: Path) -> Iterator[tuple[str, Callable[[], list[Record]]]]:
        """Yield the description of each part, and the function that runs it."""
        plan, first = self.plan, next(iter(self.texts))
        if plan.contexts:
            if plan.requests:
                longest = max(plan.contexts)
                asked = [  # from half to the full context
                    ids[: max(1, longest // 2 + i * longest // max(2 * plan.requests - 2, 1))]
                    for i, ids in enumerate(self.cut(first, plan.requests, longest))
                ]
                yield "a load", partial(self.load, longest, asked, logs)
            prompts = [self.cut(first, batch, context) for context in plan.contexts for batch in plan.batches]
            for arm in self.arms[1:]:
                yield f"steps of {arm.label}", partial(self.steps, arm, prompts, logs)
        cuts = [
            (name, context, self.cut(name, TEXTS, context + plan.quality_tokens))
            for name in self.texts
            for context in plan.quality_contexts
        ]
        needles = [
            (
                context,
                list(
                    needle_in_haystack.needle_questions(self.tokenizer, self.haystack, context, plan.seed, plan.needles)
                ),
            )
            for context in plan.needle_contexts
        ]
        looked_up = []
        if plan.kv_retrieval is not None:
            looked_up = needle_in_haystack.dictionary_questions(
                self.tokenizer, plan.kv_retrieval, plan.questions, plan.longest
            )
        for arm in self.arms if cuts or needles or looked_up else ():
            yield f"quality of {arm.label}", partial(self.quality, arm, cuts, needles, looked_up, logs)

    def load(self, longest: int, asked: list[list[int]], logs: Path) -> list[Record]:
        """Send the same requests, all at once, to an engine of every configuration with the same amount of memory."""
        records: list[Record] = []
        base: dict[str, float] = {}
        for arm in self.arms:
            config = self.config(arm, longest, max_num_seqs=len(asked), kv_cache_memory_bytes=MEMORY)
            with EngineProcess(config, logs / "load.log", worker=WORKER) as engine:
                reported = engine.ask(do="capacity")
                metrics = engine.ask(do="load", prompts=asked, tokens=COMPLETION)
            params = {"context": longest, "requests": len(asked), "memory_mib": MEMORY >> 20}
            values = {
                "capacity_tokens": (reported["tokens"], "tokens"),
                "concurrency": (reported["concurrency"], ""),
                "load_s": (metrics["seconds"], "s"),
                "load_steps": (metrics["steps"], ""),
                "peak_decoding": (metrics["peak"], ""),
                "preemptions": (metrics["preempted"], ""),
                "least_free_share": (metrics["least_free"] / metrics["blocks"], ""),
                "blocks_lost": (metrics["blocks"] - metrics["free_at_end"], ""),
            }
            base = base or {name: value for name, (value, _) in values.items()}
            values["capacity_ratio"] = (reported["tokens"] / base["capacity_tokens"], "x")
            values["load_speedup"] = (base["load_s"] / metrics["seconds"], "x")
            records += [
                Record("kv", "load", arm.label, metric, round(float(value), 4), unit, [], params)
                for metric, (value, unit) in values.items()
            ]
        return records

    def steps(self, arm: KVArm, groups: list[list[list[int]]], logs: Path) -> list[Record]:
        """Time interleaved decode steps of a configuration and of stock attention, and measure their KV memory."""
        longest, batch = max(len(g[0]) for g in groups), max(map(len, groups))
        records: list[Record] = []
        with ExitStack() as stack:
            engines = {
                a.label: stack.enter_context(
                    EngineProcess(
                        self.config(a, longest, max_num_seqs=batch, **share_gpu(2)), logs / f"{i}.log", worker=WORKER
                    )
                )
                for i, a in enumerate((self.arms[0], arm))
            }
            for prompts in groups:
                common, params = f"context_{len(prompts[0])}", {"batch": len(prompts), "context": len(prompts[0])}
                seconds: dict[str, list[float]] = {label: [] for label in engines}
                held = {label: e.ask(do="hold", prompts=prompts, tokens=ROOM)["bytes"] for label, e in engines.items()}
                for turn in range(TURNS):
                    for label in sorted(engines, reverse=bool(turn % 2)):
                        answer = engines[label].ask(do="go_on", count=STEPS)
                        seconds[label].append(statistics.median(answer["seconds"]))
                for engine in engines.values():
                    engine.ask(do="let_go")
                for label in engines:
                    if label == STOCK and arm is not self.arms[1]:
                        continue
                    ms = [round(1e3 * s, 3) for s in seconds[label]]
                    ratios = [round(a / b, 4) for a, b in zip(seconds[STOCK], seconds[label], strict=True)]
                    records += [
                        Record("kv", common, label, "step_ms", statistics.median(ms), "ms", ms, params),
                        Record("kv", common, label, "step_speedup", statistics.median(ratios), "x", ratios, params),
                        Record("kv", common, label, "kv_mib", round(held[label] / 2**20, 2), "MiB", [], params),
                        Record(
                            "kv", common, label, "kv_reduction", round(held[STOCK] / held[label], 3), "x", [], params
                        ),
                    ]
        return records

    def quality(
        self,
        arm: KVArm,
        cuts: list[tuple[str, int, list[list[int]]]],
        needles: list[tuple[int, list[list[NeedleQuestion]]]],
        dictionaries: list[NeedleQuestion],
        logs: Path,
    ) -> list[Record]:
        """Measure divergence from stock attention (run first, with saved distributions), needles and dictionaries."""
        stock, rows = arm.options is None, max(TEXTS, needle_in_haystack.ROUNDS, self.plan.needles)
        config = self.config(arm, self.plan.longest, max_num_seqs=rows, enable_prefix_caching=stock)
        records: list[Record] = []
        with EngineProcess(config, logs / "quality.log", worker=WORKER) as engine:
            for number, (name, context, cut) in enumerate(cuts):
                answer = engine.ask(
                    do="forced",
                    prompts=[ids[:context] for ids in cut],
                    texts=[ids[context:] for ids in cut],
                    keep=stock,
                    reference=str(logs / f"{number}.pt"),
                )
                params = {"context": context, "tokens": len(cut) * self.plan.quality_tokens}
                records += divergence_records(("kv", name, arm.label), answer, params)
            for context, groups in needles:
                results = [
                    pair for g in groups for pair in zip(g, needle_in_haystack.answer_questions(engine, g), strict=True)
                ]
                records += needle_in_haystack.needle_records(
                    self.haystack_name, "needle_recall", arm.label, results, context
                )
            if dictionaries:
                name = self.dictionaries_name
                groups = [
                    dictionaries[i : i + needle_in_haystack.ROUNDS]
                    for i in range(0, len(dictionaries), needle_in_haystack.ROUNDS)
                ]
                results = [
                    pair for g in groups for pair in zip(g, needle_in_haystack.answer_questions(engine, g), strict=True)
                ]
                records += needle_in_haystack.needle_records(name, "exact_match", arm.label, results, self.plan.longest)
        return records


def run_memory_benchmark(work: KVWork) -> list[Record]:
    """Run all parts of the benchmark."""
    memory = KVMemoryWork(**vars(work))
    with tempfile.TemporaryDirectory() as logs:
        parts = list(memory.parts_in(Path(logs)))  # raises for texts that are too short, before anything is shown
        with counting_bar() as bar:
            return run_parts(parts, work.plan.out, work.plan.model, bar, bar.add_task("starting", total=len(parts)))
