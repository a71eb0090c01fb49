"""Quest, and TidalDecode in two passes, in a running engine: bounds of pages survive what happens to blocks."""

from typing import Any

import pytest
from engine_prompts import PROMPTS, ask

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FEW = 12  # output tokens of each request in the tests of two passes
QUEST = {"name": "quest", "budget": 160, "recent": 16}


def kv(**options: Any) -> dict[str, Any]:
    """Return engine arguments that select Quest."""
    return {"additional_config": {"pilotfish": {"kv": {**QUEST, **options}}}}


@pytest.fixture(scope="module")
def stock(stock_engine) -> list[list[int]]:
    tokens = stock_engine.ask(**ask(PROMPTS))["tokens"]
    stock_engine.close()
    return tokens


@pytest.fixture(scope="module")
def quest(start, model, stock):
    del stock  # its engine has ended
    return start(model, max_num_batched_tokens=128, enable_prefix_caching=True, **kv())


@pytest.mark.long
@pytest.mark.shows("quest", "full budget equals stock")
def test_output_is_identical_with_a_budget_beyond_the_context(start, model, stock) -> None:
    engine = start(model, max_num_batched_tokens=128, **kv(budget=1024))
    assert engine.ask(**ask(PROMPTS))["tokens"] == stock
    engine.close()


@pytest.mark.shows("quest", "batches of mixed requests", "chunked prefill", "prefix caching")
def test_output_is_identical_alone_in_a_batch_and_from_the_prefix_cache(quest, stock) -> None:
    """Test that the bounds of shared and of reused blocks are those of their keys."""
    assert quest.ask(do="attention")["impl"] == ["PageBoundsCPUImpl"]
    together = quest.ask(**ask(PROMPTS))["tokens"]
    cached = quest.ask(**ask(PROMPTS))["tokens"]
    alone = [quest.ask(**ask([p]))["tokens"][0] for p in PROMPTS]
    assert together == cached == alone
    assert together[1] == stock[1], "a context within the budget is read completely"
    assert together != stock, "longer contexts are not"


@pytest.mark.long
@pytest.mark.shows("quest", "preemption")
def test_preempted_requests_resume(quest, start, model) -> None:
    """Test the tokens before the first preemption: a request that resumes processes its outputs with full attention."""
    ample = quest.ask(**ask(PROMPTS, max_tokens=120))
    quest.close()
    engine = start(model, kv_cache_memory_bytes=72 << 20, max_num_batched_tokens=128, **kv())
    scarce = engine.ask(**ask(PROMPTS, max_tokens=120))
    engine.close()
    assert scarce["preemptions"] > 0
    assert [t[:20] for t in scarce["tokens"]] == [t[:20] for t in ample["tokens"]]
    assert all(len(t) == 120 for t in scarce["tokens"])


def in_two_passes(**options: Any) -> dict[str, Any]:
    """Return engine arguments that select TidalDecode with candidates."""
    policy = {"name": "tidal_decode", "budget": 160, "recent": 16, "select": "two_pass", **options}
    return {"enable_prefix_caching": True, "additional_config": {"pilotfish": {"kv": policy}}}


@pytest.mark.shows("tidal_decode", "selection in two passes")
@pytest.mark.parametrize("attention", [pytest.param("full", marks=pytest.mark.long), "selected"])
def test_candidates_are_the_same_alone_in_a_batch_and_from_the_prefix_cache(start, model, stock, attention) -> None:
    chosen = in_two_passes(candidates=192, select_attention=attention)
    engine = start(model, max_num_batched_tokens=128, **chosen)
    together = engine.ask(**ask(PROMPTS, max_tokens=FEW))["tokens"]
    assert together == engine.ask(**ask(PROMPTS, max_tokens=FEW))["tokens"], "from the prefix cache"
    assert together == [engine.ask(**ask([p], max_tokens=FEW))["tokens"][0] for p in PROMPTS]
    assert together != [tokens[:FEW] for tokens in stock]
    assert together[1] == stock[1][:FEW], "a context within the budget is read completely"
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("attention", ["full", "selected"])
def test_candidates_beyond_the_context_leave_nothing_out(start, model, attention: str) -> None:
    outputs = []
    for options in ({"select": "exact"}, {"candidates": 1024}):
        chosen = in_two_passes(select_attention=attention, **options)
        engine = start(model, max_num_batched_tokens=128, **chosen)
        outputs.append(engine.ask(**ask(PROMPTS))["tokens"])
        engine.close()
    assert outputs[0] == outputs[1]
