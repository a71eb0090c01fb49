"""The KV benchmark's figures from an engine that is played, and what its command refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from pilotfish.integrations.vllm.bench import kv
from pilotfish.integrations.vllm.bench.kv import Arm

ARMS = [Arm("none", None), Arm("tidal_decode@budget=256", {"budget": 256})]


class Played:
    """Steps take 20 ms with stock attention and 10 ms with the policy, on a machine that slows from turn to turn."""

    def __init__(self) -> None:
        self.options: Any = None
        self.asked: list[str] = []

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.asked.append(do)
        if do == "policy":
            self.options = values["options"]
            return {}
        if do == "steps":
            seconds = (0.02 if self.options is None else 0.01) * (1 + self.asked.count("steps") // 3)
            return {"seconds": [seconds] * values["count"]}
        texts = values["texts"]
        if values["keep"]:
            return {"nll": [[2.0] * len(t) for t in texts], "kl": [], "same": []}
        shape = [len(t) for t in texts]
        return {
            "nll": [[2.5] * n for n in shape],
            "kl": [[0.1] * n for n in shape],
            "same": [[True] * n for n in shape],
        }


def bar() -> tuple[Progress, Any]:
    progress = Progress(disable=True)
    return progress, progress.add_task("", total=None)


def test_step_times_are_compared_turn_by_turn() -> None:
    engine = Played()
    records = kv.speed(engine, ARMS, list(range(100)), 40, 2, *bar())  # type: ignore[arg-type]
    speedup = next(r for r in records if r.metric == "step_speedup")
    assert (speedup.arm, speedup.dataset, speedup.params) == (
        "tidal_decode@budget=256",
        "context_40",
        {"batch": 2, "context": 40},
    )
    assert len(speedup.runs) == kv.TURNS
    assert 0.9 < speedup.value < 2.1
    assert engine.asked[:2] == ["policy", "steps"], "prompts are prefilled before anything is timed"
    assert {r.metric for r in records} == {"step_ms", "step_speedup"}


def test_quality_is_measured_against_full_attention() -> None:
    records = kv.quality(Played(), ARMS, "wikitext2", list(range(1000)), 64, 16, *bar())  # type: ignore[arg-type]
    values = {(r.arm, r.metric): r.value for r in records}
    assert values == {
        ("none", "nll"): 2.0,
        ("tidal_decode@budget=256", "kl"): 0.1,
        ("tidal_decode@budget=256", "nll_delta"): 0.5,
        ("tidal_decode@budget=256", "same_top"): 1.0,
    }


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
    ],
)
def test_bench_kv_refuses_bad_input(cli: Callable, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    answer = cli("bench", "kv", *(a.format(short=short) for a in arguments))
    assert answer.returncode == 2, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
