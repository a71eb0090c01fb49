"""Tests of XTR indexes against a naive one: added and deleted documents, filters and scores."""

import time
from typing import Any

import numpy as np
import pytest
import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.retrieval import Index, RetrievalError, filters, index_writer

VOCABULARY = ["shark", "fish", "pilot", "ray", "whale", "coral", "reef", "tide", "salt", "net"]
TEXT = st.lists(st.sampled_from(VOCABULARY), max_size=6).map(" ".join)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("upsert"),
            st.dictionaries(st.integers(0, 12), st.tuples(TEXT, st.integers(0, 3)), min_size=1, max_size=5),
        ),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 12), max_size=4)),
        st.tuples(st.just("where"), st.integers(0, 3)),
        st.tuples(st.just("compact"), st.none()),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=8,
)
EXACT: dict[str, Any] = {"nprobe": 1 << 20, "impute": "kprime", "kprime": 5}


def naive_xtr(
    documents: dict[str, tuple[str, int]], query: str, least: int | None, kprime: int = 5
) -> dict[str, float]:
    """Return XTR scores over all tokens of the documents that pass the filter; see `plugins/xtr.py`."""
    encoder = words.Words()
    query_vectors = [words.vector(w) for w in encoder.words(query)]
    passing = {name: text for name, (text, year) in documents.items() if least is None or year >= least}
    scores = dict.fromkeys(passing, 0.0)
    counted: set[str] = set()
    for q in query_vectors:
        products = [(float(q @ words.vector(w)), name) for name, text in passing.items() for w in encoder.words(text)]
        products.sort(reverse=True)
        if not products:
            return {}
        missing = products[min(kprime, len(products)) - 1][0]
        best: dict[str, float] = {}
        for product, name in products:
            if product >= missing - 1e-6:
                best[name] = max(best.get(name, -9.0), product)
        counted |= set(best)
        for name in passing:
            scores[name] += best.get(name, missing) / len(query_vectors)
    return {name: scores[name] for name in counted}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, query=TEXT, least=st.one_of(st.none(), st.integers(0, 3)))
def test_scores_match_naive_computation_after_any_changes(
    tmp_path_factory, steps, query: str, least: int | None
) -> None:
    words.use()
    folder = tmp_path_factory.mktemp("index") / "x"
    index = Index.create(folder, encoder="words", options={"codec": "float16", "dimension": 0})
    model: dict[str, tuple[str, int]] = {}
    for step, value in steps:
        if step == "upsert":
            new = {f"d{i}": v for i, v in value.items()}
            index.upsert([{"id": n, "text": t, "metadata": {"year": y}} for n, (t, y) in new.items()])
            model |= new
        elif step == "delete":
            index.delete([f"d{i}" for i in value])
            model = {n: v for n, v in model.items() if n not in {f"d{i}" for i in value}}
        elif step == "where":
            index.delete(where=f"year = {value}")
            model = {n: v for n, v in model.items() if v[1] != value}
        elif step == "compact":
            index.compact()
        else:
            index.close()
            index = Index.open(folder)
    index.check()
    assert len(index) == len(model)
    assert sorted(index.ids()) == sorted(model)
    where = None if least is None else f"year >= {least}"
    expected = naive_xtr(model, query, least)
    hits = index.search(query, 50, where, **EXACT)
    passing = {n for n, v in model.items() if least is None or v[1] >= least}
    assert {h.id for h in hits} <= passing
    if where is not None:  # a filtered search returns all documents that pass
        assert {h.id for h in hits} == passing
    assert set(expected) <= {h.id for h in hits}
    for hit in hits:
        assert hit.text == model[hit.id][0]
        if hit.id in expected:
            assert hit.score == pytest.approx(expected[hit.id], abs=5e-3)
    index.close()


def test_index_trained_on_one_document_is_retrained(create) -> None:
    index = create(codec="sq4", dimension=0)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(VOCABULARY, 5).tolist()) + f" number{i}" for i in range(300)]
    for begin, end in ((0, 1), (1, 5), (5, 40), (40, 300)):
        index.add([{"id": str(i), "text": texts[i]} for i in range(begin, end)])
    assert int(index.snapshot.shared["trained"][0]) > 1
    queries = range(0, 300, 7)
    assert sum(index.search(texts[i], 1)[0].id == str(i) for i in queries) >= 0.9 * len(queries)


@pytest.mark.parametrize("codec", ["sq4", "sq8", "float16", "pq", "rabitq"])
def test_every_codec_finds_rare_words(create, codec: str) -> None:
    index = create(codec=codec, dimension=0)
    index.add([{"id": str(i), "text": f"common words and word{i}"} for i in range(200)])
    assert [index.search(f"word{i}", 1)[0].id for i in (3, 77, 199)] == ["3", "77", "199"]


def test_narrow_filter_returns_k_documents(create) -> None:
    index = create(dimension=0, nlist=64)
    index.add([{"id": str(i), "text": f"word{i} in text", "metadata": {"n": i}} for i in range(1000)])
    hits = index.search("word5", 10, "n >= 990", nprobe=1)
    assert sorted(h.id for h in hits) == [str(i) for i in range(990, 1000)]
    assert index.search("word5", 10, "n > 5000") == []


def test_reranking_uses_all_tokens(create) -> None:
    index = create(dimension=0, vectors=True)
    index.add([{"id": "a", "text": "shark fish"}, {"id": "b", "text": "shark net"}])
    index.add([{"id": "c", "text": "fish net reef"}])
    index.delete(["b"])
    encoder = words.Words()
    for hit in index.search("shark reef", 3, rerank=10):
        text = {"a": "shark fish", "c": "fish net reef"}[hit.id]
        expected = np.mean(
            [
                max(float(words.vector(q) @ words.vector(w)) for w in encoder.words(text))
                for q in encoder.words("shark reef")
            ]
        )
        assert hit.score == pytest.approx(expected, abs=2e-3)
    index.compact()
    assert {h.id for h in index.search("shark reef", 3, rerank=10)} == {"a", "c"}
    plain = create("plain")
    plain.add([{"id": "a", "text": "x"}])
    with pytest.raises(RetrievalError, match="has no vectors"):
        plain.search("x", rerank=5)


def test_token_vectors_match_their_documents_after_merges(create) -> None:
    """Test that compaction restores the order of documents after a rewritten segment follows newer ones."""
    index = create(dimension=0, vectors=True, codec="float16")
    texts = {str(i): f"shark word{i}" for i in range(150)}
    documents = [{"id": i, "text": t} for i, t in texts.items()]
    index.add(documents[:100], learn=False)
    index.add(documents[100:], learn=False)
    index.delete([str(i) for i in range(0, 80, 2)])
    firsts = [int(s.arrays["numbers"][0]) for s in index.snapshot.segments]
    assert firsts != sorted(firsts)
    index.compact()
    for name in ("1", "99", "149"):
        hit = index.search(texts[name], 1, rerank=20)[0]
        assert (hit.id, hit.score) == (name, pytest.approx(1.0, abs=5e-3))


def test_filters_distinguish_numbers_and_booleans(create) -> None:
    index = create()
    index.add([{"id": "one", "text": "x", "metadata": {"f": 1}}, {"id": "yes", "text": "x", "metadata": {"f": True}}])
    assert [h.id for h in index.search("x", where="f = 1")] == ["one"]
    assert [h.id for h in index.search("x", where="f = true")] == ["yes"]
    assert index.delete(where="f = true") == 1
    assert list(index.ids()) == ["one"]


def test_explanation_sums_to_the_score(create) -> None:
    index = create(dimension=0)
    index.add([{"id": str(i), "text": f"shark word{i} reef"} for i in range(30)])
    hit = index.search("word7 shark", 1)[0]
    reasons = index.explain("word7 shark", hit.id)
    assert sum(r.score for r in reasons) == pytest.approx(hit.score, abs=1e-5)
    matched = {r.query: r.document for r in reasons if not r.imputed}
    assert matched["word7"] == "word7"


def test_segments_are_merged_and_deleted_documents_removed(create, monkeypatch: pytest.MonkeyPatch) -> None:
    index = create(dimension=0)
    index.add([{"id": f"first{i}", "text": f"first{i}"} for i in range(200)])
    index.delete([f"first{i}" for i in range(200)])
    for i in range(12):
        index.add([{"id": str(i), "text": f"word{i}"}])
    assert index.stats()["segments"] <= index_writer.MAX_SMALL_SEGMENTS + 1
    index.delete([str(i) for i in range(8)])
    assert index.stats()["deleted"] == 0  # a segment with too many deleted documents was rewritten
    before = index.snapshot.manifest.next_document
    index.compact(retrain=True)
    assert index.stats()["segments"] == 1
    assert index.snapshot.manifest.next_document == before  # document numbers are never reused
    assert sorted(h.id for h in index.search("word9", 20)) == ["10", "11", "8", "9"]


def test_refuses_wrong_documents_and_adds_nothing(create) -> None:
    index = create()
    index.add([{"id": "a", "text": "x"}])
    for documents, message in (
        ([{"id": "b", "text": "x"}, {"id": "a", "text": "y"}], "'a' is in the index already"),
        ([{"id": "b", "text": "x"}, {"id": "b", "text": "y"}], "'b' comes twice"),
        ([{"id": "b"}], "'b': its text is missing"),
        ([{"text": "x"}], "id is a text that is not empty"),
        ([{"id": "b", "text": "x", "metadata": {"x": float("nan")}}], "JSON can hold"),
        ([{"id": "b", "text": "x", "metadata": [1]}], "JSON can hold"),
        ([{"id": "b", "text": "\ud800"}], "JSON can hold"),
        ([{"id": "b", "text": "x", "titel": "y"}], "unknown key 'titel'"),
        (["b"], "not str"),
    ):
        with pytest.raises(RetrievalError, match=message):
            index.add(documents)
        assert list(index.ids()) == ["a"]


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


def test_snippet_of_a_long_text_is_found_quickly() -> None:
    from pilotfish.retrieval import snippets

    text = "fish shark " * 50_000 + "a whale at last " + "fish shark " * 50_000
    started = time.perf_counter()
    assert "whale" in snippets.best_snippet(text, "which shark and fish and whale")
    assert time.perf_counter() - started < 60  # minutes, if the time were quadratic


def test_refuses_wrong_requests(create, tmp_path) -> None:
    index = create()
    index.add([{"id": "a", "text": "x"}])
    for call, message in (
        (lambda: index.search("x", 0), "k: expected a whole number of 1 or more"),
        (lambda: index.search("x", "3"), "k: expected a whole number"),
        (lambda: index.search(5), "query: expected text"),
        (lambda: index.search("x", where=5), "filter: expected text or a filter"),
        (lambda: index.search_many("x"), "queries: expected a list"),
        (lambda: index.delete("a"), "ids: expected a list"),
        (lambda: index.has("a"), "ids: expected a list"),
        (lambda: index.add([{"id": "b", "text": "x", "metadata": {"deep": nested(70)}}]), "64 levels deep"),
        (lambda: index.add([{"id": "b", "text": "x", "metadata": {"fine": 1, "wrong": float("nan")}}]), "'wrong' has"),
        (lambda: index.search("x", nprobs=3), "did you mean 'nprobe'"),
        (lambda: index.search("x", impute="warm"), "expected warp, kprime, none"),
        (lambda: index.search("x", where="a >"), "expected a value"),
        (lambda: index.search("\ud800"), "query: not text"),
        (lambda: index.explain("x", "zz"), "no document 'zz'"),
        (lambda: index.configure(nprobe=0), "expected 1 to"),
        (lambda: Index.create(tmp_path / "index"), "holds an index already"),
        (lambda: Index.create(tmp_path / "index" / "inner"), "lies in another index"),
        (lambda: Index.create(tmp_path), "not empty"),
        (lambda: Index.create(tmp_path / "y", "xtra"), "did you mean 'xtr'"),
        (lambda: Index.create(tmp_path / "y", options={"codec": "sq5"}), "expected sq4"),
        (lambda: Index.create(tmp_path / "y", encoder=str(tmp_path / "none")), "no such folder"),
        (lambda: Index.open(tmp_path / "nothing"), "there is no index"),
    ):
        with pytest.raises(RetrievalError, match=message):
            call()
    assert not (tmp_path / "y").exists()


def test_settings_persist_and_filter_cache_is_invalidated(create, tmp_path) -> None:
    index = create()
    index.add([{"id": "a", "text": "x", "metadata": {"n": 1}}])
    index.configure(nprobe=3)
    assert Index.open(tmp_path / "index").stats()["settings"]["nprobe"] == 3
    condition = filters.Compare(("n",), "=", (1,))
    assert [h.id for h in index.search("x", where=condition)] == ["a"]
    index.upsert([{"id": "a", "text": "x", "metadata": {"n": 2}}])
    assert index.search("x", where=condition) == []  # filter results are not cached across commits


def test_empty_index_returns_no_hits(create) -> None:
    index = create()
    assert index.search("x") == []
    index.add([])
    assert len(index) == 0
    index.check()
    index.compact()
    index.add([{"id": "a", "text": ""}])
    assert [h.id for h in index.search("")] == ["a"]
    index.delete(["a"])
    assert index.search("x") == []


def test_refuses_another_encoder(create, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    create()
    monkeypatch.setattr(words.Words, "fingerprint", "words-2")
    with pytest.raises(RetrievalError, match="made with another encoder than words"):
        Index.open(tmp_path / "index").search("x")
