"""Tests of the static tree of Token Recycling against the paper's counts and a naive traversal."""

import numpy as np
import pytest

from pilotfish.plugins.contracts import ROOT, DraftBudget, DraftRequest, Engine
from pilotfish.plugins.drafting import adjacency
from pilotfish.plugins.drafting.template import static_tree
from pilotfish.plugins.drafting.tree import node_depths
from pilotfish.plugins.token_recycling import TokenRecycling, TokenRecyclingOptions

ENGINE = Engine("m", vocab_size=50, max_model_len=512, max_num_seqs=4, num_speculative_tokens=80)


def test_static_tree_has_node_counts_of_the_paper() -> None:
    parents, ranks = static_tree()
    below = np.ones(80, int)
    for node in range(79, -1, -1):
        if parents[node] != ROOT:
            below[parents[node]] += below[node]
    assert np.bincount(node_depths(parents)).tolist() == [0, 8, 21, 25, 15, 8, 3]
    assert below[:8].tolist() == [49, 10, 6, 5, 3, 3, 2, 2]
    assert len(set(range(80)) - set(parents.tolist())) == 40
    for node in range(80):
        siblings = ranks[parents == parents[node]]
        assert siblings.tolist() == list(range(len(siblings)))


@pytest.mark.parametrize("nodes", [80, 30])
def test_nodes_are_candidates_of_their_parents_rows(nodes: int) -> None:
    drafter = TokenRecycling(TokenRecyclingOptions(order=1, shape="template", prime=False), ENGINE)
    drafter.start("a", np.array([3], np.int32))
    rows = drafter._table("").rows
    rng = np.random.default_rng(0)
    for token in range(40):  # the other tokens have no candidates
        rows.tokens[token] = rng.permutation(50)[:8]
    tree = drafter.propose([DraftRequest("a", np.array([3], np.int32), 80)], DraftBudget(nodes, 6))[0]
    parents, ranks = static_tree()
    index: dict[int, int] = {ROOT: ROOT}
    expected: list[tuple[int, int]] = []
    for node in range(80):
        if len(expected) == nodes or int(parents[node]) not in index:
            continue
        parent = index[int(parents[node])]
        token = int(rows.tokens[3 if parent == ROOT else expected[parent][0], ranks[node]])
        if token != adjacency.NONE:
            index[node] = len(expected)
            expected.append((token, parent))
    assert list(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)) == expected
    assert drafter.fixed_size
    assert not TokenRecycling(TokenRecyclingOptions(), ENGINE).fixed_size
