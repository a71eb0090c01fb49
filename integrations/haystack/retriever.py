"""The component of a Haystack pipeline that finds documents in an index."""

import asyncio
from typing import Any

from haystack.core.component import component
from haystack.core.serialization import default_from_dict, default_to_dict
from haystack.dataclasses import Document

from .document_store import PilotfishDocumentStore, from_stored_document
from .filters import to_pilotfish_filter


@component
class PilotfishRetriever:
    """Finds documents.

    Args:
        document_store: Where.
        filters: Haystack's; those of a question take their place.
        top_k: Documents at most.
        settings: Of searches, in place of the index's own.
    """

    def __init__(
        self,
        document_store: PilotfishDocumentStore,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.document_store, self.filters, self.top_k, self.settings = document_store, filters, top_k, settings or {}
        document_store.index.settings(**self.settings)

    def to_dict(self) -> dict[str, Any]:
        """As pipelines are written down."""
        store = self.document_store.to_dict()
        return default_to_dict(
            self, document_store=store, filters=self.filters, top_k=self.top_k, settings=self.settings
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PilotfishRetriever":
        """What `to_dict` wrote."""
        given = dict(data["init_parameters"])
        given["document_store"] = PilotfishDocumentStore.from_dict(given["document_store"])
        return default_from_dict(cls, {**data, "init_parameters": given})

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """The best documents for a query, with scores.

        Raises:
            FilterError: the filter is none.
        """
        index, where = self.document_store.index, to_pilotfish_filter(filters or self.filters)
        hits = index.search(query, top_k or self.top_k, where, **self.settings)
        return {"documents": [from_stored_document(hit, hit.score) for hit in hits]}  # type: ignore[arg-type] -- has all of it

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """See `run`."""
        return await asyncio.to_thread(self.run, query, filters, top_k)
