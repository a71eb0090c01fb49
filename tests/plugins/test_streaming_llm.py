"""Tests of StreamingLLM: its options, the tokens that heads keep, and its decode step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.kvcache.reference import attention
from pilotfish.plugins.config import ConfigError, build_options
from pilotfish.plugins.contracts import Engine
from pilotfish.plugins.streaming_llm import StreamingLLM, StreamingLLMOptions

ENGINE = Engine("m", 1000, 8192, 8, layers=3, kv_heads=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 1}, "budget: expected 2 to"),
        ({"budget": 4}, "budget: expected more than the 4 sinks, got 4"),
        ({"sinks": -1}, "sinks: expected 0 to"),
        ({"prefill": "none"}, "prefill: expected one of 'exact', 'streaming', got 'none'"),
        ({"window": 5}, "pilotfish.kv.window: unknown"),
    ],
)
def test_refuses_options_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_options(StreamingLLMOptions, values, "pilotfish.kv")


def test_no_head_keeps_the_whole_context() -> None:
    plan = StreamingLLM(StreamingLLMOptions(budget=100, sinks=4, prefill="streaming"), ENGINE).head_plan()
    assert plan.retrieval_heads == (frozenset(),) * 3
    assert (plan.window.sinks, plan.window.window, plan.window.ratio) == (4, 96, 0)
    assert not plan.window.compensation
    assert not plan.window.exact_prefill


@given(st.integers(2, 300), st.integers(0, 40), st.integers(1, 3000), st.sampled_from([16, 32, 128]))
def test_whole_blocks_contain_the_tokens_of_the_paper(budget: int, sinks: int, context: int, block: int) -> None:
    """Test that the kept blocks hold the sinks and the last tokens of the budget, and at most two blocks more."""
    sinks = min(sinks, budget - 1)
    window = StreamingLLM(StreamingLLMOptions(budget, sinks), ENGINE).head_plan().window
    first, sink_tokens = window.first_retained_block(context, block) * block, window.sink_blocks(block) * block
    kept = {t for t in range(context) if t < sink_tokens or t >= first}
    wanted = {t for t in range(context) if t < sinks or t >= context - (budget - sinks)}
    assert wanted <= kept
    assert len(kept) <= budget + 2 * block


def test_decode_step_reads_sinks_and_recent_tokens() -> None:
    rng = np.random.default_rng(0)
    query, (keys, values) = rng.normal(size=(4, 8)), rng.normal(size=(2, 50, 2, 8))
    everything = attention(query, keys, values, 0.3)[1]
    np.testing.assert_allclose(StreamingLLM.decode_step(query, keys, values, 0.3, 4, 46), everything)
    part = StreamingLLM.decode_step(query, keys, values, 0.3, 4, 10)
    keys[4:40] = rng.normal(size=(36, 2, 8))
    np.testing.assert_allclose(StreamingLLM.decode_step(query, keys, values, 0.3, 4, 10), part)
    assert not np.allclose(part, everything)
