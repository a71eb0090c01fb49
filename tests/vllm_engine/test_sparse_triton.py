"""TidalDecode over vLLM's Triton backend in a real engine, kernels interpreted: the text is that of the CPU backend.

Two implementations that share no code below the policy: C++ and Triton kernels, other cache layouts, blocks of 128 and
of 16, one with requests cut out of the batch and one with shortened block tables.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotfish.integrations.vllm.bench.engine import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WORKER = Path(__file__).parent / "triton_worker.py"
PAGE = {"budget": 160, "sinks": 4, "recent": 32, "aggregate": "sum", "granularity": "page"}
TOKEN = {**PAGE, "budget": 100, "aggregate": "kv_head", "granularity": "token"}
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


def interpreted(model: str, folder: Path, runner: str, **config: Any) -> EngineProcess:
    common = {
        "model": model,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "block_size": 16,
        "seed": 0,
    }
    log = folder / "engine.log"
    return EngineProcess({**common, **config}, log, worker=(str(WORKER),), VLLM_USE_V2_MODEL_RUNNER=runner)


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory, expected) -> Iterator[EngineProcess]:
    with interpreted(tiny_model, tmp_path_factory.mktemp("v1"), "0", **policy()) as engine:
        yield engine


def test_the_backend_is_ours(engine: EngineProcess) -> None:
    assert engine.ask(do="attention")["impl"] == ["SparseTritonImpl"]


@pytest.mark.parametrize(
    ("roles", "rule", "text"), [("all choose", PAGE, "whole"), ("sparse", PAGE, "page"), ("sparse", TOKEN, "token")]
)
def test_the_text_is_that_of_the_other_backend(
    engine: EngineProcess, expected: dict[str, Any], roles: str, rule: dict[str, Any], text: str
) -> None:
    assert plan(engine, roles, rule) == expected[text]


def test_a_budget_that_covers_the_context_changes_nothing(engine: EngineProcess, expected: dict[str, Any]) -> None:
    assert plan(engine, "sparse", {**PAGE, "budget": 512}) == expected["whole"]


def test_the_v2_model_runner(tiny_model, tmp_path, expected: dict[str, Any]) -> None:
    """The default of GPU engines."""
    with interpreted(tiny_model, tmp_path, "1", **policy()) as engine:
        assert engine.ask(**ASK)["tokens"] == expected["page"]
