"""Tests of the plugin contracts: draft trees and the error `Unsupported`."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.plugins.contracts import ROOT, DraftTree, Unsupported


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    n = draw(st.integers(0, 12))
    parents = [draw(st.integers(ROOT, i - 1)) for i in range(n)]
    scores: list[float] = []
    for parent in parents:
        above = 1.0 if parent == ROOT else scores[parent]
        scores.append(above * draw(st.floats(0, 1)))
    return DraftTree(np.arange(n, dtype=np.int32), np.array(parents, np.int32), np.array(scores, np.float32))


def all_paths(tree: DraftTree) -> list[list[int]]:
    paths = []
    for node in range(len(tree)):
        path = [node]
        while tree.parents[path[-1]] != ROOT:
            path.append(int(tree.parents[path[-1]]))
        paths.append(path[::-1])
    return paths


@given(trees())
def test_best_path_has_most_expected_tokens(tree: DraftTree) -> None:
    best = tree.best_path().tolist()
    if not len(tree):
        assert best == []
        return
    assert best[0] in np.flatnonzero(tree.parents == ROOT)
    assert all(tree.parents[b] == a for a, b in itertools.pairwise(best))
    value = max(float(tree.scores[p].astype(np.float64).sum()) for p in all_paths(tree))
    assert float(tree.scores[best].astype(np.float64).sum()) == pytest.approx(value)


def test_refuses_malformed_trees() -> None:
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="after its child"):
        DraftTree(one, np.array([0], np.int32), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="below"):
        DraftTree(one, np.array([-2], np.int32), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="1 tokens"):
        DraftTree(one, np.array([-1], np.int32), np.ones(2, np.float32))


def test_unsupported_names_model_layer_reason_and_remedy() -> None:
    error = Unsupported("razor", "MLA keeps no heads", "choose another model", "deepseek", "model.layers.0")
    assert str(error) == (
        "razor does not support model deepseek, layer model.layers.0: MLA keeps no heads; choose another model"
    )
