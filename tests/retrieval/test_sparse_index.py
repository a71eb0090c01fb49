"""The sparse index against plain sums: skipping blocks changes nothing, whatever is asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import sparse_index
from pilotfish.retrieval.kernels.sparse_search import BLOCK, SKIP
from pilotfish.retrieval.sparse_vectors import SparseVectors

QUIET = settings(max_examples=80, deadline=None)


def random_words(rng: np.random.Generator, texts: int, vocabulary: int, most: int) -> SparseVectors:
    rows = []
    for _ in range(texts):
        ids = rng.choice(vocabulary, int(rng.integers(0, min(most, vocabulary) + 1)), replace=False)
        rows.append({int(i): float(w) for i, w in zip(ids, rng.gamma(1.0, 1.0, len(ids)) + 0.01, strict=True)})
    return SparseVectors.from_dicts(rows)


class Collection:
    """Random documents in some segments, and their weights as a plain table."""

    def __init__(self, seed: int, segments: int, texts: int, vocabulary: int, bits: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        parts = [random_words(rng, int(rng.integers(0, texts + 1)), vocabulary, 12) for _ in range(segments)]
        self.shared = sparse_index.train_impacts(np.concatenate([p.values for p in parts]), bits)
        self.documents, self.arrays, rows = 0, [], []
        for part in parts:
            self.documents += int(rng.integers(0, 100))  # numbers of others
            numbers = np.arange(self.documents, self.documents + len(part))
            self.documents += len(part)
            self.arrays.append(sparse_index.build_sparse_segment(part, numbers, self.shared, bits))
            rows += [(int(n), part[i]) for i, n in enumerate(numbers)]
        self.table = np.zeros((max(self.documents, 1), vocabulary), np.float32)
        step, levels = self.shared["step"][0], (1 << bits) - 1
        for n, row in rows:
            self.table[n, row.indices] = np.minimum(np.rint(row.values / step), levels) * step
        self.searcher = sparse_index.InvertedIndexSearcher(self.shared, self.arrays, self.documents)


def plainly(c: Collection, query: SparseVectors, k: int, passing: np.ndarray) -> list[tuple[int, float]]:
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
def test_the_best_are_those_of_plain_sums(seed, segments, texts, vocabulary, bits, k, filtered) -> None:
    c = Collection(seed, segments, texts, vocabulary, bits)
    query = random_words(c.rng, 1, vocabulary + 5, 30)[0]  # with words that no document has
    passing = np.ones(len(c.table), np.bool_) if filtered is None else c.rng.random(len(c.table)) < filtered
    allow = None if filtered is None else np.packbits(passing, bitorder="little")
    pairs = zip(query.indices.tolist(), query.values.tolist(), strict=True)
    known = SparseVectors.from_dicts([{i: w for i, w in pairs if i < vocabulary}])
    skipped = c.searcher.search(query, k, allow)
    whole = c.searcher.search(query, k, allow, exhaustive=True)
    assert skipped[0].tolist() == whole[0].tolist()
    assert skipped[1].tolist() == whole[1].tolist()
    expected = plainly(c, known, k, passing)
    assert len(expected) == len(skipped[0])
    np.testing.assert_allclose(skipped[1], [score for _, score in expected], rtol=1e-4, atol=1e-6)
    scores = c.table[:, known.indices].astype(np.float64) @ known.values
    np.testing.assert_allclose(scores[skipped[0]], skipped[1], rtol=1e-4, atol=1e-6)  # each has its own score


@QUIET
@given(seed=st.integers(0, 1 << 30), texts=st.sampled_from([0, 5, 300]))
def test_a_merged_segment_is_that_of_living_documents(seed: int, texts: int) -> None:
    c = Collection(seed, 3, texts, 50, 8)
    live = c.rng.random(c.documents) < 0.6
    merged = sparse_index.merge_sparse_segments(c.arrays, live)
    searcher = sparse_index.InvertedIndexSearcher(c.shared, [merged], c.documents)
    query = random_words(c.rng, 1, 50, 20)[0]
    allow = np.packbits(live, bitorder="little")
    for found, expected in zip(searcher.search(query, 50), c.searcher.search(query, 50, allow), strict=True):
        assert found.tolist() == expected.tolist()
    numbers = np.concatenate([a["documents"] for a in c.arrays])
    assert merged["documents"].tolist() == sorted(n for n in numbers.tolist() if live[n])
    again = sparse_index.merge_sparse_segments([merged], np.ones(c.documents, np.bool_))
    assert all(np.array_equal(merged[name], again[name]) for name in merged)


@QUIET
@given(seed=st.integers(0, 1 << 30), texts=st.sampled_from([3, 300]))
def test_weights_and_frequencies_are_told(seed: int, texts: int) -> None:
    c = Collection(seed, 2, texts, 30, 8)
    ids = np.arange(35, dtype=np.int32)
    table = np.pad(c.table, ((0, 0), (0, 5)))
    assert c.searcher.frequencies(ids).tolist() == (table > 0).sum(0).tolist()
    for number in range(0, c.documents, 7):
        np.testing.assert_allclose(c.searcher.weights(number, ids), table[number], rtol=1e-5)


def test_many_blocks_are_found_by_their_skips() -> None:
    texts = BLOCK * SKIP * 3
    words = SparseVectors.from_dicts([{0: 1.0, 1: float(1 + i % 7)} for i in range(texts)])
    shared = sparse_index.train_impacts(words.values, 16)
    searcher = sparse_index.InvertedIndexSearcher(
        shared, [sparse_index.build_sparse_segment(words, np.arange(texts), shared, 16)], texts
    )
    found = searcher.search(SparseVectors.from_dicts([{1: 1.0}]), 5)
    assert found[0].tolist() == [6, 13, 20, 27, 34]
    np.testing.assert_allclose(searcher.weights(texts - 1, np.array([1], np.int32)), [1 + (texts - 1) % 7], rtol=1e-3)


def test_arrays_that_do_not_fit_are_refused() -> None:
    c = Collection(3, 1, 300, 40, 8)
    good = c.arrays[0]

    def made(**changes: np.ndarray) -> None:
        sparse_index.InvertedIndexSearcher(c.shared, [{**good, **changes}], c.documents)

    made()
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
            made(**changes)
