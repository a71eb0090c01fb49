"""TidalDecode on a hybrid model: sliding-window layers keep vLLM's attention, full-attention layers become sparse."""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
PROMPTS = [[random.Random(i).randrange(1000, 40000) for _ in range(n)] for i, n in enumerate((900, 60))]
ASK: dict[str, Any] = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 2}


@pytest.fixture(scope="module")
def gemma3(random_model: Callable[..., str]) -> str:
    """A Gemma 3 of random weights: eight layers, every second one with a sliding window of 64 tokens."""
    from transformers import Gemma3ForCausalLM

    return random_model(
        Gemma3ForCausalLM,
        num_hidden_layers=8,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 4,
        tie_word_embeddings=False,  # tied, a random model repeats its last token
    )


def kv(**options: Any) -> dict[str, Any]:
    """Return engine arguments that select TidalDecode with its default layers."""
    return {"additional_config": {"pilotfish": {"kv": {"name": "tidal_decode", **options}}}}


@pytest.mark.shows("tidal_decode", "hybrid models")
def test_default_layers_serve_gemma3(start, gemma3: str) -> None:
    stock = start(gemma3, max_num_batched_tokens=128)
    expected = stock.ask(**ASK)["tokens"]
    stock.close()
    sparse = start(gemma3, max_num_batched_tokens=128, **kv(budget=128))
    answers = sparse.ask(**ASK)["tokens"]
    sparse.close()
    assert answers[1] == expected[1], "the short request fits the budget"
    assert answers[0] != expected[0], "the long request reads a part of its context"


@pytest.mark.long
def test_a_budget_beyond_the_context_changes_nothing(start, gemma3: str) -> None:
    stock = start(gemma3, max_num_batched_tokens=128)
    expected = stock.ask(**ASK)["tokens"]
    stock.close()
    whole = start(gemma3, max_num_batched_tokens=128, **kv(budget=1024))
    assert whole.ask(**ASK)["tokens"] == expected
    whole.close()


@pytest.mark.long
def test_v2_runner_gives_the_same_output(start, start_interpreted, gemma3: str) -> None:
    ask = {"do": "sample", "prompts": [p[:250] for p in PROMPTS], "sampling": [{**GREEDY, "max_tokens": 4}] * 2}
    native = start(gemma3, max_num_batched_tokens=128, **kv(budget=128))
    expected = native.ask(**ask)["tokens"]
    native.close()
    engine = start_interpreted(gemma3, "1", **kv(budget=128))
    assert engine.ask(**ask)["tokens"] == expected
