"""A Haystack document store over a Pilotfish index."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haystack.core.serialization import default_from_dict, default_to_dict
from haystack.dataclasses import Document
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy

from ...retrieval.filters import EVERYTHING
from ...retrieval.index import Index
from ...retrieval.store.documents import Document as Stored
from .filters import to_pilotfish_filter

REST = "_haystack"  # metadata key for the fields of Haystack's documents other than id, content and meta


class PilotfishDocumentStore:
    """A document store whose index encodes documents itself.

    Args:
        folder: Folder of the index; it is created if there is none.
        kind: Type of a new index: ``xtr``, ``vdr``, ``hybrid``, ...
        encoder: Encoder of a new index, see `Index.create`.
        options: Options of a new index.

    Raises:
        RetrievalError: The index cannot be opened or created.
    """

    def __init__(
        self,
        folder: str,
        kind: str | None = None,
        encoder: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._given = {"folder": str(Path(folder)), "kind": kind, "encoder": encoder, "options": options}
        self.index = Index.open_or_create(folder, kind, encoder, options)

    def to_dict(self) -> dict[str, Any]:
        """Serialize the store, for pipelines."""
        return default_to_dict(self, **self._given)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PilotfishDocumentStore":
        """Restore a store from the output of `to_dict`."""
        return default_from_dict(cls, data)

    def count_documents(self) -> int:
        """Return the number of documents."""
        return len(self.index)

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """Return the documents that match a filter, in the order in which they were written.

        Raises:
            FilterError: The filter is invalid.
        """
        return [from_stored_document(d) for d in self.index.select(to_pilotfish_filter(filters))]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Write documents, and return their number.

        Args:
            documents: Documents to write.
            policy: Policy for ids that exist already: FAIL (the same as NONE), SKIP or OVERWRITE.

        Raises:
            ValueError: An item is not a document, or its metadata contains the reserved key.
            DuplicateDocumentError: An id exists already, and the policy is FAIL; no document was written.
        """
        if not isinstance(documents, list) or not all(isinstance(d, Document) for d in documents):
            raise ValueError("documents: expected a list of Haystack's documents")
        stored = [to_stored_document(d) for d in documents]
        if policy == DuplicatePolicy.OVERWRITE:
            return self.index.upsert(stored)
        known = self.index.has([d.id for d in documents])
        if policy == DuplicatePolicy.SKIP:
            new = {d["id"]: d for d in reversed(stored) if d["id"] not in known}
            return self.index.add(list(reversed(new.values())))
        names = [d.id for d in documents]
        if twice := next((n for n in names if n in known or names.count(n) > 1), None):
            raise DuplicateDocumentError(f"document {twice!r} exists already; choose another policy")
        return self.index.add(stored)

    def delete_documents(self, document_ids: list[str]) -> None:
        """Delete documents by ids; unknown ids are ignored."""
        self.index.delete(document_ids)

    def delete_all_documents(self) -> None:
        """Delete all documents."""
        self.index.delete(where=EVERYTHING)

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Delete the documents that match a filter, and return their number."""
        return self.index.delete(where=to_pilotfish_filter(filters) or EVERYTHING)

    def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """Update the metadata of the documents that match a filter, and return their number."""
        selected = list(self.index.select(to_pilotfish_filter(filters)))
        self.index.upsert({"id": d.id, "text": d.text, "metadata": {**d.metadata, **meta}} for d in selected)
        return len(selected)

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        """Return the number of documents that match a filter."""
        return self.index.count(to_pilotfish_filter(filters))

    async def count_documents_async(self) -> int:
        """Run `count_documents` in a thread."""
        return await asyncio.to_thread(self.count_documents)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """Run `filter_documents` in a thread."""
        return await asyncio.to_thread(self.filter_documents, filters)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """Run `write_documents` in a thread."""
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        """Run `delete_documents` in a thread."""
        await asyncio.to_thread(self.delete_documents, document_ids)

    async def delete_all_documents_async(self) -> None:
        """Run `delete_all_documents` in a thread."""
        await asyncio.to_thread(self.delete_all_documents)

    async def delete_by_filter_async(self, filters: dict[str, Any]) -> int:
        """Run `delete_by_filter` in a thread."""
        return await asyncio.to_thread(self.delete_by_filter, filters)

    async def update_by_filter_async(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """Run `update_by_filter` in a thread."""
        return await asyncio.to_thread(self.update_by_filter, filters, meta)

    async def count_documents_by_filter_async(self, filters: dict[str, Any]) -> int:
        """Run `count_documents_by_filter` in a thread."""
        return await asyncio.to_thread(self.count_documents_by_filter, filters)


def to_stored_document(document: Document) -> dict[str, Any]:
    """Convert a Haystack document to a document of the index; further fields are stored under a reserved key.

    Raises:
        ValueError: The document's metadata contains the reserved key.
    """
    if REST in document.meta:
        raise ValueError(f"document {document.id!r}: the metadata key {REST} is reserved")
    parts = document.to_dict(flatten=False)
    rest = {k: v for k, v in parts.items() if k not in ("id", "content", "meta", "score") and v is not None}
    if document.content is None:
        rest["content"] = None
    metadata = dict(document.meta) | ({REST: rest} if rest else {})
    return {"id": document.id, "text": document.content or "", "metadata": metadata}


def from_stored_document(stored: Stored, score: float | None = None) -> Document:
    """Convert a document of the index to a Haystack document; it need not come from `to_stored_document`."""
    meta: Mapping[str, Any] = {k: v for k, v in stored.metadata.items() if k != REST}
    other_fields = stored.metadata.get(REST)
    rest = dict(other_fields) if isinstance(other_fields, Mapping) else {}
    content = rest.pop("content", stored.text)
    return Document.from_dict({"id": stored.id, "content": content, "meta": meta, "score": score, **rest})
