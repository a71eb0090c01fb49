"""Tests of the kernels for page bounds against the references of Quest and of TidalDecode's selection in two passes."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cache import build

from pilotfish.kvcache import reference
from pilotfish.kvcache.kernels import page_bounds, paged_decode
from pilotfish.kvcache.kernels.paged_decode import DecodeBatch
from pilotfish.kvcache.reference import softmax
from pilotfish.kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, SelectionRule, unit_positions
from pilotfish.plugins.quest import Quest
from pilotfish.plugins.tidal_decode import TidalDecode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Cache:
    """A KV cache of one layer whose requests write in steps, and its bounds."""

    def __init__(self, requests: int, longest: int, kv_heads: int, size: int, block: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        blocks = -(-longest // block)
        self.block, self.size = block, size
        self.table = torch.randperm(requests * blocks, generator=rng)[: requests * blocks].view(requests, blocks).int()
        # What was in the cache before must not matter.
        self.values = torch.full((requests * blocks, kv_heads, block, 2 * size), 99.0, dtype=dtype)
        self.bounds = page_bounds.allocate_bounds(self.values)
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(requests)]

    def write(self, writes: list[tuple[int, int, torch.Tensor]], padding: int = 0) -> None:
        """Write keys [tokens, kv_heads, size] of requests from a position on, all in one step."""
        slots = []
        for request, first, keys in writes:
            del self.keys[request][first:]
            for position, key in enumerate(keys, start=first):
                block, offset = int(self.table[request, position // self.block]), position % self.block
                parts = self.values[block].view(len(key), 2, -1)[:, 0].view(len(key), self.size, self.block)
                parts[:, :, offset] = key
                slots.append(block * self.block + offset)
                self.keys[request].append(key)
        page_bounds.update_bounds(self.values, self.bounds, torch.tensor(slots + [-1] * padding))

    def pages(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored bounds of a request's pages, each [pages, kv_heads, size]."""
        count = -(-len(self.keys[request]) // PAGE_SIZE)
        per_block = self.block // PAGE_SIZE
        places = [int(self.table[request, p // per_block]) * per_block + p % per_block for p in range(count)]
        low, high = self.bounds[places].double().numpy().transpose(2, 0, 1, 3)
        return low, high


@given(
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 5),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_bounds_equal_the_reference(
    chunks: list[list[int]], rejected: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    """Test requests that write in chunks, one step each, and write again the last tokens of the chunk before."""
    cache, rng = Cache(len(chunks), 400, 2, 16, block, dtype), torch.Generator().manual_seed(seed)
    for step in range(max(map(len, chunks))):
        writes = []
        for request, lengths in enumerate(chunks):
            if step < len(lengths):
                first = max(0, len(cache.keys[request]) - rejected)
                writes.append((request, first, torch.randn(lengths[step], 2, 16, generator=rng).to(dtype)))
        cache.write(writes, padding=step)
    for request in range(len(chunks)):
        # A page that was written again holds its tokens up to the last write only.
        keys = torch.stack(cache.keys[request]).double().numpy()
        for stored, expected in zip(cache.pages(request), Quest.page_bounds(keys), strict=True):
            np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(st.integers(1, 390), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_logits_and_selected_pages_equal_the_reference(
    dtype: torch.dtype, contexts: list[int], share: int, seed: int
) -> None:
    cache, rng = Cache(len(contexts), 400, 2, 16, 64, dtype), torch.Generator().manual_seed(seed)
    cache.write([(r, 0, torch.randn(n, 2, 16, generator=rng).to(dtype)) for r, n in enumerate(contexts)])
    query = torch.randn(len(contexts) + 1, 2 * share, 16, generator=rng).to(dtype)
    tokens = list(range(1, len(contexts) + 1))
    rows = DecodeBatch(list(range(len(contexts))), tokens, contexts, 2 * share)
    logits = page_bounds.bound_logits(query, cache.values, cache.bounds, cache.table, rows, 0.3)
    for aggregation in ("head", "kv_head", "sum", "max"):
        rule = SelectionRule(160, 4, 16, aggregation, "page")
        selected = page_bounds.select_pages(rows, rule, 2, logits.clone())
        for r, context in enumerate(contexts):
            keys = torch.stack(cache.keys[r]).double().numpy()
            expected = Quest.bound_logits(query[tokens[r]].double().numpy(), Quest.page_bounds(keys), 0.3)
            np.testing.assert_allclose(logits[r, :, : expected.shape[1]].numpy(), expected, rtol=1e-4, atol=1e-4)
            groups = rule.num_head_groups(2 * share, 2)
            weights = softmax(expected).reshape(groups, -1, expected.shape[1])
            for group, scores in enumerate(weights.max(1) if aggregation == "max" else weights.sum(1)):
                assert_best_pages(selected.positions(r, group), scores, context, rule)


@given(
    st.builds(
        SelectionRule,
        budget=st.sampled_from([96, 128]),
        sinks=st.integers(0, 8),
        recent=st.integers(0, 20),
        head_aggregation=st.sampled_from(get_args(HeadAggregation)),
        granularity=st.sampled_from(get_args(Granularity)),
        candidates=st.sampled_from([128, 160, 256]),
    ),
    st.lists(st.integers(129, 600), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_selection_in_two_passes_equals_the_reference(
    rule: SelectionRule, contexts: list[int], share: int, seed: int
) -> None:
    case = build(contexts, 2, share, 32, 64, torch.float32, seed)
    bounds = page_bounds.allocate_bounds(case.cache)
    for request, context in enumerate(contexts):
        at = torch.arange(context)
        page_bounds.update_bounds(case.cache, bounds, case.table[request, at // 64].long() * 64 + at % 64)
    of_pages = page_bounds.bound_logits(case.query, case.cache, bounds, case.table, case.rows, 0.3)
    candidates = page_bounds.select_pages(case.rows, rule.candidate_rule, 2, of_pages)
    logits = torch.full((len(contexts), 2 * share, candidates.pages.shape[2] * PAGE_SIZE), float("nan"))
    attended = torch.zeros_like(case.query)
    paged_decode.paged_decode_attention(
        case.query, case.cache, case.table, case.rows, 0.3, attended, logits=logits, candidates=candidates
    )
    without_values = torch.full_like(logits, float("nan"))
    paged_decode.paged_decode_attention(
        case.query, case.cache, case.table, case.rows, 0.3, None, candidates, without_values, candidates
    )
    torch.testing.assert_close(without_values, logits, rtol=0, atol=0, equal_nan=True)
    selected = paged_decode.select_among(candidates, case.rows, rule, 2, logits)
    for r, context in enumerate(contexts):
        query, keys = (x.double().numpy() for x in (case.query[case.tokens[r]], case.keys[r]))
        exact, output = reference.attention(query, keys, case.values[r].double().numpy(), 0.3)
        np.testing.assert_allclose(attended[case.tokens[r]].numpy(), output, atol=1e-5)
        expected = TidalDecode.select_in_two_passes(query, keys, exact, 0.3, rule)
        for group, positions in enumerate(expected):
            assert [p for p in selected.positions(r, group) if p < context] == positions


@given(st.integers(129, 600), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_selection_among_all_pages_equals_the_exact_one(context: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, keys = rng.normal(size=(4, 16)), rng.normal(size=(context, 2, 16))
    logits, _ = reference.attention(query, keys, keys, 0.3)
    rule = SelectionRule(128, 4, 16, "kv_head", "token", candidates=640)
    exact = [TidalDecode.select_tokens(scores, rule) for scores in TidalDecode.token_scores(logits, rule, 2)]
    assert TidalDecode.select_in_two_passes(query, keys, logits, 0.3, rule) == exact


def assert_best_pages(positions: list[int], scores: np.ndarray, context: int, rule: SelectionRule) -> None:
    """Assert that the positions are the pages that are always kept and the best others, up to ties by rounding."""
    pages = sorted({p // PAGE_SIZE for p in positions})
    assert [p for p in positions if p < context] == unit_positions(pages, context, rule)
    always = {
        p for p in range(len(scores)) if p * PAGE_SIZE < rule.sinks or (p + 1) * PAGE_SIZE > context - 1 - rule.recent
    }
    assert always <= set(pages)
    chosen, rest = set(pages) - always, set(range(len(scores))) - set(pages)
    assert len(pages) == min(rule.budget // PAGE_SIZE, len(scores))
    if chosen and rest:
        assert min(scores[list(chosen)]) >= max(scores[list(rest)]) * (1 - 1e-4) - 1e-7
