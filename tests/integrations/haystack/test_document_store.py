"""Haystack's standard tests on our document store, and the retriever in a pipeline."""

import asyncio
from pathlib import Path

import pytest
import words
from haystack import Document, Pipeline
from haystack.dataclasses import ByteStream
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.errors import FilterError
from haystack.testing.document_store import (
    CountDocumentsByFilterTest,
    DocumentStoreBaseExtendedTests,
    FilterableDocsFixtureMixin,
)
from haystack.testing.document_store_async import (
    CountDocumentsAsyncTest,
    CountDocumentsByFilterAsyncTest,
    DeleteAllAsyncTest,
    DeleteByFilterAsyncTest,
    DeleteDocumentsAsyncTest,
    FilterDocumentsAsyncTest,
    UpdateByFilterAsyncTest,
    WriteDocumentsAsyncTest,
)

from pilotfish.integrations.haystack import PilotfishDocumentStore, PilotfishRetriever


class PilotfishStoreMixin:
    @pytest.fixture
    def document_store(self, tmp_path: Path) -> PilotfishDocumentStore:
        return PilotfishDocumentStore(str(tmp_path / "index"), kind="bm25")  # fast to encode


class TestDocumentStore(PilotfishStoreMixin, DocumentStoreBaseExtendedTests, CountDocumentsByFilterTest):
    def test_write_documents(self, document_store: PilotfishDocumentStore) -> None:
        """Test that existing ids are rejected without a policy; Haystack leaves the default policy to each store."""
        document = Document(content="test doc")
        assert document_store.write_documents([document]) == 1
        assert document_store.filter_documents() == [document]
        with pytest.raises(DuplicateDocumentError):
            document_store.write_documents([document])


class TestAsyncDocumentStore(
    PilotfishStoreMixin,
    CountDocumentsAsyncTest,
    CountDocumentsByFilterAsyncTest,
    DeleteAllAsyncTest,
    DeleteByFilterAsyncTest,
    DeleteDocumentsAsyncTest,
    FilterDocumentsAsyncTest,
    UpdateByFilterAsyncTest,
    WriteDocumentsAsyncTest,
    FilterableDocsFixtureMixin,
):
    @pytest.mark.asyncio
    async def test_write_documents_async(self, document_store: PilotfishDocumentStore) -> None:
        assert await document_store.write_documents_async([Document(content="test doc")]) == 1


def test_pipeline_retrieves_and_can_be_serialized(tmp_path: Path) -> None:
    store = PilotfishDocumentStore(str(tmp_path / "index"))
    store.write_documents(
        [
            Document(id="a", content="Pilot fish travel with sharks.", meta={"year": 2020}),
            Document(id="b", content="Sharks have many teeth.", meta={"year": 2021, "deep": {"lang": "en"}}),
            Document(id="c", content=None, blob=ByteStream(b"\x00\xff", mime_type="image/png"), embedding=[0.1, 1e-9]),
        ]
    )
    pipeline = Pipeline()
    pipeline.add_component("finds", PilotfishRetriever(store, top_k=2, settings={"nprobe": 64}))
    question = {"query": "which fish follow sharks?"}
    results = pipeline.run({"finds": question})["finds"]["documents"]
    assert results[0].id == "a"
    assert 0 < results[0].score < 1
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["pilotfish.integrations.haystack.*"])
    language_filter = {"field": "meta.deep.lang", "operator": "==", "value": "en"}
    assert [d.id for d in again.run({"finds": {**question, "filters": language_filter}})["finds"]["documents"]] == ["b"]
    (blob,) = store.filter_documents({"field": "meta.year", "operator": "==", "value": None})
    assert blob == Document(
        id="c", content=None, blob=ByteStream(b"\x00\xff", mime_type="image/png"), embedding=[0.1, 1e-9]
    )
    (one,) = asyncio.run(PilotfishRetriever(store, top_k=1).run_async("teeth"))["documents"]
    assert one.id == "b"
    for wrong in (
        {"field": "content", "operator": "==", "value": "x"},
        {"operator": "XOR", "conditions": []},
        {"operator": "AND", "conditions": None},
    ):
        with pytest.raises(FilterError):
            store.filter_documents(wrong)


def test_reads_documents_indexed_without_haystack(tmp_path: Path) -> None:
    """Test that an index that was built without Haystack can be read."""
    from pilotfish.retrieval import Index

    with Index.create(tmp_path / "index", "bm25") as index:
        index.add([{"id": "a", "text": "sharks", "metadata": {"year": 2020}}])
    store = PilotfishDocumentStore(str(tmp_path / "index"))
    (document,) = store.filter_documents()
    assert document == Document(id="a", content="sharks", meta={"year": 2020})
    with pytest.raises(ValueError, match="key _haystack is reserved"):
        store.write_documents([Document(content="x", meta={"_haystack": "mine"})])
    store.index.upsert([{"id": "a", "text": "sharks", "metadata": {"_haystack": "mine", "year": 1}}])
    assert store.filter_documents()[0].meta == {"year": 1}


async def test_concurrent_async_writes_are_all_committed(tmp_path: Path) -> None:
    words.use()
    store = PilotfishDocumentStore(str(tmp_path / "concurrent"), encoder="words")
    batches = [[Document(id=f"{i}-{j}", content=f"text {i}") for j in range(3)] for i in range(20)]
    assert await asyncio.gather(*map(store.write_documents_async, batches)) == [3] * 20
    assert store.count_documents() == 60
