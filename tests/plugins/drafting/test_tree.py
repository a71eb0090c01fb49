"""Tests of draft trees in verification: node depths and the tree attention mask."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.plugins.contracts import ROOT, DraftTree
from pilotfish.plugins.drafting.tree import (
    is_chain,
    node_depths,
    sort_by_score,
    tree_attention_mask,
    truncate_tree,
)

PARENTS = st.integers(0, 40).flatmap(
    lambda n: st.tuples(*(st.integers(ROOT, i - 1) for i in range(n))).map(lambda p: np.array(p, np.int32))
)


def path_to(parents: np.ndarray, node: int) -> list[int]:
    """Return the nodes from the root's child down to ``node``."""
    path = []
    while node != ROOT:
        path.append(node)
        node = int(parents[node])
    return path[::-1]


@given(PARENTS)
def test_node_attends_to_root_ancestors_and_itself(parents: np.ndarray) -> None:
    mask, depth = tree_attention_mask(parents), node_depths(parents)
    assert np.flatnonzero(mask[0]).tolist() == [0]
    for node in range(len(parents)):
        path = path_to(parents, node)
        assert np.flatnonzero(mask[node + 1]).tolist() == sorted([0, *(p + 1 for p in path)])
        assert depth[node] == len(path)


def test_sort_by_score_reorders_nodes() -> None:
    tree = DraftTree(
        np.array([5, 6, 7], np.int32), np.array([-1, -1, 0], np.int32), np.array([0.5, 0.1, 0.45], np.float32)
    )
    result = sort_by_score(tree)
    assert (result.tokens.tolist(), result.parents.tolist()) == ([5, 7, 6], [-1, 0, -1])
    assert sort_by_score(result) is result


@given(st.integers(0, 5))
def test_chain_is_a_tree_with_one_leaf(n: int) -> None:
    assert is_chain(np.arange(ROOT, n - 1, dtype=np.int32))
    assert not is_chain(np.array([ROOT, ROOT], np.int32))


@given(PARENTS, st.integers(0, 50))
def test_truncated_tree_has_the_first_nodes(parents: np.ndarray, nodes: int) -> None:
    n = len(parents)
    tree = DraftTree(np.arange(n, dtype=np.int32), parents, np.ones(n, np.float32))
    assert len(truncate_tree(tree, nodes)) == min(n, nodes)
