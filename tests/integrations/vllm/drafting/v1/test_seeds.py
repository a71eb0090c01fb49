"""A request with a seed gets the text of stock vLLM without speculation: chains and trees, alone and in any batch."""

from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEEDED = {"temperature": 0.8, "max_tokens": 32, "ignore_eos": True}
KINDS: list[dict[str, Any]] = [
    {"seed": 7},
    {"seed": 7, "top_p": 0.9},
    {"seed": 1, "top_k": 20},
    {"seed": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"seed": 3, "logprobs": 2},
    {"seed": 4, "min_tokens": 12, "stop": ["."], "ignore_eos": False},
    {"seed": 5, "bad_words": [" the", " and"]},
    {"temperature": 0},
]
DRAFTERS = {
    "token_recycling chain": (12, {"name": "token_recycling"}),
    "token_recycling tree": (24, {"name": "token_recycling", "verification": "tree"}),
    "rasd chain": (12, {"name": "rasd"}),
    "rasd tree": (24, {"name": "rasd", "verification": "tree"}),
}
QUICK = ("token_recycling chain", "rasd tree")


@pytest.fixture(scope="module")
def short(prompts) -> list[list[int]]:
    """Prompts that are processed in one step: vLLM's CPU build fails on seeded requests with chunked prefill."""
    return [p[:40] for p in prompts]


@pytest.fixture(
    scope="module",
    params=[pytest.param(d, marks=[] if d in QUICK else [pytest.mark.long], id=d) for d in DRAFTERS],
)
def drafted(request, start, model, drafting_args):
    tokens, options = DRAFTERS[request.param]
    engine = start(model, **drafting_args(tokens, **options))
    engine.ask(do="draft_always")  # even where drafting does not reduce latency
    yield engine
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("verification", ["chain", "tree"])
def test_preempted_requests_equal_stock(stock_engine, start, model, drafting_args, short, verification: str) -> None:
    """Test a cache too small for six requests: some lose their blocks and are processed again, with their outputs."""
    sampling = [{**SEEDED, "max_tokens": 180, "seed": i} for i in range(6)]
    stock = stock_engine.ask(do="sample", prompts=short[:6], sampling=sampling)
    small = {"kv_cache_memory_bytes": 40 << 20, "max_model_len": 256, "max_num_batched_tokens": 1024}
    engine = start(model, **small, **drafting_args(12, verification=verification))
    engine.ask(do="draft_always")
    ours = engine.ask(do="sample", prompts=short[:6], sampling=sampling)
    assert ours["preemptions"] > 0
    assert ours["drafted"] > 40
    assert ours["tokens"] == stock["tokens"]
    engine.close()


@pytest.mark.shows("token_recycling", "seeds of requests")
@pytest.mark.shows("rasd", "seeds of requests")
def test_mixed_batch_equals_stock(stock_engine, drafted, short) -> None:
    sampling = [{**SEEDED, **kind} for kind in KINDS]
    stock, ours = (e.ask(do="sample", prompts=short[: len(KINDS)], sampling=sampling) for e in (stock_engine, drafted))
    assert ours["tokens"] == stock["tokens"]
    assert ours["finish"] == stock["finish"]
    assert ours["drafted"] > 40
    for one, other in zip(stock["logprobs"][4], ours["logprobs"][4], strict=True):
        assert one.keys() == other.keys()
        assert all(abs(one[t] - other[t]) < 1e-3 for t in one)
    alone = drafted.ask(do="sample", prompts=[short[0]], sampling=[sampling[0]])
    again = drafted.ask(do="sample", prompts=[short[0]], sampling=[sampling[0]])
    assert alone["tokens"] == again["tokens"] == stock["tokens"][:1], "the drafter knows more text each time"


def test_several_answers_of_a_prompt_equal_stock(stock_engine, drafted, short) -> None:
    sampling = [{**SEEDED, "seed": 11, "n": 3}, {**SEEDED, "seed": 12, "top_p": 0.95, "n": 2}]
    stock, ours = (e.ask(do="sample", prompts=short[:2], sampling=sampling) for e in (stock_engine, drafted))
    assert len(stock["tokens"]) == 5
    assert len({tuple(t) for t in stock["tokens"]}) == 5
    assert ours["tokens"] == stock["tokens"]
