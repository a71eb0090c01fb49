"""What of a text met a query: places, words, nearness."""

import itertools
from pathlib import Path

import pytest

from pilotfish.retrieval import Index, highlights

TEXT = "Pilot fish travel with sharks. Bread is baked in an oven."


@pytest.fixture(params=[("vdr", {}), ("hybrid", {"members": "vdr+bm25"})], ids=["vdr", "hybrid"])
def words_index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    kind, options = request.param
    index = Index.create(tmp_path / "index", kind, options=options)
    index.add([{"id": "a", "text": TEXT}, {"id": "b", "text": "The moon has no air."}])
    return index


def test_words_of_both_are_told(words_index: Index) -> None:
    both = highlights.shared_terms(words_index, "which fish travel with sharks", TEXT)
    assert {"fish", "sharks"} <= {word for word, _ in both}
    assert [weight for _, weight in both] == sorted((weight for _, weight in both), reverse=True)
    assert highlights.shared_terms(words_index, "which fish travel with sharks", TEXT, most=1) == both[:1]
    reading = words_index.term_weights("which fish travel with sharks", "a")
    assert reading is not None and "sharks" in dict(reading.document), "`explain` of a hybrid shows words, too"


def test_without_tokens_words_that_begin_alike_are_marked(words_index: Index) -> None:
    marked = [
        TEXT[m.begin : m.end] for m in highlights.highlight_marks(words_index, "a travelling shark of an oven", TEXT)
    ]
    assert marked == ["travel", "sharks", "oven"]
    assert highlights.similarity(words_index, "sharks", TEXT) is None


def test_tokens_are_marked_where_they_stand(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index")
    index.add([{"id": "a", "text": TEXT}])
    marks = highlights.highlight_marks(index, "Which fish swim with a shark?", TEXT)
    marked = {TEXT[m.begin : m.end].lower(): m for m in marks}
    assert {"fish", "sharks"} <= marked.keys()
    assert marked["sharks"].query == "shark" and marked["sharks"].weight > 0.5
    assert all(a.end <= b.begin for a, b in itertools.pairwise(marks)), "in their order, none twice"
    near, far = (highlights.similarity(index, q, TEXT) for q in ("Which fish travel with sharks?", "Who won the cup?"))
    assert near is not None and far is not None and near > far + 0.2
    assert highlights.shared_terms(index, "fish", TEXT) == []
    assert highlights.highlight_marks(index, "fish", "") == []
