"""Tests of the Triton kernels for page bounds and candidates; the kernels are interpreted if there is no GPU."""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from ahead_of_time import compiled_kernels
from device_cache import DEVICE, DeviceCache, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.reference import softmax
from pilotfish.kvcache.selection import PAGE_SIZE, Granularity, HeadAggregation, SelectionRule, unit_positions
from pilotfish.plugins.quest import Quest
from pilotfish.plugins.tidal_decode import TidalDecode

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),  # from NumPy, in Triton's interpreter
]

MANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALE = 0.3


@pytest.fixture(scope="module")
def bounds_kernels(interpreted_triton: None) -> ModuleType:
    """Return the module of page bounds; its kernels are interpreted if there is no GPU."""
    return importlib.import_module("pilotfish.kvcache.kernels.page_bounds_triton")


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    """Return the module of attention and selection."""
    return importlib.import_module("pilotfish.kvcache.kernels.paged_triton")


def slots_of(case: DeviceCache, request: int, begin: int, end: int) -> list[int]:
    """Return the slots of positions of a request."""
    block = case.cache.shape[2]
    return [int(case.table[request, p // block]) * block + p % block for p in range(begin, end)]


def updated_bounds(bounds_kernels: ModuleType, case: DeviceCache, chunk: int = 1000) -> torch.Tensor:
    """Return the bounds after all requests have written their contexts in chunks, each with padding."""
    bounds = bounds_kernels.allocate_bounds(case.cache).fill_(float("nan"))
    for begin in range(0, max(case.contexts), chunk):
        slots = [
            slot
            for r, context in enumerate(case.contexts)
            for slot in slots_of(case, r, begin, min(context, begin + chunk))
        ]
        bounds_kernels.update_bounds(case.cache, bounds, torch.tensor([*slots, -1, -1], device=DEVICE))
    return bounds


@st.composite
def cases(draw: st.DrawFn) -> DeviceCache:
    contexts = draw(st.lists(st.integers(1, 500), min_size=1, max_size=3))
    return build(
        contexts,
        draw(st.lists(st.sampled_from([1, 1, 1, 5]), min_size=len(contexts), max_size=len(contexts))),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([32, 80])),
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([torch.float32, torch.float16])),
    )


@MANY
@given(cases(), st.sampled_from([7, 33, 1000]))
def test_bounds_and_page_scores_equal_the_reference(
    bounds_kernels: ModuleType, kernels: ModuleType, case: DeviceCache, chunk: int
) -> None:
    bounds, block = updated_bounds(bounds_kernels, case, chunk), case.cache.shape[2]
    scores = bounds_kernels.page_scores(case.query, bounds, case.batch(kernels), 128, SCALE, block)
    rule = SelectionRule(128, 4, 16, "max", "page")
    for r, context in enumerate(case.contexts):
        keys = case.keys[r].double().numpy()
        low, high = Quest.page_bounds(keys)
        pages = [slots_of(case, r, p, min(context, p + PAGE_SIZE)) for p in range(0, context, PAGE_SIZE)]
        blocks = [sorted({slot // block for slot in slots}) for slots in pages]
        np.testing.assert_array_equal([bounds[b, :, 0].amin(0).double().cpu().numpy() for b in blocks], low)
        np.testing.assert_array_equal([bounds[b, :, 1].amax(0).double().cpu().numpy() for b in blocks], high)
        if r in case.sparse(rule):
            query = case.query[case.starts[r]].double().cpu().numpy()
            expected = softmax(Quest.bound_logits(query, (low, high), SCALE)).max(0)
            actual = scores[r, 0, : len(expected)].cpu().numpy()
            np.testing.assert_allclose(actual, expected, rtol=2e-2 if case.query.dtype != torch.float32 else 1e-3)


@MANY
@given(
    cases(),
    st.sampled_from(["head", "kv_head", "sum", "max"]),  # `union` has ties, which the device breaks in another way
    st.sampled_from(get_args(Granularity)),
    st.sampled_from([160, 256, 640]),
)
def test_selection_in_two_passes_equals_the_reference(
    bounds_kernels: ModuleType,
    kernels: ModuleType,
    case: DeviceCache,
    aggregation: HeadAggregation,
    granularity: Granularity,
    candidates: int,
) -> None:
    case.query = case.query.float()  # half precision ranks nearly equal tokens in another order
    case.cache = case.cache.float()
    rule = SelectionRule(128, 4, 16, aggregation, granularity, candidates=candidates)
    batch, block = case.batch(kernels), case.cache.shape[2]
    bounds = updated_bounds(bounds_kernels, case)
    scores = bounds_kernels.page_scores(case.query, bounds, batch, candidates, SCALE, block)
    among = bounds_kernels.select_candidates(scores, batch, rule, block)
    units = kernels.select_tokens(
        kernels.token_scores(case.query, case.cache, among.batch, rule, SCALE), among.batch, rule
    )
    selected = among.units_of_context(units, rule)
    for r in case.sparse(rule):
        context = case.contexts[r]
        query, keys = case.query[case.starts[r]].double().cpu().numpy(), case.keys[r].double().numpy()
        logits, _ = case.attention(r, list(range(context)), SCALE)
        expected = TidalDecode.select_in_two_passes(query, keys, logits, SCALE, rule)
        for group, positions in enumerate(expected):
            assert unit_positions(selected[r, group].tolist(), context, rule) == positions


def test_bounds_need_pages_of_whole_blocks(bounds_kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="blocks of 64 tokens: expected a divisor of 32"):
        bounds_kernels.allocate_bounds(torch.empty(2, 1, 64, 32))


COMPILE = """
import torch
from ahead_of_time import compiled_launches
from pilotfish.kvcache.kernels import page_bounds_triton, paged_triton
from pilotfish.kvcache.selection import SelectionRule
with compiled_launches() as sizes:
    cache = torch.zeros(40, 2, 16, 128, dtype=torch.bfloat16)
    bounds = page_bounds_triton.allocate_bounds(cache)
    page_bounds_triton.update_bounds(cache, bounds, torch.arange(3))
    numbers, table = torch.tensor([[0, 1], [400, 0]], dtype=torch.int32), torch.zeros(1, 40, dtype=torch.int32)
    batch = paged_triton.DeviceBatch(numbers[0], numbers[1, :1], table, 400)
    rule = SelectionRule(128, 4, 16, "max", "token", candidates=160)
    query = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    scores = page_bounds_triton.page_scores(query, bounds, batch, 160, 0.1, 16).zero_()
    among = page_bounds_triton.select_candidates(scores, batch, rule, 16)
    weights = paged_triton.token_scores(query, cache, among.batch, rule, 0.1).zero_()
    kept = among.units_of_context(paged_triton.select_tokens(weights, among.batch, rule), rule)
    paged_triton.paged_decode_attention(query, cache, batch, rule, 0.1, torch.zeros_like(query), kept)
print(sorted(sizes))
"""


def test_kernels_compile_for_a_gpu() -> None:
    compiled = compiled_kernels(COMPILE)
    from pilotfish.kvcache.kernels import programs_page_bounds_triton, programs_triton

    modules = programs_page_bounds_triton, programs_triton
    assert compiled == sorted(name for module in modules for name in vars(module) if name.endswith("_kernel"))
