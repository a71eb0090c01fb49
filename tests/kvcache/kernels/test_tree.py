"""Tests of the draft tree kernels: tree attention against naive attention, and moved tokens against a new cache."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.kvcache import reference
from pilotfish.kvcache.kernels.tree import CPUKVMover, CPUTreeBatch, tree_attention
from pilotfish.plugins.drafting.tree import tree_attention_mask

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def write(cache: torch.Tensor, slots: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write keys and values, [tokens, kv_heads, head_size], in the cache layout of the kernels."""
    blocks, heads, block, width = cache.shape
    size = width // 2
    flat = cache.view(blocks, heads, 2, block * size)
    for slot, k, v in zip(slots, keys, values, strict=True):
        flat[slot // block, :, 0].view(heads, size, block)[:, :, slot % block] = k
        flat[slot // block, :, 1].view(heads, block, size)[:, slot % block] = v


@st.composite
def forests(draw: st.DrawFn) -> list[tuple[int, np.ndarray]]:
    """Draw, for each request, the number of tokens before the root and the parents of its draft tree."""
    trees = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, 70)))]
        trees.append((draw(st.integers(0, 300)), np.array(parents, np.int32)))
    return trees


@settings(max_examples=40, deadline=None)
@given(
    forest=forests(),
    kv_heads=st.integers(1, 3),
    share=st.sampled_from([1, 3, 4, 8]),
    size=st.sampled_from([32, 64, 80]),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1 << 30),
)
def test_tree_attention_matches_naive_attention(forest, kv_heads, share, size, block, dtype, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    lengths = [before + 1 + len(parents) for before, parents in forest]
    per_request = [-(-n // block) for n in lengths]
    block_ids = torch.randperm(sum(per_request) + 2, generator=random).int()
    cache = torch.full((len(block_ids), kv_heads, block, 2 * size), float("nan"), dtype=dtype)
    table = torch.zeros(len(forest), max(per_request), dtype=torch.int32)
    texts, used = [], 0
    for r, n in enumerate(lengths):
        table[r, : per_request[r]] = block_ids[used : used + per_request[r]]
        used += per_request[r]
        keys, values = (torch.randn(n, kv_heads, size, generator=random).to(dtype) for _ in range(2))
        write(cache, [int(table[r, i // block]) * block + i % block for i in range(n)], keys, values)
        texts.append((keys, values))
    query_lengths = [1 + len(parents) for _, parents in forest]
    firsts = np.cumsum([2, *query_lengths])  # preceded by two query tokens of other requests
    query = torch.randn(int(firsts[-1]), kv_heads * share, size, generator=random).to(dtype)
    output = torch.zeros_like(query)
    masks = [tree_attention_mask(parents) for _, parents in forest]
    trees = CPUTreeBatch(range(len(forest)), firsts[:-1].tolist(), [b + 1 for b, _ in forest], masks, kv_heads * share)
    tree_attention(query, cache, table, trees, size**-0.5, output)
    assert not output[:2].any()
    for r, (before, _) in enumerate(forest):
        keys, values = (x.double().numpy() for x in texts[r])
        for row in range(query_lengths[r]):
            path = [*range(before), *(before + np.flatnonzero(masks[r][row]))]
            q = query[firsts[r] + row].double().numpy()
            _, expected = reference.attention(q, keys[path], values[path], size**-0.5)
            np.testing.assert_allclose(output[firsts[r] + row].double(), expected, atol=TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    path=st.lists(st.integers(0, 90), min_size=1, max_size=12, unique=True).map(sorted),
    begin=st.integers(0, 100),
    layers=st.integers(1, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1 << 30),
)
def test_moved_tokens_match_a_newly_written_cache(path, begin, layers, dtype, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=random).tolist()
    slots = [order[p // 32] * 32 + p % 32 for p in range(8 * 32)]
    targets = slots[begin : begin + len(path)]
    moved, expected = [], []
    for _ in range(layers):
        keys, values = (torch.randn(8 * 32, 2, 32, generator=random).to(dtype) for _ in range(2))
        cache = torch.zeros(8, 2, 32, 64, dtype=dtype)
        write(cache, slots, keys, values)
        fresh = cache.clone()
        write(fresh, targets, keys[[begin + p for p in path]], values[[begin + p for p in path]])
        moved.append(cache)
        expected.append(fresh)
    CPUKVMover(moved)(torch.tensor([slots[begin + p] for p in path]), torch.tensor(targets))
    for cache, fresh in zip(moved, expected, strict=True):
        assert torch.equal(cache, fresh)
