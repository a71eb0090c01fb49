"""Output with the drafter is identical under preemption, chunked prefill, prefix caching, and at the context limit."""

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def stock(stock_engine):
    return stock_engine


@pytest.fixture(scope="module", params=[pytest.param("chain", marks=pytest.mark.long), "tree"])
def constrained(request, start, model, drafting_args):
    # Few KV blocks, so that requests are preempted, prefill in chunks of 64 tokens, and a short context.
    # The draft length is fixed, since the adaptive one depends on the machine and its load.
    tree = {"tokens": 10, "verification": "tree", "nodes": 10}
    engine = start(
        model,
        **drafting_args(**(tree if request.param == "tree" else {"nodes": 8})),
        block_size=32,
        num_gpu_blocks_override=16,
        max_model_len=320,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    )
    yield engine
    engine.close()


@pytest.mark.shows("token_recycling", "preemption", "chunked prefill")
def test_preemption_and_chunked_prompts(stock, constrained, prompts) -> None:
    sampling = [{"temperature": 0, "max_tokens": 72, "ignore_eos": True}] * 8
    a = stock.ask(do="sample", prompts=prompts[:8], sampling=sampling)
    b = constrained.ask(do="sample", prompts=prompts[:8], sampling=sampling)
    assert b["preemptions"] > 0
    assert a["tokens"] == b["tokens"]
    assert b["drafted"] > 0


@pytest.mark.shows("token_recycling", "prefix caching")
def test_cached_prefixes(stock, constrained, prompts) -> None:
    longer = [[*p, 198, 198] for p in prompts[:3]]  # the prompts were processed by the test before
    sampling = [{"temperature": 0, "max_tokens": 30}] * 3
    a = stock.ask(do="sample", prompts=longer, sampling=sampling)
    for _ in range(2):
        b = constrained.ask(do="sample", prompts=longer, sampling=sampling)
        assert a["tokens"] == b["tokens"]


@pytest.mark.long
@pytest.mark.shows("token_recycling", "the whole context length")
def test_up_to_the_last_position_of_the_context(stock, constrained, prompts) -> None:
    lengths = [len(p) for p in prompts[:3]]
    unlimited = [{"temperature": 0, "max_tokens": 320 - n, "ignore_eos": True} for n in lengths]
    a = stock.ask(do="sample", prompts=prompts[:3], sampling=unlimited)
    b = constrained.ask(
        do="sample", prompts=prompts[:3], sampling=[{"temperature": 0, "max_tokens": 1000, "ignore_eos": True}] * 3
    )
    assert [len(t) for t in b["tokens"]] == [320 - n for n in lengths]
    assert a["tokens"] == b["tokens"]
    assert b["emitted"] / b["request_steps"] > 1.2, "drafts are accepted up to the end"
