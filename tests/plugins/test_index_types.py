"""Tests of the index types other than XTR against naive formulas after any changes, and of hybrid fusion."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index, RetrievalError
from pilotfish.retrieval.encoders import stems

VOCABULARY = ["shark", "fish", "pilot", "ray", "whale", "coral", "reef", "sharks", "the", "net"]
TEXT = st.lists(st.sampled_from(VOCABULARY), max_size=6).map(" ".join)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("upsert"), st.dictionaries(st.integers(0, 12), TEXT, min_size=1, max_size=5)),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 12), max_size=4)),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=6,
)


def naive_vdr(documents: dict[str, str], query: str) -> dict[str, float]:
    query_weights = words.weights(query)
    scores = {n: sum(w * query_weights.get(i, 0.0) for i, w in words.weights(t).items()) for n, t in documents.items()}
    return {n: s for n, s in scores.items() if s > 0}


def naive_dense(documents: dict[str, str], query: str) -> dict[str, float]:
    def pooled(text: str) -> np.ndarray:
        total = np.sum([words.vector(w) for w in words.Words().words(text)], axis=0)
        return total / np.linalg.norm(total)

    return {n: float(pooled(t) @ pooled(query)) for n, t in documents.items()}


def naive_bm25(documents: dict[str, str], query: str, k1: float = 0.9, b: float = 0.4) -> dict[str, float]:
    encoder = stems.load_stem_encoder("english")
    counts = {n: Counter(encoder.stems(t)) for n, t in documents.items()}
    mean = max(sum(c.total() for c in counts.values()) / max(len(counts), 1), 1)
    scores: dict[str, float] = {}
    for word in encoder.stems(query):
        df = sum(word in c for c in counts.values())
        idf = math.log1p((len(counts) - df + 0.5) / (df + 0.5))
        for n, c in counts.items():
            if tf := c[word]:
                part = tf / (tf + k1 * (1 - b + b * c.total() / mean))
                scores[n] = scores.get(n, 0.0) + idf * part
    return scores


NAIVE: dict[str, Any] = {"vdr": naive_vdr, "dense": naive_dense, "bm25": naive_bm25}


@pytest.mark.parametrize("kind", [*NAIVE, "hybrid"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, query=TEXT, least=st.one_of(st.none(), st.integers(0, 12)))
def test_scores_match_naive_computation_after_any_changes(
    tmp_path_factory, kind: str, steps, query: str, least: int | None
) -> None:
    words.use()
    folder = tmp_path_factory.mktemp("index") / "x"
    index = Index.create(folder, kind, *words.KINDS[kind])
    model: dict[str, str] = {}
    for step, value in steps:
        if step == "upsert":
            index.upsert([{"id": f"d{i}", "text": t, "metadata": {"n": i}} for i, t in value.items()])
            model |= {f"d{i}": t for i, t in value.items()}
        elif step == "delete":
            index.delete([f"d{i}" for i in value])
            model = {n: t for n, t in model.items() if n not in {f"d{i}" for i in value}}
        else:
            index.close()
            index = Index.open(folder)
    index.check()
    where = None if least is None else f"n >= {least}"
    passing = {n for n in model if least is None or int(n[1:]) >= least}
    hits = index.search(query, 50, where)
    assert {h.id for h in hits} <= passing
    assert all(h.text == model[h.id] for h in hits)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    if kind in NAIVE:
        index.compact(retrain=True)
        expected = {n: s for n, s in NAIVE[kind](model, query).items() if n in passing}
        actual = {h.id: h.score for h in index.search(query, 50, where)}
        assert set(actual) == set(expected)
        for name, score in actual.items():
            assert score == pytest.approx(expected[name], abs=0.03)
    else:
        assert {h.id for h in hits} == passing  # the dense member finds all documents
    index.close()


@pytest.fixture
def hybrid(create) -> Index:
    index = create(kind="hybrid")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(VOCABULARY, 5).tolist()) + f" word{i}" for i in range(60)]
    index.add([{"id": str(i), "text": t} for i, t in enumerate(texts)])
    index.delete(["7"])
    return index


@pytest.mark.parametrize("fusion", ["rrf", "score"])
@pytest.mark.parametrize("weights", [{}, {"xtr": 2.0, "bm25": 0.5}, {"dense": 0.0}])
def test_fusion_matches_naive_fusion_of_member_results(hybrid: Index, fusion: str, weights: dict[str, float]) -> None:
    """Test fusion against searches in which all members but one have weight 0."""
    members, query, constant, depth = ("xtr", "vdr", "bm25", "dense"), "shark reef word9", 7, 20
    expected: dict[str, float] = {}
    for member in members:
        if (weight := weights.get(member, 1.0)) == 0:
            continue
        alone = {m: float(m == member) for m in members}
        hits = hybrid.search(query, depth, fusion=fusion, constant=constant, depth=depth, weights=alone)
        for hit in hits:
            expected[hit.id] = expected.get(hit.id, 0.0) + weight * hit.score
        if fusion == "rrf":
            assert [h.score for h in hits] == pytest.approx([1 / (constant + 1 + i) for i in range(len(hits))])
        else:
            assert (hits[0].score, hits[-1].score) == pytest.approx((1.0, 0.0))
    fused = hybrid.search(query, depth, fusion=fusion, constant=constant, depth=depth, weights=weights)
    best = sorted(expected.values(), reverse=True)[:depth]
    assert [h.score for h in fused] == pytest.approx(best, abs=1e-5)
    assert all(h.score == pytest.approx(expected[h.id], abs=1e-5) for h in fused)


def test_hybrid_explanation_sums_to_the_score(hybrid: Index) -> None:
    hit = hybrid.search("shark word9", 1)[0]
    reasons = hybrid.explain("shark word9", hit.id)
    assert [r.query for r in reasons] == ["xtr", "vdr", "bm25", "dense"]
    assert sum(r.score for r in reasons) == pytest.approx(hit.score, abs=1e-5)


def test_bm25_explanation_sums_to_the_score(create) -> None:
    index = create(kind="bm25")
    index.add([{"id": str(i), "text": f"shark word{i} reef"} for i in range(30)])
    hit = index.search("word7 shark", 1)[0]
    reasons = index.explain("word7 shark", hit.id)
    assert sum(r.score for r in reasons) == pytest.approx(hit.score, abs=1e-5)
    assert reasons[0].query == "word7"
    assert hit.id == "7"


def test_refuses_invalid_hybrid_settings(hybrid: Index, tmp_path) -> None:
    for call, message in (
        (lambda: hybrid.search("x", fusion="sum"), "expected one of 'rrf', 'score'"),
        (lambda: hybrid.search("x", weights={"xtra": 1}), "'xtra' is none of xtr, vdr, bm25, dense"),
        (lambda: hybrid.search("x", weights={"xtr": -1}), "expected 0 to 1e"),
        (lambda: hybrid.search("x", weights={"xtr": 10**400}), "weights.xtr: expected float"),
        (lambda: hybrid.search("x", weights=dict.fromkeys(("xtr", "vdr", "bm25", "dense"), 0)), "leave out every"),
        (lambda: hybrid.search("x", settings={"xtr": {"nprobs": 1}}), "did you mean 'nprobe'"),
        (lambda: hybrid.search("x", settings={"xtr": 3}), "expected object of"),
        (lambda: hybrid.search("x", settings={"vdr": {"rerank": 5}}), "not for members"),
        (lambda: Index.create(tmp_path / "y", "hybrid", options={"members": "xtr"}), "two or more"),
        (lambda: Index.create(tmp_path / "y", "hybrid", options={"members": "xtr+vrd"}), "did you mean 'vdr'"),
        (lambda: Index.create(tmp_path / "y", "hybrid", options={"options": {"x": {}}}), "'x' is none of the member"),
        (lambda: Index.create(tmp_path / "y", "hybrid", options={"options": {"xtr": {"codec": "x"}}}), "expected sq4"),
        (lambda: Index.create(tmp_path / "y", "hybrid", "minilm"), "expected MEMBER=ENCODER"),
        (lambda: Index.create(tmp_path / "y", "bm25", "minilm"), "supports the encoder stems only"),
        (lambda: Index.create(tmp_path / "y", "bm25", options={"language": "klingon"}), "expected none, arabic"),
    ):
        with pytest.raises(RetrievalError, match=message):
            call()
    assert not (tmp_path / "y").exists()


def test_impacts_are_retrained_while_documents_are_few(create) -> None:
    """Test with an empty first document, from which the scale of impacts cannot be derived."""
    index = create(kind="vdr", bits=16)
    index.add([{"id": "none", "text": ""}])
    index.add([{"id": "a", "text": "shark fish"}, {"id": "b", "text": "shark"}])
    expected = naive_vdr({"a": "shark fish", "b": "shark"}, "shark fish")
    actual = {h.id: h.score for h in index.search("shark fish")}
    assert {n: actual[n] for n in expected} == pytest.approx(expected, abs=1e-3)


def test_encoder_paths_do_not_depend_on_working_directory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    words.use()
    tiny.masked_lm(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    with Index.create("both", "hybrid", "vdr=lm", {"members": "vdr+bm25"}) as index:
        index.add([{"id": "a", "text": "shark w1"}])
    monkeypatch.chdir(tmp_path.parent)
    with Index.open(tmp_path / "both") as index:
        assert index.search("shark")[0].id == "a"


@pytest.mark.parametrize("fusion", ["rrf", "score"])
def test_only_hit_of_a_member_gets_full_score(tmp_path, fusion: str) -> None:
    words.use()
    index = Index.create(tmp_path / "x", "hybrid", "vdr=word-weights", {"members": "bm25+vdr"})
    index.add([{"id": str(i), "text": f"shark code{i}"} for i in range(20)])
    alone = index.search("code7", 1, fusion=fusion, constant=1, weights={"vdr": 0})
    assert [(h.id, h.score) for h in alone] == [("7", 1.0 if fusion == "score" else 0.5)]


def test_third_party_encoder_without_term_names(create) -> None:
    index = create(kind="vdr")
    index.add([{"id": "a", "text": "shark fish"}])
    assert index.term_weights("shark", "a") is None
    for call in (
        lambda: index.explain("shark", "a"),
        lambda: index.search("shark", term_boosts={"shark": 2}),
        lambda: index.search("shark", rerank=3),
    ):
        with pytest.raises(RetrievalError, match="encoder word-weights: lacks the method `"):
            call()
