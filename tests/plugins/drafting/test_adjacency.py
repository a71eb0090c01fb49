"""Tests of the compiled adjacency table against a naive implementation with a dictionary of contexts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.plugins.contracts import ROOT
from pilotfish.plugins.drafting import adjacency as A  # noqa: N812
from pilotfish.plugins.drafting import adjacency_table as R  # noqa: N812
from pilotfish.plugins.drafting.template import static_tree
from pilotfish.plugins.token_recycling import TokenRecycling

VOCAB, K, ORDER, BITS = 12, 3, 3, 20  # 2**20 rows, so that hash collisions are rare

Text = list[int]


class NaiveTable:
    """Naive adjacency table: a list of (token, confidence) for each context."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def contexts(self, text: Text) -> list[tuple[int, ...]]:
        return [tuple(text[-m:]) for m in range(1, min(ORDER, len(text)) + 1)]

    def find(self, text: Text) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        known = [c for c in self.contexts(text) if c in self.rows or len(c) == 1]
        return known[-1], self.rows.get(known[-1], [])

    def read_text(self, text: Text) -> None:
        for i in range(1, len(text)):
            for context in self.contexts(text[:i]):
                row = [c for c in self.rows.get(context, []) if c[0] != text[i]]
                self.rows[context] = [(text[i], R.FROM_TEXT), *row][:K]

    def recycle(
        self, context: Text, inputs: Text, accepted: list[bool], ids: list[Text], probs: list[list[float]]
    ) -> None:
        def write(node: int) -> None:
            row = [
                (t, int(A.confidence_bin(float(np.float32(p))))) for t, p in zip(ids[node], probs[node], strict=True)
            ]
            for c in self.contexts(context + inputs[: node + 1]):
                self.rows[c] = row

        nodes = range(len(inputs))
        for node in [n for n in reversed(nodes) if not accepted[n]] + [n for n in nodes if accepted[n]]:
            write(node)


def row_of(rows: R.AdjacencyTable, text: Text) -> tuple[int, list[tuple[int, int]]]:
    row, length = A.find_row(rows, np.array(text, np.int32), ORDER)
    pairs = zip(rows.tokens[row].tolist(), rows.confidence[row].tolist(), strict=True)
    return length, [(t, c) for t, c in pairs if t != R.NONE]


tokens = st.integers(0, VOCAB - 1)
texts = st.lists(tokens, min_size=1, max_size=30)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Text, Text, list[bool], list[Text], list[list[float]]]:
    context, inputs = draw(st.lists(tokens, max_size=6)), draw(st.lists(tokens, min_size=1, max_size=6))
    right = draw(st.integers(1, len(inputs)))
    ids = [draw(st.permutations(range(VOCAB)))[:K] for _ in inputs]
    probs = [sorted(draw(st.lists(st.floats(0, 1, width=32), min_size=K, max_size=K)), reverse=True) for _ in inputs]
    return context, inputs, [i < right for i in range(len(inputs))], ids, probs


@settings(max_examples=200, deadline=None)
@given(st.lists(texts | steps(), max_size=5), st.lists(texts, min_size=1, max_size=5))
def test_rows_match_naive_implementation(events: list, questions: list[Text]) -> None:
    rows, naive = R.make_adjacency_table(VOCAB, K, ORDER, BITS), NaiveTable()
    for event in events:
        if isinstance(event, list):
            A.prime_from_text(rows, ORDER, np.array(event, np.int32))
            naive.read_text(event)
        else:
            context, inputs, accepted, ids, probs = event
            A.update_rows(
                rows,
                ORDER,
                np.array(context, np.int32),
                np.array(inputs, np.int32),
                np.arange(-1, len(inputs) - 1, dtype=np.int32),
                np.array(accepted),
                np.array(ids, np.int32),
                np.array(probs, np.float32),
            )
            naive.recycle(context, inputs, accepted, ids, probs)
    for text in questions:
        context, expected = naive.find(text)
        assert row_of(rows, text) == (len(context), expected)


def test_row_written_twice_keeps_deepest_accepted_or_first() -> None:
    def write(accepted: list[bool]) -> int:
        rows = R.make_adjacency_table(VOCAB, 1, 1, 4)
        same = np.array([7, 7, 7], np.int32)
        ids = np.array([[1], [2], [3]], np.int32)
        parents = np.array([-1, 0, 1], np.int32)
        A.update_rows(rows, 1, same[:0], same, parents, np.array(accepted), ids, np.ones((3, 1), np.float32))
        return int(rows.tokens[7, 0])

    assert write([True, True, False]) == 2
    assert write([True, False, False]) == 1
    assert write([False, False, False]) == 1


def test_masked_row_writes_nothing() -> None:
    rows = R.make_adjacency_table(VOCAB, K, ORDER, 4)
    one = np.array([3], np.int32)
    masked_ids = np.full((1, K), -1, np.int32)
    A.update_rows(
        rows, ORDER, one, one, np.array([-1], np.int32), np.array([True]), masked_ids, np.ones((1, K), np.float32)
    )
    assert (rows.tokens == R.NONE).all()


def expand(
    rows: R.AdjacencyTable, rate: np.ndarray, text: Text, nodes: int, depth: int
) -> list[tuple[int, int, float]]:
    out = np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty(nodes, np.float32)
    n = A.grow_tree(rows, rate, ORDER, np.array(text, np.int32), nodes, depth, *out)
    return list(zip(out[0][:n].tolist(), out[1][:n].tolist(), out[2][:n].tolist(), strict=True))


def naive_expand(
    naive: NaiveTable, rate: np.ndarray, text: Text, nodes: int, depth: int
) -> list[tuple[int, int, float]]:
    """Return the tree of best-first growth, with all candidates computed again for each node."""
    tree: list[tuple[int, int, float]] = []

    def path(node: int) -> Text:
        return [] if node == -1 else [*path(tree[node][1]), tree[node][0]]

    while len(tree) < nodes:
        candidates = []
        for parent in range(-1, len(tree)):
            if len(path(parent)) >= depth:
                continue
            context, row = naive.find(text + path(parent))
            rank = sum(1 for _, p, _ in tree if p == parent)
            if rank < len(row):
                base = np.float32(1.0 if parent == -1 else tree[parent][2])
                score = base * rate[len(context), rank, row[rank][1]]
                candidates.append((float(score), parent, row[rank][0]))
        if not candidates:
            break
        score, parent, token = max(candidates, key=lambda p: p[0])
        tree.append((token, parent, score))
    return tree


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), texts, st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_tree_growth_matches_naive_implementation(
    read: list[Text], text: Text, nodes: int, depth: int, seed: int
) -> None:
    rows, naive = R.make_adjacency_table(VOCAB, K, ORDER, BITS), NaiveTable()
    for t in read:
        A.prime_from_text(rows, ORDER, np.array(t, np.int32))
        naive.read_text(t)
    # Random rates have no ties, so there is only one right order.
    rate = np.random.default_rng(seed).uniform(0.05, 0.95, (ORDER + 1, K, R.NUM_CONFIDENCES)).astype(np.float32)
    got, expected = expand(rows, rate, text, nodes, depth), naive_expand(naive, rate, text, nodes, depth)
    # Equal contexts can still give two candidates the same score; then only the scores agree, not the order.
    assert len(got) == len(expected)
    assert [g[2] for g in got] == pytest.approx([e[2] for e in expected])
    for i, (token, parent, _) in enumerate(got):
        assert parent < i
        assert 0 <= token < VOCAB


def test_acceptance_rates_follow_observed_acceptance() -> None:
    rows, acceptance = R.make_adjacency_table(VOCAB, 2, 1, 4), R.make_acceptance_rates(1, 2)
    rows.tokens[5] = [1, 2]
    rows.confidence[5] = [0, 4]
    for _ in range(300):
        A.update_acceptance_rates(rows, acceptance, 1, np.array([5], np.int32), np.array([2], np.int32))
    assert acceptance.rate[1, 0, 0] < 0.05
    assert acceptance.rate[1, 1, 4] > 0.95


def test_old_observations_decay() -> None:
    rows, acceptance = R.make_adjacency_table(VOCAB, 1, 1, 4), R.make_acceptance_rates(1, 1)
    rows.tokens[5], rows.confidence[5] = 1, 0
    for token, times in ((1, 5000), (2, 5000)):
        for _ in range(times):
            A.update_acceptance_rates(rows, acceptance, 1, np.array([5], np.int32), np.array([token], np.int32))
    assert acceptance.seen.max() < 2001
    assert acceptance.rate[1, 0, 0] < 0.2


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 12))
def test_matrix_update_matches_reference(seed: int, n: int) -> None:
    """Test `adjacency.update_rows` with order 1 against `TokenRecycling.update_matrix`, over several steps."""
    rng = np.random.default_rng(seed)
    rows = R.make_adjacency_table(VOCAB, K, 1, 4)
    matrix = rows.tokens.copy()
    for _ in range(3):
        tokens = rng.integers(0, 6, n).astype(np.int32)  # tokens repeat
        parents = np.array([ROOT, *(rng.integers(0, i) for i in range(1, n))], np.int32)
        top_k = np.stack([rng.permutation(VOCAB)[:K] for _ in range(n)]).astype(np.int32)
        accepted = rng.random(n) < 0.5
        probs = np.full((n, K), 0.2, np.float32)
        A.update_rows(rows, 1, np.empty(0, np.int32), tokens, parents, accepted, top_k, probs)
        TokenRecycling.update_matrix(matrix, tokens, top_k, accepted)
        np.testing.assert_array_equal(rows.tokens[:VOCAB], matrix)


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0, 1))
def test_static_tree_matches_reference(seed: int, filled: float) -> None:
    """Test the kernel against `TokenRecycling.draft_static_tree`, with missing rows and candidates."""
    rng = np.random.default_rng(seed)
    rows = R.make_adjacency_table(VOCAB, K, 1, 4)
    for token in range(VOCAB):
        count = int(rng.integers(1, K + 1)) if rng.random() < filled else 0
        rows.tokens[token, :count] = rng.permutation(VOCAB)[:count]
    rates = R.make_acceptance_rates(1, K)
    shape, ranks = static_tree()
    expected = TokenRecycling.draft_static_tree(rows.tokens[:VOCAB], 7, shape, ranks)
    size = len(shape)
    tokens, parents, scores = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)
    context = np.array([7], np.int32)
    n = A.fill_static_tree(rows, rates.rate, 1, context, shape, ranks, size, size, tokens, parents, scores)
    np.testing.assert_array_equal(tokens[:n], expected[0])
    np.testing.assert_array_equal(parents[:n], expected[1])
