"""Metrics of the KV benchmark with a fake engine, and input that its command refuses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench import kv, kv_work
from pilotfish.integrations.vllm.bench.kv_work import KVArm
from pilotfish.integrations.vllm.bench.needle_in_haystack import NeedleQuestion
from pilotfish.plugins.config import ConfigError

ARMS = [KVArm("none", None), KVArm("tidal_decode@budget=256", {"budget": 256})]


class FakeEngine:
    """Fake engine: steps take 20 ms with stock attention, 10 ms with the policy, 4 ms with next to no attention.

    They get slower from turn to turn.
    """

    def __init__(self) -> None:
        self.options: Any = None
        self.seconds = 0.02
        self.asked: list[str] = []

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.asked.append(do)
        if do in ("policy", "least_attention"):
            self.options = values.get("options")
            self.seconds = 0.004 if do == "least_attention" else 0.02 if self.options is None else 0.01
            return {}
        if do == "steps":
            seconds = self.seconds * (1 + self.asked.count("steps") // 4)
            return {"seconds": [seconds] * values["count"]}
        lengths = [len(t) for t in values["texts"]]
        if values["keep"] is None:
            return {"right": [[self.options is None] * n for n in lengths]}
        if values["keep"]:
            return {"nll": [[2.0] * n for n in lengths]}
        return {
            "nll": [[2.5] * n for n in lengths],
            "kl": [[0.1] * n for n in lengths],
            "same": [[True] * n for n in lengths],
        }


def test_step_speedup_is_computed_per_turn() -> None:
    engine = FakeEngine()
    records = kv_work.measure_kv_step_times(engine, ARMS, [list(range(40)), list(range(1, 41))])
    speedup = next(r for r in records if r.metric == "step_speedup")
    assert (speedup.arm, speedup.dataset, speedup.params) == (
        "tidal_decode@budget=256",
        "context_40",
        {"batch": 2, "context": 40},
    )
    assert len(speedup.runs) == kv_work.TURNS
    assert 0.9 < speedup.value < 2.1
    assert engine.asked[:2] == ["policy", "steps"], "prompts are prefilled before anything is timed"
    assert {r.metric for r in records} == {"step_ms", "step_speedup", "bound_share"}


def test_an_engine_starts_with_a_policy_that_keeps_the_bounds_of_all_settings() -> None:
    def arm(policy: str, **options: Any) -> KVArm:
        return KVArm(policy, options, policy)

    stock, plain = KVArm(kv_work.STOCK, None), arm("tidal_decode", budget=512)
    two_pass = {"select": "two_pass", "select_layers": (2, 5)}
    assert kv._engine_policy([stock, plain]) == {"name": "tidal_decode"}
    assert kv._engine_policy([stock, plain, arm("quest")]) == {"name": "quest", "full_layers": 0}
    assert kv._engine_policy([stock, plain, arm("tidal_decode", **two_pass)]) == {"name": "tidal_decode", **two_pass}
    other = arm("tidal_decode", **{**two_pass, "select_layers": (3,)})
    with pytest.raises(ConfigError, match="need the same selection layers"):
        kv._engine_policy([stock, arm("tidal_decode", **two_pass), other])


def test_bound_share_is_the_time_saved_in_parts_of_the_most_that_can_be_saved() -> None:
    records = kv_work.measure_kv_step_times(FakeEngine(), ARMS, [[1, 2]])
    (share,) = (r for r in records if r.metric == "bound_share")
    assert share.arm == "tidal_decode@budget=256"
    assert 0.5 < share.value < 0.8, "10 of 16 ms, up to the drift"
    steps = {r.arm: r.value for r in records if r.metric == "step_ms"}
    assert steps[kv_work.LEAST] < steps[share.arm] < steps[kv_work.STOCK]


def test_quality_is_measured_against_full_attention() -> None:
    records = kv_work.measure_divergence(FakeEngine(), ARMS, "wikitext2", [list(range(80)) for _ in range(4)], 64)
    values = {(r.arm, r.metric): r.value for r in records}
    assert values == {
        ("none", "nll"): 2.0,
        ("none", "perplexity"): round(math.exp(2.0), 4),
        ("tidal_decode@budget=256", "kl"): 0.1,
        ("tidal_decode@budget=256", "nll_delta"): 0.5,
        ("tidal_decode@budget=256", "perplexity"): round(math.exp(2.5), 4),
        ("tidal_decode@budget=256", "same_top"): 1.0,
    }
    assert all(r.params == {"context": 64, "tokens": 64} for r in records)


def test_questions_are_asked_under_every_arm() -> None:
    groups = [[NeedleQuestion([1], [2], [3, 4], 0.0), NeedleQuestion([1], [2], [5], 1.0)]]
    records = kv_work.measure_answers(FakeEngine(), ARMS, "kv_retrieval", "exact_match", groups, 1)
    values = {r.arm: r.value for r in records if r.metric == "exact_match"}
    assert values == {"none": 1.0, "tidal_decode@budget=256": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "none.txt"), "none.txt: No such file"),
        (("--text", "{short}"), "tokens, at least"),
        (("--text", "{short}", "--policy", "tidal"), "did you mean 'tidal_decode'?"),
        (("--text", "{short}", "--setting", "budget=100"), "multiple of 32"),
        (("--text", "{short}", "--contexts", "1k"), "--contexts: expected whole numbers"),
        (("--text", "{short}", "--batches", "0"), "--batches: expected numbers from 1"),
        (("--text", "{short}", "--model", "./no"), "no such folder"),
        (("--contexts", "8190"), "smollm2-135m-instruct has 8192 positions"),
        (("--haystack", "none.txt"), "--haystack none.txt: No such file"),
        (("--kv-retrieval", "{short}"), "not a file of dictionaries"),
        (("--data", "no-such-folder"), "--data no-such-folder: wikitext2 is missing"),
        (("--dtype", "foo"), "expected one of auto"),
        (("--setting", "select_layers=[99]"), "layers 0 to 29"),
        (("--setting", "profile=nosuch.json"), "nosuch.json"),
        (("--needle-contexts", "10"), "a context of 64 tokens at least"),
        (("--model", "{empty}"), "model {empty}: "),
        (("--contexts", "", "--quality-contexts", "", "--needle-contexts", ""), "there is nothing to measure"),
    ],
)
def test_bench_kv_refuses_bad_input(inside: Callable, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    empty = tmp_path / "model"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    answer = inside("bench", "kv", *(a.format(short=short, empty=empty) for a in arguments))
    assert answer.returncode == 2, answer
    assert message.format(empty=empty) in answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_bench_kv_refuses_bad_input_in_a_process(cli: Callable) -> None:
    answer = cli("bench", "kv", "--contexts", "1k")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("pilotfish: --contexts: expected whole numbers")
