"""An index as a document store of Haystack's."""

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

REST = "_haystack"  # in metadata: what Haystack's documents have besides text and meta


class PilotfishDocumentStore:
    """Haystack's documents in an index of ours, which encodes them by itself.

    Args:
        folder: Of the index; it is made where there is none.
        kind: Of the index, where it is made: ``xtr``, ``vdr``, ``hybrid``, ...
        encoder: See `Index.create`.
        options: Of the kind.

    Raises:
        RetrievalError: it cannot be opened or made.
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
        """As pipelines are written down."""
        return default_to_dict(self, **self._given)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PilotfishDocumentStore":
        """What `to_dict` wrote."""
        return default_from_dict(cls, data)

    def count_documents(self) -> int:
        """How many there are."""
        return len(self.index)

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """Those that pass a filter, in the order they were written.

        Raises:
            FilterError: it is none.
        """
        return [from_stored_document(d) for d in self.index.select(to_pilotfish_filter(filters))]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Write documents; returns how many.

        Args:
            documents: Which.
            policy: For ids that are there: FAIL (and NONE), SKIP or OVERWRITE.

        Raises:
            ValueError: they are no documents.
            DuplicateDocumentError: an id is there; nothing was written.
        """
        if not isinstance(documents, list) or not all(isinstance(d, Document) for d in documents):
            raise ValueError("documents: expected a list of Haystack's documents")
        given = [to_stored_document(d) for d in documents]
        if policy == DuplicatePolicy.OVERWRITE:
            return self.index.upsert(given)
        known = self.index.has([d.id for d in documents])
        if policy == DuplicatePolicy.SKIP:
            new = {d["id"]: d for d in reversed(given) if d["id"] not in known}
            return self.index.add(list(reversed(new.values())))
        names = [d.id for d in documents]
        if twice := next((n for n in names if n in known or names.count(n) > 1), None):
            raise DuplicateDocumentError(f"document {twice!r} is there already; choose a policy")
        return self.index.add(given)

    def delete_documents(self, document_ids: list[str]) -> None:
        """Delete by ids; unknown ones are passed over."""
        self.index.delete(document_ids)

    def delete_all_documents(self) -> None:
        """Delete everything."""
        self.index.delete(where=EVERYTHING)

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Delete those that pass a filter; returns how many."""
        return self.index.delete(where=to_pilotfish_filter(filters) or EVERYTHING)

    def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """Change metadata of those that pass a filter; returns how many."""
        found = list(self.index.select(to_pilotfish_filter(filters)))
        self.index.upsert({"id": d.id, "text": d.text, "metadata": {**d.metadata, **meta}} for d in found)
        return len(found)

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        """How many pass a filter."""
        return self.index.count(to_pilotfish_filter(filters))

    async def count_documents_async(self) -> int:
        """See `count_documents`."""
        return await asyncio.to_thread(self.count_documents)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """See `filter_documents`."""
        return await asyncio.to_thread(self.filter_documents, filters)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """See `write_documents`."""
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        """See `delete_documents`."""
        await asyncio.to_thread(self.delete_documents, document_ids)

    async def delete_all_documents_async(self) -> None:
        """See `delete_all_documents`."""
        await asyncio.to_thread(self.delete_all_documents)

    async def delete_by_filter_async(self, filters: dict[str, Any]) -> int:
        """See `delete_by_filter`."""
        return await asyncio.to_thread(self.delete_by_filter, filters)

    async def update_by_filter_async(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """See `update_by_filter`."""
        return await asyncio.to_thread(self.update_by_filter, filters, meta)

    async def count_documents_by_filter_async(self, filters: dict[str, Any]) -> int:
        """See `count_documents_by_filter`."""
        return await asyncio.to_thread(self.count_documents_by_filter, filters)


def to_stored_document(document: Document) -> dict[str, Any]:
    """A document as the index takes it: metadata at the top, all that we know nothing of beside them.

    Raises:
        ValueError: its metadata use the key that is ours.
    """
    if REST in document.meta:
        raise ValueError(f"document {document.id!r}: {REST} is no key for metadata, it holds what Haystack adds")
    parts = document.to_dict(flatten=False)
    rest = {k: v for k, v in parts.items() if k not in ("id", "content", "meta", "score") and v is not None}
    if document.content is None:
        rest["content"] = None
    metadata = dict(document.meta) | ({REST: rest} if rest else {})
    return {"id": document.id, "text": document.content or "", "metadata": metadata}


def from_stored_document(stored: Stored, score: float | None = None) -> Document:
    """What `as_stored` made, or a document that came into the index in another way."""
    meta: Mapping[str, Any] = {k: v for k, v in stored.metadata.items() if k != REST}
    given = stored.metadata.get(REST)
    rest = dict(given) if isinstance(given, Mapping) else {}
    content = rest.pop("content", stored.text)
    return Document.from_dict({"id": stored.id, "content": content, "meta": meta, "score": score, **rest})
