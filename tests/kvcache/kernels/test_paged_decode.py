"""Tests of the paged decode kernels against naive attention over gathered keys and values."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cache import PagedCache, build

from pilotfish.kvcache import reference
from pilotfish.kvcache.kernels import paged_decode
from pilotfish.kvcache.kernels.paged_decode import DecodeBatch, SelectedTokens
from pilotfish.kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, SelectionRule
from pilotfish.plugins.tidal_decode import TidalDecode

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def naive_attention(
    case: PagedCache, r: int, head: int, positions: list[int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores [n] and the output [head_size] of one head over the given positions, in float64."""
    keys, values = (x[r][positions].double().numpy() for x in (case.keys, case.values))
    scores, output = reference.attention(case.query[case.tokens[r]].double().numpy(), keys, values, scale)
    return scores[head], output[head]


shapes = st.fixed_dictionaries(
    {
        "contexts": st.lists(st.integers(1, 900), min_size=1, max_size=4),
        "kv_heads": st.integers(1, 3),
        "share": st.sampled_from([1, 2, 3, 4, 5, 8]),
        "size": st.sampled_from([32, 64, 80, 128]),
        "block": st.sampled_from([32, 64, 128]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "seed": st.integers(0, 1 << 30),
    }
)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_full_attention_matches_naive_attention(shape: dict) -> None:
    case = build(**shape)
    scale = shape["size"] ** -0.5
    output = torch.full_like(case.query, 7.0)
    logits = torch.empty(len(case.contexts), case.rows.query_heads, case.rows.padded)
    paged_decode.paged_decode_attention(case.query, case.cache, case.table, case.rows, scale, output, logits=logits)
    tolerance = TOLERANCE[shape["dtype"]]
    for r, context in enumerate(case.contexts):
        for head in range(case.rows.query_heads):
            scores, expected = naive_attention(case, r, head, list(range(context)), scale)
            np.testing.assert_allclose(logits[r, head, :context].numpy(), scores, atol=2e-4)
            np.testing.assert_allclose(output[case.tokens[r], head].double().numpy(), expected, atol=tolerance)
    others = [t for t in range(len(case.query)) if t not in case.tokens]
    assert (output[others] == 7).all(), "rows of other tokens are unchanged"


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["one", "kv_head", "head"]))
def test_sparse_attention_matches_naive_attention(shape: dict, sets_of: str) -> None:
    case = build(**shape)
    heads = case.rows.query_heads
    sets = {"one": 1, "kv_head": shape["kv_heads"], "head": heads}[sets_of]
    rng = np.random.default_rng(shape["seed"])
    num_pages = [-(-c // PAGE_SIZE) for c in case.contexts]
    selected = SelectedTokens(
        torch.zeros(len(num_pages), sets, max(num_pages), dtype=torch.int32),
        torch.zeros(len(num_pages), sets, max(num_pages), dtype=torch.int32),
        torch.zeros(len(num_pages), sets, dtype=torch.int32),
    )
    for r, pages in enumerate(num_pages):
        for s in range(sets):
            page_indices = np.sort(rng.choice(pages, rng.integers(1, pages + 1), replace=False))
            masks = rng.integers(1, 1 << 32, len(page_indices), dtype=np.uint32)
            masks[rng.random(len(page_indices)) < 0.5] = 0xFFFFFFFF
            masks |= 1  # the last page may extend beyond the context, but its first token never does
            selected.num_pages[r, s] = len(page_indices)
            selected.pages[r, s, : len(page_indices)] = torch.from_numpy(page_indices.astype(np.int32))
            selected.masks[r, s, : len(page_indices)] = torch.from_numpy(masks.view(np.int32))
    output = torch.empty_like(case.query)
    scale = shape["size"] ** -0.5
    paged_decode.paged_decode_attention(case.query, case.cache, case.table, case.rows, scale, output, selected)
    for r, context in enumerate(case.contexts):
        for head in range(heads):
            s = 0 if sets == 1 else head * sets // heads
            positions = [p for p in selected.positions(r, s) if p < context]
            _, expected = naive_attention(case, r, head, positions, scale)
            actual = output[case.tokens[r], head].double().numpy()
            np.testing.assert_allclose(actual, expected, atol=TOLERANCE[shape["dtype"]])


@st.composite
def rules(draw: st.DrawFn) -> SelectionRule:
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    granularity = draw(st.sampled_from(granularities))
    sinks, recent = draw(st.integers(0, 40)), draw(st.integers(0, 100))
    rule = SelectionRule(1, sinks, recent, draw(st.sampled_from(get_args(HeadAggregation))), granularity)
    budget = rule.min_budget + draw(st.integers(0, 200))
    if granularity == "page":
        budget = -(-budget // PAGE_SIZE) * PAGE_SIZE
    return SelectionRule(budget, sinks, recent, rule.head_aggregation, granularity)


@settings(max_examples=80, deadline=None)
@given(
    rules(),
    st.lists(st.integers(1, 1200), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_selection_matches_naive_selection(
    rule: SelectionRule, contexts: list[int], kv_heads: int, share: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heads = kv_heads * share
    rows = DecodeBatch(list(range(len(contexts))), list(range(len(contexts))), contexts, heads)
    scores = rng.normal(0, 3, (len(contexts), heads, rows.padded)).astype(np.float32)
    token_scores = paged_decode.token_scores(rows, rule, kv_heads, torch.from_numpy(scores.copy()))
    selected = paged_decode.select_tokens(rows, rule, token_scores)
    for r, n in enumerate(contexts):
        expected = TidalDecode.token_scores(scores[r, :, :n].astype(np.float64), rule, kv_heads)
        np.testing.assert_allclose(token_scores[r, :, :n].numpy(), expected, rtol=1e-4, atol=1e-8)
        for s in range(expected.shape[0]):
            positions = [p for p in selected.positions(r, s) if p < n]
            assert positions == TidalDecode.select_tokens(token_scores[r, s, :n].numpy(), rule)
            assert len(positions) <= rule.budget
            if n <= rule.budget:
                assert positions == list(range(n))
            always = {p for p in range(n) if p < rule.sinks or p >= n - 1 - rule.recent}
            assert always <= set(positions), "sinks, recent positions and the current one are kept"


def test_refuses_unsupported_dtypes_and_layouts() -> None:
    case = build([40], 1, 2, 32, 32, torch.float32, 0)
    output = torch.empty_like(case.query)
    with pytest.raises(ValueError, match=r"query torch\.float64"):
        paged_decode.paged_decode_attention(case.query.double(), case.cache, case.table, case.rows, 1.0, output)
    with pytest.raises(ValueError, match="cache"):
        paged_decode.paged_decode_attention(case.query, case.cache[:, :, :16], case.table, case.rows, 1.0, output)
    with pytest.raises(ValueError, match="block table"):
        paged_decode.paged_decode_attention(case.query, case.cache, case.table.long(), case.rows, 1.0, output)


def test_results_do_not_depend_on_number_of_threads() -> None:
    case = build([5000, 33], 3, 3, 64, 128, torch.bfloat16, 1)
    outputs = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        output = torch.zeros_like(case.query)
        paged_decode.paged_decode_attention(case.query, case.cache, case.table, case.rows, 0.125, output)
        outputs.append(output)
    torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@given(st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(1, 60_000), st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_selection_in_parts_equals_selection_at_once(contexts: list[int], max_bytes: int, seed: int) -> None:
    """Test that splitting a batch, to bound the memory of its scores, changes nothing."""
    case = build(contexts, 2, 2, 32, 32, torch.float32, seed)
    rule = SelectionRule(budget=64, sinks=2, recent=8, head_aggregation="kv_head", granularity="token")

    def select(rows: DecodeBatch) -> SelectedTokens:
        output, logits = torch.empty_like(case.query), torch.empty(rows.count, 4, rows.padded)
        paged_decode.paged_decode_attention(case.query, case.cache, case.table, rows, 0.2, output, logits=logits)
        return paged_decode.select_tokens(rows, rule, paged_decode.token_scores(rows, rule, 2, logits))

    parts = list(case.rows.parts(max_bytes))
    assert all(part.count == 1 or 16 * part.count * part.padded <= max_bytes for part in parts)
    whole, joined = select(case.rows), SelectedTokens.cat([select(part) for part in parts])
    for row in range(len(contexts)):
        for group in range(2):
            assert joined.positions(row, group) == whole.positions(row, group)
