"""A LlamaIndex retriever over a Pilotfish index."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilters

from ...retrieval.errors import RetrievalError
from ...retrieval.index import Hit, Index
from .filters import to_pilotfish_filter

REST = "_llama_index"  # metadata key for the fields of LlamaIndex's nodes other than text and metadata
KEPT = {
    "relationships",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "metadata_template",
    "metadata_separator",
    "text_template",
    "start_char_idx",
    "end_char_idx",
    "mimetype",
}
USUAL = TextNode().model_dump(mode="json", include=KEPT)  # defaults, which are not stored


class PilotfishRetriever(BaseRetriever):
    """A retriever that searches the index in a folder; the index is created if there is none.

    Args:
        folder: Folder of the index.
        top_k: Largest number of nodes to return.
        filters: LlamaIndex's filters, or a Pilotfish filter such as ``year >= 2020 AND lang in (en, de)``.
        kind: Type of a new index: ``xtr``, ``vdr``, ``hybrid``, ...
        encoder: Encoder of a new index, see `Index.create`.
        options: Options of a new index.
        settings: Search settings that override those of the index.
        kwargs: Arguments of LlamaIndex's ``BaseRetriever``.

    Raises:
        RetrievalError: The index cannot be opened or created, or a setting is invalid.
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
        """Add nodes to the index, and return their ids; existing nodes with the same ids are replaced.

        Raises:
            RetrievalError: A node is invalid, or its metadata contains the reserved key.
        """
        self.index.upsert(map(to_stored_node, nodes))
        return [node.node_id for node in nodes]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete nodes by ids."""
        self.index.delete(ids)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self.index.search(query_bundle.query_str, self.top_k, to_pilotfish_filter(self.filters), **self.settings)
        return [NodeWithScore(node=from_stored_node(h), score=h.score) for h in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def to_stored_node(node: BaseNode) -> dict[str, Any]:
    """Convert a node to a document of the index; relationships and other fields are stored under a reserved key.

    Raises:
        RetrievalError: The node's metadata contains the reserved key.
    """
    if REST in node.metadata:
        raise RetrievalError(f"node {node.node_id!r}: the metadata key {REST} is reserved")
    rest = {k: v for k, v in node.model_dump(mode="json", include=KEPT).items() if v != USUAL.get(k)}
    metadata = node.metadata | ({REST: rest} if rest else {})
    return {"id": node.node_id, "text": node.get_content(MetadataMode.NONE), "metadata": metadata}


def from_stored_node(hit: Hit) -> TextNode:
    """Convert a document of the index to a node; the document need not come from `to_stored_node`."""
    metadata, rest = {k: v for k, v in hit.metadata.items() if k != REST}, hit.metadata.get(REST)
    known = {k: v for k, v in rest.items() if k in KEPT} if isinstance(rest, Mapping) else {}
    return TextNode.model_validate({"id_": hit.id, "text": hit.text, "metadata": metadata, **known})
