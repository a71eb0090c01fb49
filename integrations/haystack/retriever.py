"""A Haystack component that searches a Pilotfish index."""

import asyncio
from typing import Any

from haystack.core.component import component
from haystack.core.serialization import default_from_dict, default_to_dict
from haystack.dataclasses import Document

from .document_store import PilotfishDocumentStore, from_stored_document
from .filters import to_pilotfish_filter


@component
class PilotfishRetriever:
    """A component that retrieves documents.

    Args:
        document_store: Store of the documents.
        filters: Haystack's filters; can be overridden in each call of `run`.
        top_k: Largest number of documents to return.
        settings: Search settings that override those of the index.
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
        """Serialize the component, for pipelines."""
        store = self.document_store.to_dict()
        return default_to_dict(
            self, document_store=store, filters=self.filters, top_k=self.top_k, settings=self.settings
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PilotfishRetriever":
        """Restore a component from the output of `to_dict`."""
        parameters = dict(data["init_parameters"])
        parameters["document_store"] = PilotfishDocumentStore.from_dict(parameters["document_store"])
        return default_from_dict(cls, {**data, "init_parameters": parameters})

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Return the best documents for a query, with their scores.

        Args:
            query: Text of the query.
            filters: Haystack's filters; those of the component if not given.
            top_k: Largest number of documents; that of the component if not given.

        Raises:
            FilterError: The filter is invalid.
        """
        index, where = self.document_store.index, to_pilotfish_filter(filters or self.filters)
        hits = index.search(query, top_k or self.top_k, where, **self.settings)
        return {"documents": [from_stored_document(hit, hit.score) for hit in hits]}  # type: ignore[arg-type] -- has the same fields

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Run `run` in a thread."""
        return await asyncio.to_thread(self.run, query, filters, top_k)
