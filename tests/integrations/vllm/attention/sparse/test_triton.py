"""TidalDecode with vLLM's Triton backend in a running engine, interpreted: output equals that of the CPU backend.

Below the policy the two implementations share no code: they have C++ and Triton kernels, different cache layouts, and
blocks of 128 and of 16 tokens; one removes sparse requests from the batch, the other shortens their block tables.
"""

import random
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench.engine import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PAGE = {"budget": 160, "sinks": 4, "recent": 32, "head_aggregation": "sum", "granularity": "page"}
TOKEN = {**PAGE, "budget": 100, "head_aggregation": "kv_head", "granularity": "token"}
ROLES = {"sparse": ["SELECT", "SPARSE"], "all choose": ["SELECT", "SELECT"]}
GREEDY = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "detokenize": False}
PROMPTS = [
    ([random.Random(i).randrange(1000, 40000) for i in range(60)] * 5)[:n]
    for n in (250, 40, 190)  # over, within and over the budget
]
SMALL_PROMPTS = [[random.Random(97 * i).randrange(3, 512) for i in range(n)] for n in (200, 40)]  # over 128, within
ASK: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}


def policy(**options: Any) -> dict[str, Any]:
    """Return engine arguments that select TidalDecode."""
    settings = {"name": "tidal_decode", "budget": 160, "recent": 32, "full_layers": [], "select_layers": [0], **options}
    return {"additional_config": {"pilotfish": {"kv": settings}}}


@pytest.fixture(scope="module")
def expected(start, tiny_model) -> dict[str, list[list[int]]]:
    """Return the output of an engine with the CPU backend, by selection rule."""
    engine = start(tiny_model, max_num_batched_tokens=128, **policy())
    texts = {"whole": output_with_plan(engine, "all choose", PAGE)}
    texts |= {name: output_with_plan(engine, "sparse", rule) for name, rule in (("page", PAGE), ("token", TOKEN))}
    engine.close()
    assert texts["page"] != texts["whole"] != texts["token"], "sparse attention changes the output"
    return texts


def output_with_plan(engine: EngineProcess, roles: str, rule: dict[str, Any]) -> list[list[int]]:
    """Set roles and rule of the layers, and return the output."""
    engine.ask(do="attention", plan={"roles": ROLES[roles], "rule": rule})
    return engine.ask(**ASK)["tokens"]


@pytest.fixture(scope="module")
def engine(tiny_model, start_interpreted, expected) -> EngineProcess:
    del expected  # its engine has ended
    return start_interpreted(tiny_model, "0", block_size=16, **policy())


@pytest.mark.long
def test_uses_sparse_triton_backend(engine: EngineProcess) -> None:
    assert engine.ask(do="attention")["impl"] == ["SparseTritonImpl"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("roles", "rule", "text"), [("all choose", PAGE, "whole"), ("sparse", PAGE, "page"), ("sparse", TOKEN, "token")]
)
@pytest.mark.shows("tidal_decode", "Triton kernels, interpreted")
def test_output_matches_cpu_backend(
    engine: EngineProcess, expected: dict[str, Any], roles: str, rule: dict[str, Any], text: str
) -> None:
    assert output_with_plan(engine, roles, rule) == expected[text]


@pytest.mark.long
def test_output_is_identical_with_full_budget(engine: EngineProcess, expected: dict[str, Any]) -> None:
    assert output_with_plan(engine, "sparse", {**PAGE, "budget": 512}) == expected["whole"]


@pytest.mark.long
@pytest.mark.parametrize("attention", ["full", "selected"])
def test_selection_in_two_passes_matches_cpu_backend(tiny_model, start, start_interpreted, attention: str) -> None:
    chosen = policy(select="two_pass", candidates=192, select_attention=attention)
    on_cpu = start(tiny_model, max_num_batched_tokens=128, **chosen)
    tokens = on_cpu.ask(**ASK)["tokens"]
    on_cpu.close()
    interpreted = start_interpreted(tiny_model, "0", block_size=16, **chosen)
    assert interpreted.ask(do="attention")["impl"] == ["PageBoundsTritonImpl"]
    assert interpreted.ask(**ASK)["tokens"] == tokens
    interpreted.close()


@pytest.mark.shows("tidal_decode", "vLLM's V2 model runner")
@pytest.mark.parametrize(
    "release", [pytest.param("0.33", marks=pytest.mark.vllm_033), pytest.param("0.32", marks=pytest.mark.long)]
)
def test_v2_model_runner(small_vocabulary, start_interpreted, start, release: str) -> None:
    """Test the V2 model runner, the default of GPU engines."""
    ask = {"do": "sample", "prompts": SMALL_PROMPTS, "sampling": [GREEDY] * 2}
    arguments = {"skip_tokenizer_init": True, **policy(budget=128, recent=16)}
    native = start(small_vocabulary, max_num_batched_tokens=128, **arguments)
    expected = native.ask(**ask)["tokens"]
    native.ask(do="attention", plan={"roles": ROLES["all choose"], "rule": PAGE})
    assert native.ask(**ask)["tokens"] != expected, "sparse attention changes the output"
    native.close()
    engine = start_interpreted(small_vocabulary, "1", release, block_size=16, **arguments)
    assert engine.ask(**ask)["tokens"] == expected
