"""Tests of the paged Triton kernels against naive attention; the kernels are interpreted if there is no GPU."""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from device_cache import ON_GPU, DeviceCache, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, SelectionRule, unit_positions
from pilotfish.plugins.tidal_decode import TidalDecode

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero"),  # the interpreter takes the logarithm of an empty page
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The interpreter computes wrong values in bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    """Return the kernel module; its kernels are interpreted if there is no GPU."""
    return importlib.import_module("pilotfish.kvcache.kernels.paged_triton")


@st.composite
def cases(draw: st.DrawFn) -> DeviceCache:
    contexts = draw(st.lists(st.integers(1, 500), min_size=1, max_size=3))
    return build(
        contexts,
        draw(st.lists(st.sampled_from([1, 1, 1, 5]), min_size=len(contexts), max_size=len(contexts))),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 4, 8])),
        draw(st.sampled_from([32, 64, 80, 128])),
        draw(st.sampled_from([16, 32, 64])),
        draw(st.sampled_from(DTYPES)),
    )


@st.composite
def rules(draw: st.DrawFn) -> SelectionRule:
    granularity = draw(st.sampled_from(get_args(Granularity)))
    sinks, recent = draw(st.integers(0, 40)), draw(st.integers(0, 60))
    least = SelectionRule(1, sinks, recent, draw(st.sampled_from(get_args(HeadAggregation))), granularity)
    budget = least.min_budget + draw(st.integers(0, 100))
    if granularity == "page":
        budget = -(-budget // PAGE_SIZE) * PAGE_SIZE
    return SelectionRule(budget, sinks, recent, least.head_aggregation, granularity)


MANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def select(
    kernels: ModuleType, case: DeviceCache, rule: SelectionRule, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = kernels.token_scores(case.query, case.cache, case.batch(kernels), rule, scale)
    return scores, kernels.select_tokens(scores, case.batch(kernels), rule)


@MANY
@given(cases(), rules())
def test_scores_and_selection_match_naive_computation(
    kernels: ModuleType, case: DeviceCache, rule: SelectionRule
) -> None:
    scale = case.query.shape[-1] ** -0.5
    scores, selected = select(kernels, case, rule, scale)
    requests, heads, kv_heads = len(scores), case.query.shape[1], case.cache.shape[1]
    stated = kernels.score_bytes(rule, requests, heads, kv_heads, case.batch(kernels).max_seq_len)
    assert 2 * scores.numel() * scores.element_size() <= stated
    unit = PAGE_SIZE if rule.granularity == "page" else 1
    for r in case.sparse(rule):
        n = case.contexts[r]
        raw, _ = case.attention(r, list(range(n)), scale)
        expected = TidalDecode.token_scores(raw, rule, case.cache.shape[1])
        padded = np.zeros((len(expected), -(-n // unit) * unit))
        padded[:, :n] = expected
        expected_units = padded.reshape(len(expected), -1, unit).sum(-1)
        unit_scores = scores[r, :, : expected_units.shape[1]].cpu().numpy()
        if rule.head_aggregation != "union":  # subject to rounding
            np.testing.assert_allclose(
                unit_scores, expected_units, rtol=2e-2 if case.query.dtype != torch.float32 else 1e-3
            )
        for s in range(len(expected)):
            positions = unit_positions(selected[r, s].tolist(), n, rule)
            spread = np.repeat(unit_scores[s] / unit, unit)[:n] if unit > 1 else unit_scores[s]
            assert len(positions) <= rule.budget
            assert positions == sorted(set(positions))
            always = {p for p in range(n) if p < rule.sinks or p >= n - 1 - rule.recent}
            assert always <= set(positions), "sinks, recent positions and the current one are kept"
            evicted = sorted(set(range(n)) - set(positions))
            free = [p for p in positions if p not in always and p // unit not in {a // unit for a in always}]
            if free and evicted:
                assert spread[free].min() >= spread[evicted].max() * (1 - 1e-5), (
                    "a token with a higher score was evicted"
                )


@MANY
@given(cases(), rules())
def test_decode_matches_naive_attention_over_selected_tokens(
    kernels: ModuleType, case: DeviceCache, rule: SelectionRule
) -> None:
    scale = case.query.shape[-1] ** -0.5
    _, selected = select(kernels, case, rule, scale)
    output = torch.full_like(case.query, 7.0)
    kernels.paged_decode_attention(case.query, case.cache, case.batch(kernels), rule, scale, output, selected)
    heads, sets = case.query.shape[1], selected.shape[1]
    sparse = case.sparse(rule)
    for r in sparse:
        for head in range(heads):
            positions = unit_positions(selected[r, head * sets // heads].tolist(), case.contexts[r], rule)
            _, expected = case.attention(r, positions, scale)
            actual = output[case.starts[r], head].double().cpu().numpy()
            np.testing.assert_allclose(actual, expected[head], atol=TOLERANCE[case.query.dtype])
    others = [t for t in range(len(case.query)) if t not in {case.starts[r] for r in sparse}]
    assert (output[others] == 7).all(), "rows of other tokens are unchanged"


@MANY
@given(cases(), rules(), st.sampled_from(["sum", "max", "union"]))
def test_shortened_block_table_holds_selected_tokens(
    kernels: ModuleType, case: DeviceCache, rule: SelectionRule, aggregate: HeadAggregation
) -> None:
    block = case.cache.shape[2]
    rule = SelectionRule(-(-max(rule.budget, 224) // PAGE_SIZE) * PAGE_SIZE, rule.sinks, rule.recent, aggregate, "page")
    if not kernels.can_shorten_block_table(rule, block):
        assert block > PAGE_SIZE
        return
    _, selected = select(kernels, case, rule, 0.125)
    table, lens = kernels.shorten_block_table(selected, case.batch(kernels), rule, block)
    sparse = case.sparse(rule)
    for r, n in enumerate(case.contexts):
        all_positions = list(range(n))
        positions = unit_positions(selected[r, 0].tolist(), n, rule) if r in sparse else all_positions
        assert int(lens[r]) == len(positions)
        blocks = [int(table[r, i // block]) for i in range(len(positions))]
        assert blocks == [int(case.table[r, p // block]) for p in positions]
        assert [i % block for i in range(len(positions))] == [p % block for p in positions]


def test_shortened_block_table_supports_page_rules_only(kernels: ModuleType) -> None:
    page, token = SelectionRule(256, 4, 64, "sum", "page"), SelectionRule(256, 4, 64, "sum", "token")
    assert kernels.can_shorten_block_table(page, 16) and kernels.can_shorten_block_table(page, 32)
    assert not kernels.can_shorten_block_table(page, 64), "half a block cannot be dropped"
    assert not kernels.can_shorten_block_table(token, 16)
    assert not kernels.can_shorten_block_table(SelectionRule(256, 4, 64, "kv_head", "page"), 16)


def test_refuses_unsupported_dtypes(kernels: ModuleType) -> None:
    case = build([300], [1], 1, 2, 32, 16, torch.float32)
    rule = SelectionRule(128, 4, 32, "sum", "page")
    with pytest.raises(ValueError, match=r"query .* torch\.float64"):
        kernels.token_scores(case.query.double(), case.cache, case.batch(kernels), rule, 1.0)
    with pytest.raises(ValueError, match="int32"):
        case.table = case.table.long()
        kernels.token_scores(case.query, case.cache, case.batch(kernels), rule, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_graph_replay_uses_new_inputs(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Test that a graph captured with one batch is right for other batches of the same shape."""
    case = build([700, 640, 300], [1, 1, 1], 2, 4, 128, 16, dtype)
    rule = SelectionRule(256, 4, 64, "sum", "page")
    batch, query = case.batch(kernels), case.query
    output, scale = torch.zeros_like(query), 128**-0.5
    torch.cuda.synchronize()  # the kernels of the first call run on another stream than the tensors' copies
    with torch.cuda.stream(torch.cuda.Stream()):
        selected = kernels.select_tokens(kernels.token_scores(query, case.cache, batch, rule, scale), batch, rule)
        kernels.paged_decode_attention(query, case.cache, batch, rule, scale, output, selected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        selected = kernels.select_tokens(kernels.token_scores(query, case.cache, batch, rule, scale), batch, rule)
        kernels.paged_decode_attention(query, case.cache, batch, rule, scale, output, selected)
    for lengths in ([700, 640, 90], [500, 90, 300]):
        case.contexts = lengths
        batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        query.copy_(torch.randn_like(query))
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for r in case.sparse(rule):
            positions = unit_positions(selected[r, 0].tolist(), lengths[r], rule)
            _, expected = case.attention(r, positions, scale)
            np.testing.assert_allclose(output[r].double().cpu().numpy(), expected, atol=TOLERANCE[dtype])
