"""Tests of the window of a non-retrieval head: retained tokens, eviction, and the bounds on KV blocks."""

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.kvcache.head_window import HeadPlan, HeadWindow

windows = st.builds(
    HeadWindow,
    sinks=st.integers(0, 300),
    window=st.integers(1, 3000),
    ratio=st.integers(0, 8),
    compensation=st.booleans(),
    exact_prefill=st.booleans(),
)
blocks = st.sampled_from([16, 32, 128])


@given(windows, blocks, st.integers(0, 20000))
def test_window_retains_its_length_and_only_moves_forward(window: HeadWindow, block: int, tokens: int) -> None:
    first, after = window.first_retained_block(tokens, block), window.first_retained_block(tokens + 1, block)
    assert window.sink_blocks(block) * block >= window.sinks
    assert first <= after <= first + 1 or first == window.sink_blocks(block)
    assert first >= window.sink_blocks(block)
    if first > window.sink_blocks(block):
        retained = tokens - first * block
        assert window.window_length(tokens) <= retained < window.window_length(tokens) + block, (
            "no more is retained than rounding to blocks requires"
        )


@given(windows, blocks, st.integers(1, 20000), st.integers(1, 4000))
def test_blocks_held_in_a_step_stay_within_bounds(window: HeadWindow, block: int, tokens: int, in_flight: int) -> None:
    before = max(0, tokens - in_flight)
    held = -(-tokens // block)
    held -= window.first_retained_block(before, block) - window.sink_blocks(block)
    assert held <= window.max_decode_blocks(tokens, in_flight, block)
    assert window.max_decode_blocks(tokens, in_flight, block) <= window.max_blocks(tokens, in_flight, block)


def test_exact_prefill_retains_the_whole_prompt() -> None:
    exact, streaming = (HeadWindow(4, 512, 5, True, exact) for exact in (True, False))
    assert exact.first_retained_block(8000, 32, in_prompt=True) == 1
    assert exact.first_retained_block(8000, 32) == streaming.first_retained_block(8000, 32) == (8000 - 1600) // 32
    assert exact.max_blocks(8000, 2048, 32) == 250
    assert streaming.max_blocks(8000, 2048, 32) == 1 + (1600 + 2048) // 32 + 1


@given(
    st.integers(1, 6).flatmap(
        lambda heads: st.tuples(
            st.just(heads), st.lists(st.frozensets(st.integers(0, heads - 1)), min_size=1, max_size=5)
        )
    ),
    st.integers(1, 12),
)
def test_ranks_have_equal_head_counts_and_all_retrieval_heads(
    model: tuple[int, list[frozenset[int]]], ranks: int
) -> None:
    heads, retrieval_heads = model
    if heads % ranks and ranks % heads:  # vLLM rejects such a split
        ranks = heads
    plan = HeadPlan(tuple(retrieval_heads), HeadWindow(4, 64, 0, True, True))
    each = max(1, heads // ranks)
    parts = [plan.for_rank(rank, ranks, heads).retrieval_heads for rank in range(ranks)]
    counts = [sum(map(len, part)) for part in parts]
    assert len(set(counts)) == 1
    for layer, requested in enumerate(retrieval_heads):
        for head in requested:
            rank = head // each if ranks <= heads else head * (ranks // heads)
            assert head % each in parts[rank][layer]
    assert all(head < each for part in parts for kept in part for head in kept)
    if ranks == 1:
        assert parts[0] == plan.retrieval_heads
