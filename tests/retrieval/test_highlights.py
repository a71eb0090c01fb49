"""Tests of highlights: marked passages of a text, terms shared with a query, and similarity."""

import itertools
from pathlib import Path

import pytest

from pilotfish.retrieval import Index, highlights

TEXT = "Pilot fish travel with sharks. Bread is baked in an oven."


@pytest.fixture(params=[("vdr", {}), ("hybrid", {"members": "vdr+bm25"})], ids=["vdr", "hybrid"])
def sparse_index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    kind, options = request.param
    index = Index.create(tmp_path / "index", kind, options=options)
    index.add([{"id": "a", "text": TEXT}, {"id": "b", "text": "The moon has no air."}])
    return index


def test_shared_terms_are_returned_by_weight(sparse_index: Index) -> None:
    shared = highlights.shared_terms(sparse_index, "which fish travel with sharks", TEXT)
    assert {"fish", "sharks"} <= {word for word, _ in shared}
    assert [weight for _, weight in shared] == sorted((weight for _, weight in shared), reverse=True)
    assert highlights.shared_terms(sparse_index, "which fish travel with sharks", TEXT, most=1) == shared[:1]
    terms = sparse_index.term_weights("which fish travel with sharks", "a")
    assert terms is not None and "sharks" in dict(terms.document), "`explain` of a hybrid index shows terms, too"


def test_words_with_a_common_prefix_are_marked_without_token_vectors(sparse_index: Index) -> None:
    marked = [
        TEXT[m.begin : m.end] for m in highlights.highlight_marks(sparse_index, "a travelling shark of an oven", TEXT)
    ]
    assert marked == ["travel", "sharks", "oven"]
    assert highlights.similarity(sparse_index, "sharks", TEXT) is None


def test_matching_tokens_are_marked_in_order(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index")
    index.add([{"id": "a", "text": TEXT}])
    marks = highlights.highlight_marks(index, "Which fish swim with a shark?", TEXT)
    marked = {TEXT[m.begin : m.end].lower(): m for m in marks}
    assert {"fish", "sharks"} <= marked.keys()
    assert marked["sharks"].query == "shark" and marked["sharks"].weight > 0.5
    assert all(a.end <= b.begin for a, b in itertools.pairwise(marks)), "marks overlap or are out of order"
    near, far = (highlights.similarity(index, q, TEXT) for q in ("Which fish travel with sharks?", "Who won the cup?"))
    assert near is not None and far is not None and near > far + 0.2
    assert highlights.shared_terms(index, "fish", TEXT) == []
    assert highlights.highlight_marks(index, "fish", "") == []
