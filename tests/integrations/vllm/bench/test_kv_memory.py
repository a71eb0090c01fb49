"""Memory benchmark of KV policies that free blocks, with fake engines: engine arguments, and compared metrics."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench import kv_memory, kv_work, needle_in_haystack
from pilotfish.integrations.vllm.bench.kv_work import STOCK, KVArm, KVBenchmark

POLICY = KVArm("razor_attention", {"window": 64}, "razor_attention")


class FakeEngine:
    """Fake engine: with the policy it uses half the memory, and is twice as fast."""

    def __init__(self, config: dict[str, Any], log: Path, worker: tuple[str, ...]) -> None:
        del log, worker
        self.config = config
        self.ours = bool(config["additional_config"])
        self.factor = 0.5 if self.ours else 1.0
        self.asked: list[str] = []
        STARTED.append(self)

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.asked.append("end")

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.asked.append(do)
        if do == "capacity":
            return {"tokens": 1000 / self.factor, "concurrency": 2 / self.factor}
        if do == "load":
            load = {"steps": 90, "peak": 3, "preempted": 0, "least_free": 5, "blocks": 10, "free_at_end": 10}
            return {**load, "seconds": 20 * self.factor, "tokens": []}
        if do == "hold":
            return {"bytes": len(values["prompts"]) * self.factor * 2**20}
        if do == "go_on":
            return {"seconds": [0.02 * self.factor] * values["count"]}
        if do == "let_go":
            return {}
        lengths = [len(t) for t in values["texts"]]
        if values["keep"] is None:
            return {"right": [[not self.ours] * n for n in lengths]}
        nll = {"nll": [[2.0 + self.ours] * n for n in lengths]}
        if not self.ours:
            return nll
        return {**nll, "kl": [[0.1] * n for n in lengths], "same": [[True] * n for n in lengths]}


STARTED: list[FakeEngine] = []


class CharacterTokenizer:
    """Tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> kv_memory.KVMemoryWork:
    """Return the benchmark with fake engines."""
    STARTED.clear()
    monkeypatch.setattr(kv_memory, "EngineProcess", FakeEngine)
    plan = KVBenchmark(
        "razor_attention",
        ("window=64",),
        (),
        "m",
        (300,),
        (1, 2),
        (200,),
        8,
        "bfloat16",
        tmp_path,
        needle_contexts=(400,),
    )
    text = "".join(chr(97 + i * i % 23) for i in range(20000))
    return kv_memory.KVMemoryWork(plan, [KVArm(STOCK, None), POLICY], "m", CharacterTokenizer(), {"t": text}, text)


def values(records: list[Any], metric: str) -> dict[str, float]:
    """Return the values of a metric by arm."""
    return {r.arm: r.value for r in records if r.metric == metric}


def test_load_can_be_skipped(work: kv_memory.KVMemoryWork, tmp_path: Path) -> None:
    without = replace(work, plan=replace(work.plan, requests=0))
    parts = [name for name, _ in without.parts_in(tmp_path)]
    assert "a load" not in parts
    assert any(name.startswith("steps of") for name in parts)


def test_all_parts_are_compared_with_stock_attention(work: kv_memory.KVMemoryWork, tmp_path: Path) -> None:
    parts = {name.split(" of ")[0]: [] for name, _ in work.parts_in(tmp_path)}
    for name, part in work.parts_in(tmp_path):
        parts[name.split(" of ")[0]] += part()
    load = parts["a load"]
    assert values(load, "capacity_ratio") == {STOCK: 1.0, POLICY.label: 2.0}
    assert values(load, "load_speedup") == {STOCK: 1.0, POLICY.label: 2.0}
    assert values(load, "least_free_share")[STOCK] == 0.5
    assert values(load, "blocks_lost") == {STOCK: 0.0, POLICY.label: 0.0}
    steps = parts["steps"]
    assert [r.params["batch"] for r in steps if r.metric == "kv_reduction" and r.arm == POLICY.label] == [1, 2]
    assert values(steps, "kv_reduction") == values(steps, "step_speedup") == {STOCK: 1.0, POLICY.label: 2.0}
    quality = parts["quality"]
    assert values(quality, "nll") == {STOCK: 2.0, POLICY.label: 3.0}
    assert values(quality, "kl") == {POLICY.label: 0.1}
    assert values(quality, "needle_recall") == {STOCK: 1.0, POLICY.label: 0.0}


def test_all_engines_get_the_same_memory_and_are_closed(work: kv_memory.KVMemoryWork, tmp_path: Path) -> None:
    for _, part in work.parts_in(tmp_path):
        part()
    loads = [engine for engine in STARTED if "load" in engine.asked]
    assert [engine.config["kv_cache_memory_bytes"] for engine in loads] == [kv_memory.MEMORY] * 2
    assert all(engine.asked[-1] == "end" for engine in STARTED)
    assert all(engine.config["enable_prefix_caching"] is False for engine in STARTED if engine.ours)


def test_unselected_parts_start_no_engine(work: kv_memory.KVMemoryWork, tmp_path: Path) -> None:
    from dataclasses import replace

    bare = replace(work, plan=replace(work.plan, contexts=(), quality_contexts=(), needle_contexts=()))
    assert list(bare.parts_in(tmp_path)) == []
    assert kv_work.KVBenchmark.needles == needle_in_haystack.ROUNDS
