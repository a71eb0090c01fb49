"""Tests of the Triton kernels for draft trees against naive attention, interpreted if there is no GPU."""

import importlib
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import reference
from pilotfish.plugins.drafting.tree import tree_attention_mask

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),  # from NumPy, in Triton's interpreter
]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="module")
def kernels(interpreted_triton: None) -> ModuleType:
    """Return the kernel module; its kernels are interpreted if there is no GPU."""
    return importlib.import_module("pilotfish.kvcache.kernels.tree_triton")


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 45)), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 4)]),
    size=st.sampled_from([32, 64, 80]),
    block=st.sampled_from([16, 32, 48]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    heads_first=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_tree_attention_matches_naive_attention(kernels, sizes, heads, size, block, dtype, heads_first, seed) -> None:
    random, shuffle = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    kv_heads, share = heads
    forest = [(before, np.array([shuffle.integers(-1, i) for i in range(n)], np.int32)) for before, n in sizes]
    needed = [-(-(before + 1 + len(parents)) // block) for before, parents in forest]
    cache = torch.randn(sum(needed) + 1, kv_heads, block, 2 * size, generator=random).to(dtype)
    if not heads_first:  # vLLM's default layout
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    block_ids, table = torch.randperm(len(cache), generator=random).int(), torch.zeros(len(forest), max(needed)).int()
    for r, n in enumerate(needed):
        table[r, :n] = block_ids[sum(needed[:r]) : sum(needed[:r]) + n]
    masks = [tree_attention_mask(parents) for _, parents in forest]
    firsts = np.cumsum([1, *map(len, masks)])
    query = torch.randn(int(firsts[-1]), kv_heads * share, size, generator=random).to(dtype)
    output = torch.zeros_like(query).to(DEVICE)
    contexts = [before + 1 for before, _ in forest]
    trees = kernels.TritonTreeBatch(range(len(forest)), firsts[:-1].tolist(), contexts, masks, DEVICE)
    kernels.tree_attention(query.to(DEVICE), cache.to(DEVICE), table.to(DEVICE), trees, size**-0.5, output)
    assert not output[0].any()
    for r, (before, _) in enumerate(forest):
        text = cache[table[r].long()].transpose(1, 2).reshape(-1, kv_heads, 2 * size).double().numpy()
        for row, mask in enumerate(masks[r]):
            path = [*range(before), *(before + np.flatnonzero(mask))]
            q = query[firsts[r] + row].double().numpy()
            _, expected = reference.attention(q, text[path, :, :size], text[path, :, size:], size**-0.5)
            np.testing.assert_allclose(output[firsts[r] + row].double().cpu(), expected, atol=2e-3)


def test_moved_tokens_match_indexed_copy(kernels) -> None:
    cache = torch.arange(4 * 2 * 16 * 8).reshape(4, 2, 16, 8).float()
    before = cache.clone()
    source, target = torch.tensor([20, 33, 34]), torch.tensor([18, 19, 33])
    kernels.TritonKVMover([cache])(source, target)
    flat = before.transpose(1, 2).reshape(64, 2, 8)
    expected = flat.clone()
    expected[target] = flat[source]
    assert torch.equal(cache.transpose(1, 2).reshape(64, 2, 8), expected)
