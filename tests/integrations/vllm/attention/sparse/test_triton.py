"""TidalDecode over vLLM's Triton backend in a real engine, kernels interpreted: the text is that of the CPU backend.

Two implementations that share no code below the policy: C++ and Triton kernels, other cache layouts, blocks of 128 and
of 16, one with requests cut out of the batch and one with shortened block tables.
"""

import random
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench.engine import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

PAGE = {"budget": 160, "sinks": 4, "recent": 32, "head_aggregation": "sum", "granularity": "page"}
TOKEN = {**PAGE, "budget": 100, "head_aggregation": "kv_head", "granularity": "token"}
ROLES = {"sparse": ["SELECT", "SPARSE"], "all choose": ["SELECT", "SELECT"]}
GREEDY = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
PROMPTS = [
    ([random.Random(i).randrange(1000, 40000) for i in range(60)] * 5)[:n]
    for n in (250, 40, 190)  # beyond the budget, within it, beyond it
]
ASK: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}


def policy(**options: Any) -> dict[str, Any]:
    chosen = {"name": "tidal_decode", "budget": 160, "recent": 32, "full_layers": [], "select_layers": [0], **options}
    return {"additional_config": {"pilotfish": {"kv": chosen}}}


@pytest.fixture(scope="module")
def expected(start, tiny_model) -> dict[str, list[list[int]]]:
    """What the CPU backend's engine writes."""
    engine = start(tiny_model, max_num_batched_tokens=128, **policy())
    texts = {"whole": plan(engine, "all choose", PAGE)}
    texts |= {name: plan(engine, "sparse", rule) for name, rule in (("page", PAGE), ("token", TOKEN))}
    engine.close()
    assert texts["page"] != texts["whole"] != texts["token"], "what is not read makes a difference"
    return texts


def plan(engine: EngineProcess, roles: str, rule: dict[str, Any]) -> list[list[int]]:
    engine.ask(do="attention", plan={"roles": ROLES[roles], "rule": rule})
    return engine.ask(**ASK)["tokens"]


@pytest.fixture(scope="module")
def engine(tiny_model, start_interpreted, expected) -> EngineProcess:
    del expected  # its engine has ended
    return start_interpreted(tiny_model, "0", block_size=16, **policy())


def test_the_backend_is_ours(engine: EngineProcess) -> None:
    assert engine.ask(do="attention")["impl"] == ["SparseTritonImpl"]


@pytest.mark.parametrize(
    ("roles", "rule", "text"), [("all choose", PAGE, "whole"), ("sparse", PAGE, "page"), ("sparse", TOKEN, "token")]
)
@pytest.mark.shows("tidal_decode", "Triton kernels, interpreted")
def test_the_text_is_that_of_the_other_backend(
    engine: EngineProcess, expected: dict[str, Any], roles: str, rule: dict[str, Any], text: str
) -> None:
    assert plan(engine, roles, rule) == expected[text]


def test_a_budget_that_covers_the_context_changes_nothing(engine: EngineProcess, expected: dict[str, Any]) -> None:
    assert plan(engine, "sparse", {**PAGE, "budget": 512}) == expected["whole"]


@pytest.mark.shows("tidal_decode", "vLLM's V2 model runner")
def test_the_v2_model_runner(tiny_model, start_interpreted, expected: dict[str, Any]) -> None:
    """The default of GPU engines."""
    engine = start_interpreted(tiny_model, "1", block_size=16, **policy())
    assert engine.ask(**ASK)["tokens"] == expected["page"]
