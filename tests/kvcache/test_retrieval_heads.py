"""Tests of retrieval head scores against naive attention, and of the selection of retrieval heads."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import retrieval_heads
from pilotfish.kvcache.retrieval_heads import (
    head_scores,
    max_over_query_heads,
    repeated_random_tokens,
    round_up_head_count,
    select_retrieval_heads,
)
from pilotfish.plugins.razor_attention import RazorAttention


@settings(max_examples=10, deadline=None)
@given(st.integers(3, 90), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(0, 1 << 30))
def test_scores_match_naive_computation(period: int, heads: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 1 + 4 * period
    query, key = rng.normal(0, 1.5, (n, heads[0], 16)), rng.normal(0, 1.5, (n, heads[1], 16))
    results = head_scores(torch.from_numpy(query), torch.from_numpy(key), 0.25, period)
    for actual, expected in zip(results, RazorAttention.head_scores(query, key, 0.25, period), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


def test_induction_head_scores_high_and_uniform_head_scores_low() -> None:
    tokens, period = repeated_random_tokens(1000, 401, seed=0)
    assert period == 100
    assert len(tokens) == 401
    assert tokens[1:101] == tokens[101:201] == tokens[301:401]
    table = torch.randn(1000, 64) * 3
    here = table[torch.tensor(tokens)]
    before = torch.cat([here[:1] * 0, here[:-1]])
    # head 0 attends to its own token, head 1 to the token after it, head 2 to all tokens equally
    query = torch.stack([here, here, here * 0], 1)
    key = torch.stack([here, before, here], 1)
    echo, induction = head_scores(query, key, 1.0, period)
    assert induction[1] > 0.8, "below 1 only because of tokens that a block holds twice"
    assert induction[2] < 0.1
    assert 0.3 < echo[0] < 0.9, "the token itself takes part of it"


def test_group_score_is_maximum_over_query_heads() -> None:
    assert max_over_query_heads(np.array([[0.1, 0.9, 0.3, 0.2]]), 2).tolist() == [[0.9, 0.3]]


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.01, 1), st.integers(0, 3), st.integers(0, 1 << 30))
def test_heads_with_highest_scores_are_selected(layers: int, heads: int, share: float, protect: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    echo, induction = rng.random((layers, heads)), rng.random((layers, heads))
    selected = select_retrieval_heads(echo, induction, share, protect)
    assert len(selected) == len(set(selected)) <= layers * heads
    assert {(layer, head) for layer in range(min(protect, layers)) for head in range(heads)} <= set(selected)
    score = np.maximum(echo, induction)
    best = sorted(((layer, head) for layer in range(layers) for head in range(heads)), key=lambda p: -score[p])
    assert set(best[: round(share * layers * heads)]) <= set(selected)


def test_head_count_is_rounded_up_within_a_third() -> None:
    assert round_up_head_count(90, 14) == 15
    assert round_up_head_count(256, 38) == 38, "43 would divide evenly, but take more memory"
    for total in range(1, 300, 7):
        for wanted in range(1, total + 1, 5):
            count = round_up_head_count(total, wanted)
            assert wanted <= count <= min(total, wanted + wanted // 3)


def test_random_sequence_fits_the_context_length() -> None:
    for positions in (257, 2048, 8192, 100_000):
        tokens, period = repeated_random_tokens(50, positions, 1)
        assert len(tokens) == 1 + 4 * period <= positions
        assert period == min(retrieval_heads.BLOCK, (positions - 1) // 4)
