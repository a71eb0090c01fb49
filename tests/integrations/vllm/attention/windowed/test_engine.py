"""RazorAttention in a running engine: identical output where nothing is evicted, and freed KV blocks."""

import pytest
from engine_prompts import PROMPTS, ask, texts_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = 32
WINDOW = {"window": 96, "ratio": 0, "sinks": 4}


def kv(**options) -> dict:
    """Return engine arguments that select RazorAttention."""
    return {"additional_config": {"pilotfish": {"kv": {"name": "razor_attention", **options}}}, "block_size": BLOCK}


@pytest.fixture(scope="module")
def stock(stock_engine) -> list[list[int]]:
    """Return the output of stock vLLM."""
    tokens = stock_engine.ask(**ask(PROMPTS))["tokens"]
    stock_engine.close()
    return tokens


@pytest.fixture(scope="module")
def streaming(start, model, stock):
    """Start an engine whose windows are much shorter than the prompts, with chunks of 128 tokens."""
    del stock  # its engine has ended
    return start(model, max_num_batched_tokens=128, **kv(**WINDOW, prefill="streaming"))


@pytest.mark.long
@pytest.mark.shows("razor_attention", "full budget equals stock")
def test_output_is_identical_with_windows_longer_than_the_context(start, model, stock) -> None:
    engine = start(model, max_num_batched_tokens=128, **kv(window=1024, ratio=0))
    assert engine.ask(**ask(PROMPTS))["tokens"] == stock
    engine.close()


@pytest.mark.shows("razor_attention", "batches of mixed requests", "chunked prefill")
def test_output_is_identical_in_mixed_batch(streaming, stock) -> None:
    """Test that output is the same alone and with requests that prefill in chunks, decode, start or finish."""
    together = streaming.ask(**ask(PROMPTS))["tokens"]
    alone = [streaming.ask(**ask([p]))["tokens"][0] for p in PROMPTS]
    assert together == alone
    assert together[1] == stock[1], "a context within the window is not truncated"
    assert together != stock, "longer contexts are truncated"


def test_blocks_are_freed(streaming) -> None:
    """Test the number of held blocks: 15 of 90 heads are retrieval heads, which keep all tokens.

    Each of the 5 groups of 15 non-retrieval heads holds the sinks, the window and the tokens being written.
    """
    streaming.ask(do="blocks")
    streaming.ask(**ask([PROMPTS[0]]))
    blocks = streaming.ask(do="blocks")
    assert blocks["free"] == blocks["all"], "all blocks are freed"
    whole, windowed = -(-724 // BLOCK), 1 + (96 + 128) // BLOCK + 1
    assert blocks["all"] - blocks["least"] <= whole + 5 * windowed
    assert blocks["all"] - blocks["least"] < 0.6 * 6 * whole, "far fewer than if all heads kept all tokens"


def test_reported_concurrency_matches_block_usage(streaming) -> None:
    blocks = streaming.ask(do="blocks")
    prefill, decode = (-(-1024 // BLOCK) + 5 * (1 + -(-(96 + new) // BLOCK) + 1) for new in (128, 1))
    assert blocks["concurrency"] == pytest.approx(1 + (blocks["all"] - prefill) / decode, rel=0.02)
    assert blocks["tokens"] == pytest.approx(blocks["concurrency"] * 1024, rel=0.001)


@pytest.mark.long
@pytest.mark.shows("razor_attention", "preemption")
def test_output_is_identical_after_preemption(start, model, streaming) -> None:
    """Test that requests that are preempted for lack of blocks have the same output as alone."""
    prompts = [PROMPTS[i][:300] for i in (0, 2, 4)]
    alone = [streaming.ask(**ask([p], max_tokens=300))["tokens"][0] for p in prompts]
    streaming.close()
    small = start(model, max_num_batched_tokens=128, num_gpu_blocks_override=127, **kv(**WINDOW, prefill="streaming"))
    together = small.ask(**ask(prompts, max_tokens=300))
    assert together["preemptions"] > 0
    assert together["tokens"] == alone
    blocks = small.ask(do="blocks")
    assert blocks["free"] == blocks["all"]
    small.close()


@pytest.fixture(scope="module")
def exact(start, model):
    """Start an engine with exact prefill."""
    return start(model, max_num_batched_tokens=128, **kv(**WINDOW))


def test_exact_prefill_attends_to_whole_prompts_then_frees_blocks(exact, stock) -> None:
    engine = exact
    answers = engine.ask(**ask(PROMPTS))["tokens"]
    assert [a[0] for a in answers] == [s[0] for s in stock], "the first token follows full attention in prefill"
    assert answers != stock
    engine.ask(do="blocks")
    engine.ask(**ask([PROMPTS[0]], max_tokens=1))
    assert (blocks := engine.ask(do="blocks"))["all"] - blocks["least"] == 6 * -(-700 // BLOCK)


@pytest.mark.long
@pytest.mark.shows("razor_attention", "a drafter beside it")
def test_output_is_identical_with_a_drafter(start, model, exact, drafting_args) -> None:
    """Test that draft tokens attend to the same tokens as in decoding one by one."""
    drafter, policy = drafting_args(), kv(**WINDOW)
    both = drafter["additional_config"]["pilotfish"] | policy["additional_config"]["pilotfish"]
    expected = exact.ask(**ask(PROMPTS, max_tokens=30))["tokens"]
    exact.close()
    engine = start(model, **{**policy, **drafter, "additional_config": {"pilotfish": both}})
    engine.ask(do="draft_always")
    answer = engine.ask(**ask(PROMPTS, max_tokens=30))
    assert answer["tokens"] == expected
    assert answer["drafted"] > 0
    engine.close()


@pytest.mark.shows("razor_attention", "preemption with exact prefill")
def test_exact_prefill_output_is_identical_after_preemption(start, tiny_model, streaming, exact) -> None:
    """Test that a preempted request reads its own output again with the window, and its prompt without."""
    for engine in (streaming, exact):
        engine.close()
    policy = {"max_num_batched_tokens": 128, "max_model_len": 640, **kv(keep=[[0, 1]], window=64, ratio=0, sinks=4)}
    prompts = texts_of([150, 140, 145])
    alone = start(tiny_model, **policy)
    expected = [alone.ask(**ask([p], max_tokens=450))["tokens"][0] for p in prompts]
    alone.close()
    small = start(tiny_model, num_gpu_blocks_override=90, **policy)  # the prompts fit, but not all of their outputs
    together = small.ask(**ask(prompts, max_tokens=450))
    small.close()
    assert together["preemptions"] > 0
    assert together["tokens"] == expected


@pytest.mark.long
@pytest.mark.shows("razor_attention", "two tensor-parallel ranks")
def test_two_tensor_parallel_ranks(two_ranks, start, tiny_model) -> None:
    """Test ranks with one retrieval head each, in different layers; the cache layout must be the same on all ranks."""
    policy = kv(keep=[[0, 0], [1, 1]], window=64, ratio=0, prefill="streaming")
    prompts = [p[:400] for p in PROMPTS[:3]]
    alone = start(tiny_model, **policy)
    expected = alone.ask(**ask(prompts, max_tokens=40))["tokens"]
    alone.close()
    assert two_ranks(tiny_model, prompts, enable_prefix_caching=False, **policy)["tokens"] == expected
