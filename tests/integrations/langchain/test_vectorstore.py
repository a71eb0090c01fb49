"""LangChain's standard tests on our vector store and retriever, and filters against a naive implementation."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import words
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests

from pilotfish.integrations.langchain import PilotfishRetriever, PilotfishVectorStore
from pilotfish.integrations.langchain.filters import to_pilotfish_filter
from pilotfish.retrieval import RetrievalError, filter_matching
from pilotfish.retrieval.filters import FilterError

TEXTS = ["Sharks have many teeth.", "Pilot fish travel with sharks.", "Bread is baked in ovens.", "Rays are flat."]


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> VectorStore:
        words.use()
        return PilotfishVectorStore(tmp_path / "index", encoder="words")  # a fast encoder


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, tmp_path: Path) -> None:
        words.use()
        self.folder = tmp_path / "index"
        PilotfishVectorStore.from_texts(TEXTS, folder=self.folder, encoder="words")

    @property
    def retriever_constructor(self) -> type[PilotfishRetriever]:
        return PilotfishRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"folder": self.folder}

    @property
    def retriever_query_example(self) -> str:
        return "which fish follow sharks?"


def test_search_with_filters_and_scores(tmp_path: Path) -> None:
    years = [{"year": 2019 + i, "about": {"lang": "en"}} for i in range(4)]
    store = PilotfishVectorStore.from_texts(TEXTS, metadatas=years, ids=list("abcd"), folder=tmp_path / "index")
    best, score = store.similarity_search_with_score("which fish follow sharks?", k=1)[0]
    assert (best.id, best.metadata["year"], 0 < score < 1) == ("b", 2020, True)
    later = store.similarity_search("sharks", k=4, filter={"year": {"$gte": 2021}, "about.lang": "en"})
    assert {d.id for d in later} == {"c", "d"}
    assert [d.id for d in store.similarity_search("sharks", k=4, filter="year < 2020")] == ["a"]
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"year": {"$ne": 2020}}})
    assert retriever.invoke("which fish follow sharks?")[0].id == "a"
    alone = PilotfishRetriever(folder=tmp_path / "index", k=2, filter="year > 2020", settings={"nprobe": 64})
    assert {d.id for d in asyncio.run(alone.ainvoke("sharks"))} == {"c", "d"}
    store.delete(where={"year": 2020})
    assert {d.id for d in store.get_by_ids(list("abcd"))} == {"a", "c", "d"}
    store.delete()
    assert store.similarity_search("sharks") == []


def test_refuses_invalid_arguments_and_filters(tmp_path: Path) -> None:
    from langchain_core.embeddings import DeterministicFakeEmbedding

    store = PilotfishVectorStore(tmp_path / "index")
    with pytest.raises(RetrievalError, match="the index encodes by itself"):
        PilotfishVectorStore.from_texts(["a"], DeterministicFakeEmbedding(size=3), folder=tmp_path / "other")
    with pytest.raises(RetrievalError, match="2 texts, 1 metadata"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(RetrievalError, match="did you mean 'nprobe'"):
        PilotfishVectorStore(tmp_path / "index", probs=3)
    with pytest.raises(RetrievalError, match="is of kind xtr, not vdr"):
        PilotfishVectorStore(tmp_path / "index", kind="vdr")
    for wrong, message in (
        ({"a": {"$gtt": 1}}, "unknown operator"),
        ({"$nor": []}, "unknown operator"),
        ({"$and": {}}, "takes a list"),
        ({"a": {"$in": 3}}, "expected a list"),
        ({"a": {"$lt": "x"}}, "expected a number or an ISO date"),
        ({"a": {"$lt": [1]}}, "expected text, a number"),
        ({"a": {}}, "compared with nothing"),
        ({"": 1}, "name of a field is empty"),
        (3, "expected text or a mapping"),
    ):
        with pytest.raises(FilterError, match=message):
            store.similarity_search("x", filter=wrong)  # type: ignore[arg-type]


VALUES = st.sampled_from([None, True, 0, 1, 2.5, "a", "2020-01-01", "2021-06-01"])
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["$eq", "$ne"]), VALUES),
    st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(VALUES, max_size=3)),
    st.tuples(st.sampled_from(["$lt", "$lte", "$gt", "$gte"]), st.sampled_from([0, 1, 2.5, "2020-06-01", None])),
)
LEAVES = st.dictionaries(
    st.sampled_from(["a", "b"]), OPERATIONS.map(lambda pair: {pair[0]: pair[1]}), min_size=1, max_size=2
)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda v: {"$not": v}, inner),
        st.builds(lambda k, v: {k: v}, st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


def holds(condition: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Evaluate a condition with MongoDB's semantics, without comparing values of different types."""

    def same(x: Any, y: Any) -> bool:
        return isinstance(x, bool) == isinstance(y, bool) and x == y

    def one(actual: Any, operator: str, value: Any) -> bool:
        match operator:
            case "$eq" | "$ne":
                return same(actual, value) == (operator == "$eq")
            case "$in" | "$nin":
                return any(same(actual, v) for v in value) == (operator == "$in")
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (actual, value))
        if not numbers and not (isinstance(actual, str) and isinstance(value, str)):
            return False
        order = {"$lt": actual < value, "$lte": actual <= value, "$gt": actual > value, "$gte": actual >= value}
        return order[operator]

    parts = []
    for key, value in condition.items():
        if key == "$not":
            parts.append(not holds(value, metadata))
        elif key in ("$and", "$or"):
            parts.append((all if key == "$and" else any)(holds(v, metadata) for v in value))
        else:
            parts += [one(metadata.get(key), operator, v) for operator, v in value.items()]
    return all(parts)


@settings(max_examples=300, deadline=None)
@given(FILTERS, st.dictionaries(st.sampled_from(["a", "b"]), VALUES))
def test_filters_match_mongodb_semantics(condition: dict[str, Any], metadata: dict[str, Any]) -> None:
    translated = to_pilotfish_filter(condition)
    assert translated is not None and not isinstance(translated, str)
    assert filter_matching.matches(translated, metadata) == holds(condition, metadata)


@pytest.fixture
def store(tmp_path: Path) -> PilotfishVectorStore:
    words.use()
    return PilotfishVectorStore(tmp_path / "index", encoder="words", options={"dimension": 0})


def test_index_with_a_record_manager(store: PilotfishVectorStore) -> None:
    """LangChain's ingestion: repeated documents are skipped, changed sources are replaced."""
    from langchain_core.indexing import InMemoryRecordManager, index

    records = InMemoryRecordManager("test")
    records.create_schema()

    def ingest(texts: dict[str, list[str]], cleanup: Any) -> tuple[int, int, int]:
        documents = [Document(page_content=t, metadata={"source": s}) for s, each in texts.items() for t in each]
        result = index(
            documents, records, store, cleanup=cleanup, source_id_key="source", batch_size=2, key_encoder="sha256"
        )
        return result["num_added"], result["num_skipped"], result["num_deleted"]

    assert ingest({"a": ["one", "two"], "b": ["three"]}, "incremental") == (3, 0, 0)
    assert ingest({"a": ["one", "two"], "b": ["three"]}, "incremental") == (0, 3, 0)
    assert ingest({"a": ["one changed"]}, "incremental") == (1, 0, 2)
    assert sorted(d.text for d in store.index.select()) == ["one changed", "three"]
    assert ingest({"c": ["four"]}, "full") == (1, 0, 2)
    assert [d.text for d in store.index.select()] == ["four"]


@pytest.mark.parametrize("kind", ["xtr", "vdr", "bm25", "dense", "hybrid"])
def test_maximal_marginal_relevance_and_thresholds(tmp_path: Path, kind: str) -> None:
    words.use()
    encoder, options = words.KINDS[kind]
    texts = ["red fish swim", "red fish swim fast", "red birds", "bread oven"]
    store = PilotfishVectorStore.from_texts(texts, folder=tmp_path / "i", kind=kind, encoder=encoder, options=options)

    def search(k: int, weight: float) -> list[str]:
        found = store.max_marginal_relevance_search("red fish", k=k, lambda_mult=weight)
        return [d.page_content for d in found]

    assert search(2, 1.0) == texts[:2]
    assert search(2, 0.3)[0] == texts[0] and search(2, 0.3)[1] not in texts[:2]
    assert len(search(9, 0.5)) == len(set(search(9, 0.5)))
    assert asyncio.run(store.amax_marginal_relevance_search("red fish", k=1))[0].page_content == texts[0]
    scored = store.similarity_search_with_relevance_scores("red fish", k=4)
    scores = [score for _, score in scored]
    assert scores == sorted(scores, reverse=True) and all(0 <= s <= 1 for s in scores)
    retriever = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": scores[1], "k": 4}
    )
    assert [d.page_content for d in retriever.invoke("red fish")] == [
        d.page_content for d, s in scored if s >= scores[1]
    ]
    assert store.as_retriever(search_type="mmr", search_kwargs={"k": 1}).invoke("red fish")[0].page_content == texts[0]


async def test_concurrent_additions_are_all_committed(store: PilotfishVectorStore) -> None:
    results = await asyncio.gather(*(store.aadd_texts([f"text {i}"], ids=[str(i)]) for i in range(20)))
    assert sorted(name for names in results for name in names) == sorted(map(str, range(20)))
    assert len(store.get_by_ids(list(map(str, range(20))))) == 20
    documents = [[Document(id=f"d{i}", page_content="more")] for i in range(20)]
    await asyncio.gather(*(store.aadd_documents(each) for each in documents))
    assert len(store.index) == 40
