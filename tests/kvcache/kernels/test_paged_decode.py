"""The paged decode kernels against attention written plainly over gathered keys and values."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import reference
from pilotfish.kvcache.kernels import paged_decode
from pilotfish.kvcache.kernels.paged_decode import DecodeBatch, SelectedTokens
from pilotfish.kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, SelectionRule
from pilotfish.plugins.tidal_decode import TidalDecode

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """A filled cache and the text that it holds."""

    query: torch.Tensor  # [tokens, heads, size]
    keys: list[torch.Tensor]  # per request [context, kv_heads, size]
    values: list[torch.Tensor]
    cache: torch.Tensor
    table: torch.Tensor
    rows: DecodeBatch
    tokens: list[int]
    contexts: list[int]


def build(contexts: list[int], kv_heads: int, share: int, size: int, block: int, dtype: torch.dtype, seed: int) -> Case:
    """Requests of the given contexts, their blocks scattered over a larger cache, other tokens between theirs."""
    rng = torch.Generator().manual_seed(seed)
    need = [-(-c // block) for c in contexts]
    order = torch.randperm(sum(need) + 3, generator=rng)
    cache = torch.full((len(order), kv_heads, block, 2 * size), float("nan"), dtype=dtype)
    table = torch.full((len(contexts), max(need) + 1), -1, dtype=torch.int32)
    keys, values, used = [], [], 0
    for r, context in enumerate(contexts):
        k, v = (torch.randn(context, kv_heads, size, generator=rng).to(dtype) for _ in range(2))
        for b in range(need[r]):
            place = int(order[used])
            used += 1
            table[r, b] = place
            part = cache[place].view(kv_heads, 2, block * size)
            kt, vt = part[:, 0].view(kv_heads, size, block), part[:, 1].view(kv_heads, block, size)
            n = min(block, context - b * block)
            kt[:, :, :n] = k[b * block : b * block + n].permute(1, 2, 0)
            vt[:, :n] = v[b * block : b * block + n].permute(1, 0, 2)
        keys.append(k)
        values.append(v)
    tokens = torch.randperm(len(contexts) + 2, generator=rng)[: len(contexts)].tolist()
    query = torch.randn(len(contexts) + 2, kv_heads * share, size, generator=rng).to(dtype)
    rows = DecodeBatch(list(range(len(contexts))), tokens, contexts, kv_heads * share)
    return Case(query, keys, values, cache, table, rows, tokens, contexts)


def plain(case: Case, r: int, head: int, positions: list[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(scores [n], output [size]) of one head over the given positions, in float64."""
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
def test_reading_everything_is_attention(shape: dict) -> None:
    case = build(**shape)
    scale = shape["size"] ** -0.5
    output = torch.full_like(case.query, 7.0)
    logits = torch.empty(len(case.contexts), case.rows.query_heads, case.rows.padded)
    paged_decode.paged_decode_attention(case.query, case.cache, case.table, case.rows, scale, output, logits=logits)
    tolerance = TOLERANCE[shape["dtype"]]
    for r, context in enumerate(case.contexts):
        for head in range(case.rows.query_heads):
            scores, expected = plain(case, r, head, list(range(context)), scale)
            np.testing.assert_allclose(logits[r, head, :context].numpy(), scores, atol=2e-4)
            np.testing.assert_allclose(output[case.tokens[r], head].double().numpy(), expected, atol=tolerance)
    others = [t for t in range(len(case.query)) if t not in case.tokens]
    assert (output[others] == 7).all(), "tokens of others are left alone"


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["one", "kv_head", "head"]))
def test_reading_chosen_positions_is_attention_over_them(shape: dict, sets_of: str) -> None:
    case = build(**shape)
    heads = case.rows.query_heads
    sets = {"one": 1, "kv_head": shape["kv_heads"], "head": heads}[sets_of]
    rng = np.random.default_rng(shape["seed"])
    groups_of = [-(-c // PAGE_SIZE) for c in case.contexts]
    choice = SelectedTokens(
        torch.zeros(len(groups_of), sets, max(groups_of), dtype=torch.int32),
        torch.zeros(len(groups_of), sets, max(groups_of), dtype=torch.int32),
        torch.zeros(len(groups_of), sets, dtype=torch.int32),
    )
    for r, groups in enumerate(groups_of):
        for s in range(sets):
            chosen = np.sort(rng.choice(groups, rng.integers(1, groups + 1), replace=False))
            masks = rng.integers(1, 1 << 32, len(chosen), dtype=np.uint32)
            masks[rng.random(len(chosen)) < 0.5] = 0xFFFFFFFF
            masks |= 1  # a last group may reach beyond the context, its first token does not
            choice.num_pages[r, s] = len(chosen)
            choice.pages[r, s, : len(chosen)] = torch.from_numpy(chosen.astype(np.int32))
            choice.masks[r, s, : len(chosen)] = torch.from_numpy(masks.view(np.int32))
    output = torch.empty_like(case.query)
    scale = shape["size"] ** -0.5
    paged_decode.paged_decode_attention(case.query, case.cache, case.table, case.rows, scale, output, choice)
    for r, context in enumerate(case.contexts):
        for head in range(heads):
            s = 0 if sets == 1 else head * sets // heads
            positions = [p for p in choice.positions(r, s) if p < context]
            _, expected = plain(case, r, head, positions, scale)
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
def test_choices_are_those_of_the_oracle(
    rule: SelectionRule, contexts: list[int], kv_heads: int, share: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heads = kv_heads * share
    rows = DecodeBatch(list(range(len(contexts))), list(range(len(contexts))), contexts, heads)
    scores = rng.normal(0, 3, (len(contexts), heads, rows.padded)).astype(np.float32)
    found = paged_decode.token_scores(rows, rule, kv_heads, torch.from_numpy(scores.copy()))
    choice = paged_decode.select_tokens(rows, rule, found)
    for r, n in enumerate(contexts):
        expected = TidalDecode.token_scores(scores[r, :, :n].astype(np.float64), rule, kv_heads)
        np.testing.assert_allclose(found[r, :, :n].numpy(), expected, rtol=1e-4, atol=1e-8)
        for s in range(expected.shape[0]):
            positions = [p for p in choice.positions(r, s) if p < n]
            assert positions == TidalDecode.select_tokens(found[r, s, :n].numpy(), rule)
            assert len(positions) <= rule.budget
            if n <= rule.budget:
                assert positions == list(range(n))
            always = {p for p in range(n) if p < rule.sinks or p >= n - 1 - rule.recent}
            assert always <= set(positions), "sinks, recent positions and the current one are kept"


def test_what_the_kernel_cannot_read_is_refused() -> None:
    case = build([40], 1, 2, 32, 32, torch.float32, 0)
    output = torch.empty_like(case.query)
    with pytest.raises(ValueError, match=r"query torch\.float64"):
        paged_decode.paged_decode_attention(case.query.double(), case.cache, case.table, case.rows, 1.0, output)
    with pytest.raises(ValueError, match="cache"):
        paged_decode.paged_decode_attention(case.query, case.cache[:, :, :16], case.table, case.rows, 1.0, output)
    with pytest.raises(ValueError, match="block table"):
        paged_decode.paged_decode_attention(case.query, case.cache, case.table.long(), case.rows, 1.0, output)


def test_results_do_not_depend_on_threads() -> None:
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
