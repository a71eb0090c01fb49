"""Checks that apply to every plugin of the language model, in a running engine; see `default_plugins`.

Visual pruners have the same checks in `vision/test_models.py`, since they need another model.
"""

from collections.abc import Callable
from typing import Any

import pytest
from default_plugins import DRAFTERS, KV_POLICIES, PluginCase

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
TEXTS = [[5, 6, 7, 8, 9], [100, 200, 300], [1000] * 20]
LONG = [[*range(2000, 2200)]]


def engine_arguments(drafting_args: Callable[..., dict[str, Any]], *cases: PluginCase) -> dict[str, Any]:
    """Arguments of an engine with these plugins."""
    config: dict[str, Any] = {}
    for case in cases:
        if case.kind == "drafter":
            config |= drafting_args(name=case.name)
    selected = {case.kind: {"name": case.name, **case.options} for case in cases}
    return {**config, "additional_config": {"pilotfish": selected}}


def sample(engine: Any, texts: list[list[int]], **sampling: Any) -> dict[str, Any]:
    return engine.ask(do="sample", prompts=texts, sampling=[{**GREEDY, **sampling}] * len(texts))


@pytest.fixture(scope="module")
def stock(start: Callable, tiny_model: str) -> dict[str, Any]:
    """Tokens and attention classes of an engine that does not load Pilotfish."""
    engine = start(tiny_model, env={"VLLM_PLUGINS": ""})
    answers = {"tokens": sample(engine, TEXTS)["tokens"], "state": engine.ask(do="state")}
    engine.close()
    return answers


@pytest.mark.parametrize(
    "cases",
    [
        (),
        (DRAFTERS[0], KV_POLICIES[0]),
        pytest.param((DRAFTERS[1], KV_POLICIES[1]), marks=pytest.mark.long),
    ],
    ids=lambda cases: "+".join(map(str, cases)) or "none",
)
def test_disabled_plugins_have_no_effect(start, tiny_model, drafting_args, stock, cases) -> None:
    """Nothing selected, or everything disabled: the classes and the output of an engine without Pilotfish."""
    engine = start(tiny_model, {"PILOTFISH_DISABLE": "1"} if cases else None, **engine_arguments(drafting_args, *cases))
    state, answer = engine.ask(do="state"), sample(engine, TEXTS)
    engine.close()
    assert answer["tokens"] == stock["tokens"]
    assert answer["drafted"] == 0
    assert state["wrapped"] == []
    if not any(case.kind == "drafter" for case in cases):  # vLLM itself reserves KV slots for draft tokens
        assert state == stock["state"]


CHECKED_IN_CI = {"token_recycling", "tidal_decode"}  # one of each kind


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in CHECKED_IN_CI else pytest.mark.long) for c in (*DRAFTERS, *KV_POLICIES)],
    ids=str,
)
def test_a_plugin_reports_counts_and_serves(start, tiny_model, drafting_args, stock, case: PluginCase) -> None:
    more: dict[str, Any] = {"block_size": 32} if case.kind == "kv" else {}
    more["disable_log_stats"] = False  # vLLM's metrics call the plugins' counters
    engine = start(tiny_model, {"VLLM_LOGGING_LEVEL": "INFO"}, **more, **engine_arguments(drafting_args, case))
    report = f"pilotfish: {case.kind} {case.name} selected"
    assert report in engine.log.read_text(errors="replace")
    before = engine.ask(do="metrics")
    answer = sample(engine, TEXTS)
    if case.kind == "drafter":
        assert answer["tokens"] == stock["tokens"]
        assert answer["drafted"] > 0
        off = sample(engine, TEXTS, extra_args={"pilotfish_drafter": "off"})
        assert off["tokens"] == stock["tokens"]
        assert off["drafted"] == 0, "disabled per request"
    else:
        assert len(sample(engine, LONG)["tokens"][0]) == GREEDY["max_tokens"]
    after = engine.ask(do="metrics")
    engine.close()
    for counter in case.counters:
        assert after[counter] > before.get(counter, 0) or counter.endswith("accepted_tokens_total"), counter
