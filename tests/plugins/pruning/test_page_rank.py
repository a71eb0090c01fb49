"""Tests of AIM's page rank against loops, and of the visual tokens that it keeps."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import LayerSchedule
from pilotfish.plugins.pruning.importance import keep_visual_tokens, page_rank


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_page_rank_matches_naive_power_iteration(n: int, kv_heads: int, group: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(n, kv_heads * group, 4, generator=random)
    key = torch.randn(n, kv_heads, 4, generator=random)
    squares = [0.0] * n
    for head in range(kv_heads * group):
        rank = [1 / n] * n
        for _ in range(3):
            following = [0.0] * n
            for i in range(n):
                logits = [
                    float(query[i, head].double() @ key[j, head // group].double()) * 0.5 / 0.2 for j in range(i + 1)
                ]
                weights = [math.exp(x - max(logits)) for x in logits]
                for j, weight in enumerate(weights):
                    following[j] += rank[i] * weight / sum(weights)
            rank = following
        squares = [s + a * a for s, a in zip(squares, rank, strict=True)]
    expected = [math.sqrt(s / (kv_heads * group)) for s in squares]
    torch.testing.assert_close(page_rank(query, key, 0.5, 0.2, 3), torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 9))
def test_keeps_text_tokens_and_best_visual_tokens(visual: list[bool], count: int, seed: int) -> None:
    importance = torch.rand(len(visual), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keep = keep_visual_tokens(importance, torch.tensor(visual), count)
    assert all(k for k, v in zip(keep.tolist(), visual, strict=True) if not v)
    indices = [i for i, v in enumerate(visual) if v]
    best = sorted(indices, key=lambda i: -float(importance[i]))[:count]
    assert {i for i in indices if keep[i]} == set(best)


def test_layer_schedule_is_linear_and_ends_at_zero() -> None:
    schedule = LayerSchedule(14, 22, 0.1, 5)
    assert [schedule.kept_share(i) for i in (0, 13, 14, 17, 21, 25)] == [1, 1, 0.875, 0.5, 0, 0]
