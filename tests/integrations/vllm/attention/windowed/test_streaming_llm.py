"""StreamingLLM in a running engine: identical output where nothing is evicted, and a bounded KV cache."""

from typing import Any

import pytest
from engine_prompts import PROMPTS, ask

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = 32


def kv(**options: Any) -> dict[str, Any]:
    """Return engine arguments that select StreamingLLM."""
    return {"additional_config": {"pilotfish": {"kv": {"name": "streaming_llm", **options}}}, "block_size": BLOCK}


ASK = ask(PROMPTS)


@pytest.fixture(scope="module")
def stock(stock_engine) -> list[list[int]]:
    tokens = stock_engine.ask(**ASK)["tokens"]
    stock_engine.close()
    return tokens


@pytest.mark.long
@pytest.mark.shows("streaming_llm", "full budget equals stock")
def test_output_is_identical_with_a_budget_beyond_the_context(start, model, stock) -> None:
    engine = start(model, max_num_batched_tokens=128, **kv(budget=1024))
    assert engine.ask(**ASK)["tokens"] == stock
    engine.close()


@pytest.mark.long
@pytest.mark.shows("streaming_llm", "batches of mixed requests", "chunked prefill")
def test_every_head_keeps_the_budget_only(start, model, stock) -> None:
    engine = start(model, max_num_batched_tokens=128, **kv(budget=100, prefill="streaming"))
    together = engine.ask(**ASK)["tokens"]
    assert together == [engine.ask(**ask([p]))["tokens"][0] for p in PROMPTS]
    assert together[1] == stock[1], "whole blocks are kept, which hold all of the short request"
    assert together[0] != stock[0], "the long request loses tokens"
    engine.ask(do="blocks")
    engine.ask(**ask(PROMPTS[:1]))
    blocks = engine.ask(do="blocks")
    assert blocks["free"] == blocks["all"]
    groups = 6  # vLLM's groups of cache layers, each with its own blocks
    assert blocks["all"] - blocks["least"] <= groups * (1 + (96 + 128) // BLOCK + 1)
    engine.close()
