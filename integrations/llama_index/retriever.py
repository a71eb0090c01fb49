"""An index as a retriever of LlamaIndex's."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilters

from ...retrieval.index import Index
from .filters import translate


class PilotfishRetriever(BaseRetriever):
    """Finds nodes in the index of a folder, which is made where there is none.

    Args:
        folder: Of the index.
        top_k: Nodes at most.
        filters: LlamaIndex's, or ours as ``year >= 2020 AND lang in (en, de)``.
        kind: Of the index, where it is made.
        encoder: See `Index.create`.
        options: Of the kind.
        settings: Of searches, in place of the index's own.

    Raises:
        RetrievalError: the index cannot be opened or made.
    """

    def __init__(
        self,
        folder: str | Path,
        top_k: int = 5,
        filters: MetadataFilters | str | None = None,
        kind: str | None = None,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.index = Index.open_or_create(folder, kind, encoder, options)
        self.top_k, self.filters, self.settings = top_k, filters, dict(settings or {})
        self.index.settings(**self.settings)
        super().__init__(**kwargs)

    def add(self, nodes: Sequence[BaseNode]) -> list[str]:
        """Put nodes into the index, in the place of those with the same ids; returns their ids."""
        self.index.upsert(
            {"id": node.node_id, "text": node.get_content(MetadataMode.NONE), "metadata": node.metadata}
            for node in nodes
        )
        return [node.node_id for node in nodes]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete nodes by ids."""
        self.index.delete(ids)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self.index.search(query_bundle.query_str, self.top_k, translate(self.filters), **self.settings)
        return [
            NodeWithScore(node=TextNode(id_=h.id, text=h.text, metadata=dict(h.metadata)), score=h.score) for h in hits
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
