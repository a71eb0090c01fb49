"""Tests of the token search kernels against a naive computation, with all codecs, imputations and filters."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.plugins.xtr import XTR
from pilotfish.retrieval.kernels import token_search
from pilotfish.retrieval.kernels.token_search import (
    CodecArrays,
    Impute,
    InvertedLists,
    TokenSearch,
    TokenSearchSettings,
)
from pilotfish.retrieval.xtr.codecs import CODECS

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Collection:
    """Encoded tokens of random documents in several segments."""

    def __init__(self, seed: int, codec: str, lists: int, segments: int, dimension: int = 64) -> None:
        rng = np.random.default_rng(seed)
        coder = CODECS[codec]
        self.centroids = unit(rng, lists, dimension)
        self.documents = int(rng.integers(1, 30))
        arrays = coder.train((rng.normal(size=(300, dimension)) * 0.2).astype(np.float32))
        none = np.empty(0, np.float32)
        books = arrays.get("codebooks", none.reshape(0, 256, 1))
        coded = CodecArrays(
            coder.kernel, coder.size(dimension), arrays.get("low", none), arrays.get("step", none), books
        )
        parts, self.rows = [], []  # (list, document, vector)
        for _ in range(segments):
            n = int(rng.integers(0, 120))
            assigned = np.sort(rng.integers(0, lists, n))
            documents = rng.integers(0, self.documents, n).astype(np.int32)
            codes = coder.encode(arrays, (rng.normal(size=(n, dimension)) * 0.2).astype(np.float32))
            starts = np.concatenate([[0], np.cumsum(np.bincount(assigned, minlength=lists))]).astype(np.int64)
            parts.append(InvertedLists(starts, documents, codes))
            vectors = self.centroids[assigned] + coder.decode(arrays, codes)
            self.rows += list(zip(assigned.tolist(), documents.tolist(), vectors, strict=True))
        self.search = TokenSearch(dimension, lists, coded, parts, self.documents)
        self.query = unit(rng, int(rng.integers(1, 6)), dimension)
        self.near = self.centroids @ self.query.T
        self.allowed = rng.random(self.documents) < 0.7
        self.bits = np.packbits(self.allowed, bitorder="little")


def naive_scores(c: Collection, s: TokenSearchSettings, allowed: np.ndarray | None) -> dict[int, float]:
    """Return the scores of all candidate documents, as defined in the docstring of `token_search`."""
    sums: dict[int, float] = {}
    total = 0.0
    for q, near in zip(c.query, c.near.T, strict=True):
        order = sorted(range(len(near)), key=lambda i: (-near[i], -i))
        hits = [(d, float(q @ v)) for i, d, v in c.rows if i in set(order[: s.nprobe])]
        passing = [(d, x) for d, x in hits if allowed is None or allowed[d]]
        missing = 0.0
        if s.impute == Impute.WARP:
            bounded_lists = order[: min(max(s.bound, s.nprobe), len(order))]
            missing, num_tokens = float(near[bounded_lists[-1]]), 0
            for i in bounded_lists:
                num_tokens += sum(1 for j, _, _ in c.rows if j == i)
                if num_tokens >= s.t_prime:
                    missing = float(near[i])
                    break
        elif s.impute == Impute.KPRIME and passing:
            best = sorted((x for _, x in passing), reverse=True)
            missing = best[min(s.kth, len(best)) - 1]
        total += missing
        best_scores: dict[int, float] = {}
        for d, x in passing:
            best_scores[d] = max(best_scores.get(d, -math.inf), x)
        for d, x in best_scores.items():
            # Close to the imputed similarity, both results are right.
            if s.impute == Impute.NOTHING or s.keep or x >= missing - 0.05:
                sums[d] = sums.get(d, 0.0) + (max(x, missing) if s.impute != Impute.NOTHING else x) - missing
    return {d: (x + total) / len(c.query) for d, x in sums.items()}


@QUIET
@given(
    seed=st.integers(0, 1 << 30),
    codec=st.sampled_from(sorted(CODECS)),
    lists=st.one_of(st.integers(1, 20), st.integers(1000, 2000)),  # many lists are sampled
    segments=st.integers(0, 3),
    nprobe=st.integers(1, 25),
    impute=st.sampled_from(list(Impute)),
    t_prime=st.integers(0, 100),
    kth=st.integers(1, 60),
    keep=st.booleans(),
    filtered=st.booleans(),
    compiled=st.booleans(),
)
def test_scores_match_naive_computation(
    monkeypatch, seed, codec, lists, segments, nprobe, impute, t_prime, kth, keep, filtered, compiled
) -> None:
    c = Collection(seed, codec, lists, segments)
    s = TokenSearchSettings(nprobe, impute, t_prime, 256, kth, keep)
    if not compiled:
        monkeypatch.setattr(token_search, "_compiled", lambda: None)
    allow = c.bits if filtered else None
    documents, scores, _ = c.search.search(c.query, c.near, 1000, s, allow)
    top, few, _ = c.search.search(c.query, c.near, 3, s, allow)
    monkeypatch.undo()
    expected = naive_scores(c, s, c.allowed if filtered else None)
    tolerance = 0.02  # queries are quantized to 8 bits
    assert len(set(documents.tolist())) == len(documents)
    assert (np.diff(scores) <= 1e-6).all()
    for d, x in zip(documents.tolist(), scores.tolist(), strict=True):
        assert x == pytest.approx(expected[d], abs=tolerance)
    if keep or impute == Impute.NOTHING:
        assert set(documents.tolist()) == set(expected)
    best = sorted(expected.values(), reverse=True)
    assert top.tolist() == documents[:3].tolist()
    for x, y in zip(few.tolist(), best, strict=False):
        assert x == pytest.approx(y, abs=tolerance)


@QUIET
@given(seed=st.integers(0, 1 << 30), segments=st.integers(1, 3), kprime=st.integers(1, 60))
def test_search_of_all_lists_matches_xtr_scores(seed: int, segments: int, kprime: int) -> None:
    """Test the kernel against `XTR.score_documents`, with all inverted lists read."""
    c = Collection(seed, sorted(CODECS)[0], 8, segments)
    if not c.rows:
        return
    owners = np.array([d for _, d, _ in c.rows])
    expected = XTR.score_documents(c.query, np.stack([v for *_, v in c.rows]), owners, kprime)
    documents, scores, _ = c.search.search(c.query, c.near, 1000, TokenSearchSettings(8, Impute.KPRIME, kth=kprime))
    actual = dict(zip(documents.tolist(), scores.tolist(), strict=True))
    for document in set(actual) & set(expected):
        assert actual[document] == pytest.approx(expected[document], abs=0.02)  # queries are quantized to 8 bits
    # Documents in only one of the results are at the imputed similarity, so their scores are the lowest.
    lowest = min(expected.values())
    assert all(expected[d] <= lowest + 0.05 for d in set(expected) - set(actual))
    assert all(actual[d] <= lowest + 0.05 for d in set(actual) - set(expected))


@QUIET
@given(seed=st.integers(0, 1 << 30), codec=st.sampled_from(sorted(CODECS)), dimension=st.sampled_from([64, 128, 192]))
def test_vector_instructions_give_the_same_results(seed: int, codec: str, dimension: int) -> None:
    c = Collection(seed, codec, 12, 2, dimension)
    answers = [
        c.search.search(c.query, c.near, 50, TokenSearchSettings(6, Impute.NOTHING, plain=p)) for p in (False, True)
    ]
    (fast, fast_scores, _), (slow, slow_scores, _) = answers
    np.testing.assert_allclose(np.sort(fast_scores), np.sort(slow_scores), atol=1e-5)
    if CODECS[codec].kernel < 2:
        assert fast.tolist() == slow.tolist()


@QUIET
@given(seed=st.integers(0, 1 << 30), impute=st.sampled_from(list(Impute)), compiled=st.booleans())
def test_trace_sums_to_the_score(monkeypatch, seed: int, impute: Impute, compiled: bool) -> None:
    c = Collection(seed, "sq8", 10, 2)
    if not compiled:
        monkeypatch.setattr(token_search, "_compiled", lambda: None)
    settings_ = TokenSearchSettings(5, impute, 30)
    documents, scores, _ = c.search.search(c.query, c.near, 50, settings_)
    for d, x in zip(documents.tolist(), scores.tolist(), strict=True):
        trace = c.search.search(c.query, c.near, 1, settings_, None, d)[2]
        assert trace is not None
        total = np.where(np.isnan(trace.scores), trace.imputed, trace.scores).mean()
        assert x == pytest.approx(float(total), abs=1e-4)
    monkeypatch.undo()


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_codec_reconstruction_error_is_bounded(codec: str) -> None:
    rng = np.random.default_rng(0)
    residuals = (rng.normal(size=(2000, 128)) * 0.1).astype(np.float32)
    coder = CODECS[codec]
    arrays = coder.train(residuals[:1000])
    codes = coder.encode(arrays, residuals)
    assert codes.shape == (2000, coder.size(128))
    query = unit(rng, 50, 128)
    error = (residuals - coder.decode(arrays, codes)) @ query.T
    spread = (residuals @ query.T).std()
    bound = {"float16": 0.001, "sq8": 0.02, "sq4": 0.2, "pq": 0.7, "rabitq": 0.9}[codec]
    assert error.std() < bound * spread
    assert abs(error.mean()) < 0.05 * spread  # no codec is biased


def test_refuses_inconsistent_arrays() -> None:
    c = Collection(0, "sq4", 4, 1)
    part = c.search.segments[0]

    def make_search(**changes: Any) -> None:
        TokenSearch(64, 4, c.search.coded, [InvertedLists(**{**vars(part), **changes})], c.documents)

    make_search()
    for changes in (
        {"starts": part.starts[:-1]},
        {"starts": part.starts[::-1].copy()},
        {"codes": part.codes[:, :-1]},
        {"documents": part.documents + c.documents},
        {"documents": part.documents - c.documents},
    ):
        with pytest.raises(ValueError, match=r"starts|codes of|lists that|numbers of"):
            make_search(**changes)


@pytest.mark.skipif(token_search._compiled() is None, reason="needs a C++ compiler")
@QUIET
@given(
    seed=st.integers(0, 1 << 30),
    codec=st.sampled_from(sorted(CODECS)),
    lists=st.integers(1, 20),
    impute=st.sampled_from(list(Impute)),
    keep=st.booleans(),
)
def test_scores_are_the_same_without_a_compiler(monkeypatch, seed, codec, lists, impute, keep) -> None:
    c = Collection(seed, codec, lists, 2)
    s = TokenSearchSettings(8, impute, 50, 256, 20, keep)
    documents, scores, _ = c.search.search(c.query, c.near, 1000, s)
    monkeypatch.setattr(token_search, "_compiled", lambda: None)
    others, other_scores, _ = c.search.search(c.query, c.near, 1000, s)
    monkeypatch.undo()
    assert set(documents.tolist()) == set(others.tolist())
    by_document = dict(zip(others.tolist(), other_scores.tolist(), strict=True))
    assert (
        max((abs(by_document[d] - x) for d, x in zip(documents.tolist(), scores.tolist(), strict=True)), default=0)
        < 1e-5
    )
