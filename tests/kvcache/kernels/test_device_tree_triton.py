"""Tests of draft trees on a device against the functions for trees that the host knows."""

import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ahead_of_time import compiled_kernels
from device_wait import no_device_wait
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.kvcache.kernels.tree import pack_mask
from pilotfish.plugins.contracts import ROOT
from pilotfish.plugins.drafting.tree import node_depths, tree_attention_mask

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
fast = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Tree = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def module(interpreted_triton: None) -> ModuleType:
    return importlib.import_module("pilotfish.kvcache.kernels.device_tree_triton")


@st.composite
def trees(draw: st.DrawFn, most: int = 40) -> Tree:
    """Return the tokens of a tree's nodes and their parents."""
    size = draw(st.integers(0, most))
    random = draw(st.randoms(use_true_random=False))
    return [random.randrange(3) for _ in range(size)], [random.randrange(ROOT, i) for i in range(size)]


def batch(drawn: list[Tree], before: list[int]) -> tuple[Any, ...]:
    """Return the rows of a step: first rows, query tokens of rows, and positions, with prompts between the requests."""
    sizes = [len(tokens) + 1 for tokens, _ in drawn]
    first = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    queries, positions = [], []
    for size, root in zip(sizes, before, strict=True):
        queries += range(len(positions) + 2, len(positions) + 2 + size)
        positions += range(root - 2, root + size)
    return first, torch.tensor(queries), torch.tensor(positions)


def to_device(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def put(device: Any, drawn: list[Tree]) -> torch.Tensor:
    """Set the parents of the trees, and return the index of each request."""
    indices = torch.arange(len(drawn)).flip(0).to(DEVICE)
    for index, (_, parents) in zip(indices.tolist(), drawn, strict=True):
        device.parents[index, : len(parents)] = torch.tensor(parents, dtype=torch.int32)
    return indices


@fast
@given(st.lists(trees(), min_size=1, max_size=3), st.integers(40, 45))
def test_trees_are_described_as_on_the_host(module: ModuleType, drawn: list[Tree], max_nodes: int) -> None:
    before = [100 * (i + 1) for i in range(len(drawn))]
    first, queries, positions = to_device(*batch(drawn, before))
    device = module.DeviceTrees(4, max_nodes, 512, DEVICE)
    indices, longest = put(device, drawn), max(len(tokens) + 1 for tokens, _ in drawn)
    untouched = positions.clone()
    with no_device_wait():
        device.describe(indices, first, queries, positions, len(drawn), 4, longest)
    view = device.view(4)
    assert (view.count, view.longest, len(view.rows)) == (4, longest, 4 * longest)
    assert (view.numbers[len(drawn) :, 3] == 0).all() and (view.rows[len(drawn) * longest :] == -1).all()
    bits = view.bits.flatten().cpu().numpy()
    for i, (_, parents) in enumerate(drawn):
        rows = view.rows[i * longest : (i + 1) * longest].tolist()
        if not parents:
            assert view.numbers[i, 3] == 0 and rows == [-1] * longest
            continue
        request, root, prior, size, begin, part = view.numbers[i].tolist()
        assert (request, prior, size, part) == (i, before[i], len(parents) + 1, i * longest)
        assert root == queries[int(first[i])] and rows == [*range(root, root + size), *[-1] * (longest - size)]
        expected = pack_mask(tree_attention_mask(np.array(parents, np.int32))).view(np.int32)
        np.testing.assert_array_equal(bits[begin : begin + expected.size].reshape(expected.shape), expected)
        depths = [0, *node_depths(np.array(parents, np.int32))]
        assert positions[root : root + size].tolist() == [before[i] + depth for depth in depths]
        untouched[root : root + size] = positions[root : root + size]
    assert torch.equal(positions, untouched)


@fast
@given(st.lists(trees(12), min_size=1, max_size=3), st.integers(0, 1 << 30))
def test_paths_of_sampled_tokens_are_accepted(module: ModuleType, drawn: list[Tree], seed: int) -> None:
    random = np.random.default_rng(seed)
    first, _, _ = batch(drawn, [9] * len(drawn))
    drafted = torch.tensor([t for tokens, _ in drawn for t in (0, *tokens)], dtype=torch.int32)
    drafted[torch.from_numpy(random.random(len(drafted)) < 0.1)] = -1
    sampled = torch.from_numpy(random.integers(0, 3, len(drafted)))
    device = module.DeviceTrees(4, 12, 64, DEVICE)
    indices = put(device, drawn)
    with no_device_wait():
        accepted = device.accept(*to_device(sampled, drafted, first), indices)
    for i, (tokens, parents) in enumerate(drawn):
        begin = int(first[i])
        node, path, text = -1, [], [int(sampled[begin])]
        while True:
            fits = [n for n, p in enumerate(parents) if p == node and int(drafted[begin + 1 + n]) == text[-1]]
            if not fits:
                break
            node = fits[0]
            path.append(node)
            text.append(int(sampled[begin + 1 + node]))
        assert int(accepted.counts[i]) == len(text)
        assert accepted.tokens[i, : len(text)].tolist() == text
        assert accepted.paths[i, : len(path)].tolist() == path
        own = slice(begin, begin + len(tokens) + 1)
        assert accepted.parents[own].tolist() == [-1, *(p + 1 for p in parents)]
        assert accepted.accepted[own].tolist() == [True, *(n in path for n in range(len(tokens)))]
        rows = [0, *(n + 1 for n in path)]
        assert (accepted.rows[own] - begin).tolist() == [*rows, *range(len(rows), len(tokens) + 1)]


def test_accepted_nodes_are_moved_in_every_layer(module: ModuleType) -> None:
    caches = [torch.randn(3, 2, 16, 8).transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    slots, first, queries, counts, paths = to_device(
        torch.tensor([40, 3, 4, 5, 6, 7, 8, 20, 21]),
        torch.tensor([0, 6, 7], dtype=torch.int32),
        torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        torch.tensor([4, 1], dtype=torch.int32),
        torch.tensor([[0, 2, 4, -1, -1], [-1] * 5], dtype=torch.int32),
    )
    with no_device_wait():
        module.DeviceKVMover(caches)(slots, first, queries, counts, paths)
    for old, new in zip(before, caches, strict=True):
        for source, target in ((6, 5), (8, 6)):
            assert torch.equal(new[0, :, target], old[0, :, source])
            new[0, :, target] = old[0, :, target]
        assert torch.equal(new, old)


def test_layers_of_different_layouts_are_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="different layouts"):
        module.DeviceKVMover([torch.zeros(3, 2, 16, 8), torch.zeros(3, 2, 32, 8)])


def test_attention_of_trees_on_the_device_is_that_of_trees_on_the_host(module: ModuleType) -> None:
    from pilotfish.kvcache.kernels.tree_triton import TritonTreeBatch, tree_attention

    drawn: list[Tree] = [([0, 0, 0], [-1, -1, 1]), ([], []), ([0] * 5, [-1, 0, 0, 2, 1])]
    first, queries, positions = to_device(*batch(drawn, [20, 9, 33]))
    device = module.DeviceTrees(4, 8, 64, DEVICE)
    device.describe(put(device, drawn), first, queries, positions, 3, 4, 6)
    query = torch.randn(len(positions), 4, 32).to(DEVICE)
    cache, table = torch.randn(12, 2, 16, 64).to(DEVICE), torch.arange(12, dtype=torch.int32).view(3, 4).to(DEVICE)
    expected, found = torch.zeros_like(query), torch.zeros_like(query)
    masks = [tree_attention_mask(np.array(drawn[i][1], np.int32)) for i in (0, 2)]
    roots = [int(queries[int(first[i])]) for i in (0, 2)]
    tree_attention(query, cache, table, TritonTreeBatch([0, 2], roots, [21, 34], masks, DEVICE), 0.2, expected)
    tree_attention(query, cache, table, device.view(3), 0.2, found)
    torch.testing.assert_close(found, expected)
    device.clear(6)
    untouched = found.clone()
    tree_attention(query, cache, table, device.view(3), 0.2, found)
    assert torch.equal(found, untouched)


COMPILE = """
import torch
from ahead_of_time import compiled_launches
from pilotfish.kvcache.kernels.device_tree_triton import DeviceKVMover, DeviceTrees
from pilotfish.kvcache.kernels.tree_triton import tree_attention
with compiled_launches() as sizes:
    trees = DeviceTrees(4, 48, 512, torch.device("cpu"))
    ids, first, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32), torch.arange(3)
    trees.describe(ids, first, rows, rows, 1, 1, 3)
    accepted = trees.accept(rows, rows.int(), first, ids)
    cache = torch.zeros(2, 2, 16, 128, dtype=torch.bfloat16)
    DeviceKVMover([cache])(rows, first, rows, accepted.counts, accepted.paths)
    query = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
    tree_attention(query, cache, first[None], trees.view(1), 0.1, query)
print(sorted(sizes))
"""


def test_kernels_compile_for_a_gpu() -> None:
    compiled = compiled_kernels(COMPILE)
    from pilotfish.kvcache.kernels import programs_device_tree_triton, programs_tree_triton

    modules = programs_device_tree_triton, programs_tree_triton
    assert compiled == sorted(name for module in modules for name in vars(module) if name.endswith("_kernel"))


@pytest.mark.parametrize("nodes", [0, 64])
def test_the_size_of_trees_is_bounded(module: ModuleType, nodes: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 63 nodes of a tree, got {nodes}"):
        module.DeviceTrees(1, nodes, 64, DEVICE)
