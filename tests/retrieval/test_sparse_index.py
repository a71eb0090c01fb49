"""Tests of the sparse index against naive sums, with and without block skipping."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import sparse_index
from pilotfish.retrieval.kernels.sparse_search import BLOCK, SKIP
from pilotfish.retrieval.sparse_vectors import SparseVectors

QUIET = settings(max_examples=80, deadline=None)


def random_vectors(rng: np.random.Generator, texts: int, vocabulary: int, most: int) -> SparseVectors:
    rows = []
    for _ in range(texts):
        ids = rng.choice(vocabulary, int(rng.integers(0, min(most, vocabulary) + 1)), replace=False)
        rows.append({int(i): float(w) for i, w in zip(ids, rng.gamma(1.0, 1.0, len(ids)) + 0.01, strict=True)})
    return SparseVectors.from_dicts(rows)


class Collection:
    """Random documents in several segments, and their weights as a dense table."""

    def __init__(self, seed: int, segments: int, texts: int, vocabulary: int, bits: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        parts = [random_vectors(rng, int(rng.integers(0, texts + 1)), vocabulary, 12) for _ in range(segments)]
        self.shared = sparse_index.train_impacts(np.concatenate([p.values for p in parts]), bits)
        self.documents, self.arrays, rows = 0, [], []
        for part in parts:
            self.documents += int(rng.integers(0, 100))  # gaps in the document numbers
            numbers = np.arange(self.documents, self.documents + len(part))
            self.documents += len(part)
            self.arrays.append(sparse_index.build_sparse_segment(part, numbers, self.shared, bits))
            rows += [(int(n), part[i]) for i, n in enumerate(numbers)]
        self.table = np.zeros((max(self.documents, 1), vocabulary), np.float32)
        step, levels = self.shared["step"][0], (1 << bits) - 1
        for n, row in rows:
            self.table[n, row.indices] = np.minimum(np.rint(row.values / step), levels) * step
        self.searcher = sparse_index.InvertedIndexSearcher(self.shared, self.arrays, self.documents)


def naive_search(c: Collection, query: SparseVectors, k: int, passing: np.ndarray) -> list[tuple[int, float]]:
    scores = c.table[:, query.indices].astype(np.float64) @ query.values
    order = sorted((n for n in range(len(scores)) if passing[n] and scores[n] > 0), key=lambda n: (-scores[n], n))
    return [(n, float(scores[n])) for n in order[:k]]


@QUIET
@given(
    seed=st.integers(0, 1 << 30),
    segments=st.integers(1, 3),
    texts=st.sampled_from([0, 3, 40, 700]),
    vocabulary=st.sampled_from([3, 40, 400]),
    bits=st.sampled_from([8, 16]),
    k=st.sampled_from([1, 3, 20, 2000]),
    filtered=st.sampled_from([None, 0.02, 0.5]),
)
def test_search_matches_naive_sums(seed, segments, texts, vocabulary, bits, k, filtered) -> None:
    c = Collection(seed, segments, texts, vocabulary, bits)
    query = random_vectors(c.rng, 1, vocabulary + 5, 30)[0]  # includes terms that no document contains
    passing = np.ones(len(c.table), np.bool_) if filtered is None else c.rng.random(len(c.table)) < filtered
    allow = None if filtered is None else np.packbits(passing, bitorder="little")
    pairs = zip(query.indices.tolist(), query.values.tolist(), strict=True)
    known = SparseVectors.from_dicts([{i: w for i, w in pairs if i < vocabulary}])
    with patch.object(sparse_index, "EXHAUSTIVE", -1):  # else segments as small as these are scored exhaustively
        actual = c.searcher.search(query, k, allow)
    exhaustive = c.searcher.search(query, k, allow, exhaustive=True)
    assert actual[0].tolist() == exhaustive[0].tolist()
    assert actual[1].tolist() == exhaustive[1].tolist()
    expected = naive_search(c, known, k, passing)
    assert len(expected) == len(actual[0])
    np.testing.assert_allclose(actual[1], [score for _, score in expected], rtol=1e-4, atol=1e-6)
    scores = c.table[:, known.indices].astype(np.float64) @ known.values
    np.testing.assert_allclose(scores[actual[0]], actual[1], rtol=1e-4, atol=1e-6)  # each document has its own score


@QUIET
@given(seed=st.integers(0, 1 << 30), texts=st.sampled_from([0, 5, 300]))
def test_merged_segment_holds_live_documents_only(seed: int, texts: int) -> None:
    c = Collection(seed, 3, texts, 50, 8)
    live = c.rng.random(c.documents) < 0.6
    merged = sparse_index.merge_sparse_segments(c.arrays, live)
    searcher = sparse_index.InvertedIndexSearcher(c.shared, [merged], c.documents)
    query = random_vectors(c.rng, 1, 50, 20)[0]
    allow = np.packbits(live, bitorder="little")
    for actual, expected in zip(searcher.search(query, 50), c.searcher.search(query, 50, allow), strict=True):
        assert actual.tolist() == expected.tolist()
    numbers = np.concatenate([a["documents"] for a in c.arrays])
    assert merged["documents"].tolist() == sorted(n for n in numbers.tolist() if live[n])
    again = sparse_index.merge_sparse_segments([merged], np.ones(c.documents, np.bool_))
    assert all(np.array_equal(merged[name], again[name]) for name in merged)


@QUIET
@given(seed=st.integers(0, 1 << 30), texts=st.sampled_from([3, 300]))
def test_weights_and_document_frequencies_match_dense_table(seed: int, texts: int) -> None:
    c = Collection(seed, 2, texts, 30, 8)
    ids = np.arange(35, dtype=np.int32)
    table = np.pad(c.table, ((0, 0), (0, 5)))
    assert c.searcher.frequencies(ids).tolist() == (table > 0).sum(0).tolist()
    for number in range(0, c.documents, 7):
        np.testing.assert_allclose(c.searcher.weights(number, ids), table[number], rtol=1e-5)


def test_skip_entries_find_documents_in_many_blocks() -> None:
    texts = BLOCK * SKIP * 3
    vectors = SparseVectors.from_dicts([{0: 1.0, 1: float(1 + i % 7)} for i in range(texts)])
    shared = sparse_index.train_impacts(vectors.values, 16)
    searcher = sparse_index.InvertedIndexSearcher(
        shared, [sparse_index.build_sparse_segment(vectors, np.arange(texts), shared, 16)], texts
    )
    query = SparseVectors.from_dicts([{1: 1.0}])
    with patch.object(sparse_index, "EXHAUSTIVE", -1):
        assert searcher.search(query, 5)[0].tolist() == [6, 13, 20, 27, 34]
    assert searcher.search(query, 5)[0].tolist() == [6, 13, 20, 27, 34]
    np.testing.assert_allclose(searcher.weights(texts - 1, np.array([1], np.int32)), [1 + (texts - 1) % 7], rtol=1e-3)


def test_refuses_inconsistent_arrays() -> None:
    c = Collection(3, 1, 300, 40, 8)
    good = c.arrays[0]

    def make_searcher(**changes: np.ndarray) -> None:
        sparse_index.InvertedIndexSearcher(c.shared, [{**good, **changes}], c.documents)

    make_searcher()
    for changes in (
        {"tops": good["tops"][1:]},
        {"sizes": good["sizes"] + 1},
        {"skips": good["skips"] + 1},
        {"term_starts": good["term_starts"][::-1].copy()},
        {"terms": good["terms"][::-1].copy()},
        {"places": good["places"][1:]},
        {"places": good["places"] + BLOCK},
        {"blocks": good["blocks"] + c.documents},
        {"blocks": good["blocks"] - c.documents},
    ):
        with pytest.raises(ValueError, match=r"blocks|lists|terms|numbers"):
            make_searcher(**changes)
