"""Tests of the tries of continuations (counts, scores, fusion) against dictionaries of paths."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import ROOT, DraftTree
from pilotfish.plugins.drafting import tries
from pilotfish.plugins.drafting.acceptance_counts import (
    ABSENT,
    ANY,
    BASE,
    CONDITIONALS,
    FIRST,
    LISTED,
    SHARES,
    UNKNOWN,
    make_acceptance_counts,
)
from pilotfish.plugins.rasd import RASD

rows = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12)


def grown(continuations: list[list[int]], room: int = 200) -> tuple[np.ndarray, ...]:
    width = max(map(len, continuations))
    followers = np.array([[*c, *[-1] * (width - len(c))] for c in continuations], np.int32)
    arrays = tuple(np.empty(room, np.int32) for _ in range(4))
    n = tries.build_trie(followers, *arrays)
    return tuple(a[:n] for a in arrays)


def paths(tokens: np.ndarray, parents: np.ndarray) -> list[tuple[int, ...]]:
    result: list[tuple[int, ...]] = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        result.append((() if parent == ROOT else result[parent]) + (token,))
    return result


def scored(parents: np.ndarray, data: st.DataObject) -> np.ndarray:
    scores: list[float] = []
    for parent in parents.tolist():
        # No such fraction is at the edge of a bin.
        scores.append(data.draw(st.integers(10, 997)) / 997 * (1.0 if parent == ROOT else scores[parent]))
    return np.array(scores, np.float32)


@settings(deadline=None)
@given(rows)
def test_trie_counts_prefixes(continuations: list[list[int]]) -> None:
    tokens, parents, counts, depths = grown(continuations)
    actual = dict(zip(paths(tokens, parents), counts.tolist(), strict=True))
    expected = {tuple(c[: i + 1]) for c in continuations for i in range(len(c))}
    assert actual == {p: sum(tuple(c[: len(p)]) == p for c in continuations) for p in expected}
    assert depths.tolist() == [len(p) for p in paths(tokens, parents)]
    assert actual == RASD.retrieval_trie(continuations)
    truncated = grown(continuations, room=3)
    assert len(truncated[0]) == min(3, len(tokens))


@settings(deadline=None)
@given(rows, rows, st.data())
def test_base_tree_is_matched_by_path(a, b, data: st.DataObject) -> None:
    tokens, parents, *_ = grown(a)
    base_tokens, base_parents, *_ = grown(b)
    scores = scored(base_parents, data)
    feedback = np.empty(len(tokens), np.int32)
    tries.match_base_tree(tokens, parents, base_tokens, base_parents, scores, feedback)
    base = dict(zip(paths(base_tokens, base_parents), scores.tolist(), strict=True))
    for path, kind in zip(paths(tokens, parents), feedback.tolist(), strict=True):
        siblings = {p: s for p, s in base.items() if len(p) == len(path) and p[:-1] == path[:-1]}
        if not siblings:
            assert kind == UNKNOWN
        elif path not in siblings:
            assert kind == ABSENT
        else:
            assert kind == (FIRST if siblings[path] >= max(siblings.values()) else LISTED)


@settings(deadline=None)
@given(rows, rows, rows, st.integers(1, 40), st.data())
def test_fused_trees_hold_every_path_once(a, b, c, most: int, data: st.DataObject) -> None:
    parts = []
    for continuations in (a, b, c):
        tokens, parents, *_ = grown(continuations)
        parts.append((tokens, parents, scored(parents, data)))
    capacity = sum(len(p[0]) for p in parts)
    tokens, parents, scores = np.empty(capacity, np.int32), np.empty(capacity, np.int32), np.empty(capacity, np.float32)
    n = tries.merge_tries(0, tokens, parents, scores, *parts[0])
    n = tries.merge_tries(n, tokens, parents, scores, *parts[1])
    retrieved = dict(zip(paths(tokens[:n], parents[:n]), scores[:n].tolist(), strict=True))
    for part in parts[:2]:
        for path, score in zip(paths(*part[:2]), part[2].tolist(), strict=True):
            assert retrieved[path] >= score
    seen, right = make_acceptance_counts(1)
    right *= np.linspace(0.3, 1, right.size, dtype=np.float32).reshape(right.shape)
    cells = np.empty((len(parts[2][0]), 3), np.int32)
    base_tokens, base_parents, base_scores = parts[2]
    n = tries.fuse_trees(n, tokens, parents, scores, base_tokens, base_parents, base_scores, seen, right, cells)

    def rate(conditional: float, beside: float) -> float:
        row = np.searchsorted(CONDITIONALS, np.float32(conditional), side="right")
        column = np.count_nonzero(np.float32(beside) < SHARES)
        return float(right[-1, row, column, ANY] / seen[-1, row, column, ANY])

    fused_paths = paths(tokens[:n], parents[:n])
    base = dict(zip(paths(*parts[2][:2]), parts[2][2].tolist(), strict=True))
    fused = RASD.fuse(retrieved, base, rate)
    assert set(fused_paths) == set(fused)
    np.testing.assert_allclose(scores[:n], [fused[path] for path in fused_paths], rtol=1e-4, atol=1e-6)
    assert len(set(fused_paths)) == len(fused_paths)
    assert set(fused_paths) == {p for part in parts for p in paths(*part[:2])}
    assert all(scores[i] <= scores[parents[i]] for i in range(n) if parents[i] != ROOT)
    assert scores[:n].max() <= 1
    tree = DraftTree(*tries.best_nodes(tokens[:n], parents[:n], scores[:n], most))  # checks that parents come first
    assert len(tree) == min(n, most)
    assert (np.diff(tree.scores) <= 0).all()
    kept = dict(zip(paths(tree.tokens, tree.parents), tree.scores.tolist(), strict=True))
    assert kept.items() <= dict(zip(fused_paths, scores[:n].tolist(), strict=True)).items()


def test_scores_converge_to_acceptance_rates() -> None:
    seen, right = make_acceptance_counts(2)
    tokens, parents, counts, depths = grown([[1, 2], [1, 3], [1, 2], [5, 5]])
    feedback = np.full(len(tokens), UNKNOWN, np.int32)
    scores, cells = np.empty(len(tokens), np.float32), np.empty((len(tokens), 3), np.int32)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        tries.score_trie(1, 4, 4, parents, counts, depths, feedback, seen, right, scores, cells)
        accepted = np.array([1, 2 if rng.random() < 0.9 else 3] if rng.random() < 0.7 else [9], np.int32)
        tries.update_acceptance_counts(1, tokens, parents, cells, accepted, seen, right)
    tries.score_trie(1, 4, 4, parents, counts, depths, feedback, seen, right, scores, cells)
    by_path = dict(zip(paths(tokens, parents), scores.tolist(), strict=True))
    assert abs(by_path[1,] - 0.7) < 0.05
    assert abs(by_path[1, 2] - 0.63) < 0.06
    assert by_path[5,] < 0.03
    assert (seen[0, ..., ANY] == 4).all(), "sources are counted separately"


def test_rates_of_base_tokens_depend_on_the_retrieved_tokens_beside_them() -> None:
    seen, right = make_acceptance_counts(1)
    rng = np.random.default_rng(0)
    for turn in range(4000):
        retrieved = turn % 2 == 0  # a retrieved token 1 beside the base drafter's token 2, or none
        n = int(retrieved)
        tokens, parents, scores = np.full(2, 1, np.int32), np.full(2, ROOT, np.int32), np.full(2, 0.8, np.float32)
        base, above, score = np.array([2], np.int32), np.array([ROOT], np.int32), np.array([0.7], np.float32)
        cells = np.empty((1, 3), np.int32)
        assert tries.fuse_trees(n, tokens, parents, scores, base, above, score, seen, right, cells) == n + 1
        accepted = np.array([2 if rng.random() < (0.1 if retrieved else 0.6) else 9], np.int32)
        tries.update_acceptance_counts(BASE, base, above, cells, accepted, seen, right)
        if turn >= 3998:
            assert abs(scores[n] - (0.1 if retrieved else 0.6)) < 0.05


def test_the_rate_of_one_kind_of_feedback_starts_at_the_rate_over_all() -> None:
    seen, right = make_acceptance_counts(1)
    tokens, parents = np.array([7], np.int32), np.array([ROOT], np.int32)
    counts, depths = np.array([1], np.int32), np.array([1], np.int32)
    scores, cells = np.empty(1, np.float32), np.empty((1, 3), np.int32)
    for _ in range(2000):  # tokens that the base drafter does not list are never right
        tries.score_trie(0, 4, 1, parents, counts, depths, np.array([ABSENT], np.int32), seen, right, scores, cells)
        tries.update_acceptance_counts(0, tokens, parents, cells, np.array([9], np.int32), seen, right)
    tries.score_trie(0, 4, 1, parents, counts, depths, np.array([FIRST], np.int32), seen, right, scores, cells)
    assert scores[0] < 0.05
    for _ in range(100):  # those that it lists first always are
        tries.score_trie(0, 4, 1, parents, counts, depths, np.array([FIRST], np.int32), seen, right, scores, cells)
        tries.update_acceptance_counts(0, tokens, parents, cells, tokens, seen, right)
    assert scores[0] > 0.85
    tries.score_trie(0, 4, 1, parents, counts, depths, np.array([ABSENT], np.int32), seen, right, scores, cells)
    assert scores[0] < 0.05
