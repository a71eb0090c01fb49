"""An index as a retriever of LlamaIndex's."""

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

REST = "_llama_index"  # in metadata: what LlamaIndex's nodes have besides text and metadata
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
USUAL = TextNode().model_dump(mode="json", include=KEPT)  # which need not be kept


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
        """Put nodes into the index, in the place of those with the same ids; returns their ids.

        Raises:
            RetrievalError: one cannot be written, or its metadata use the key that is ours.
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
    """A node as the index takes it: metadata at the top, relationships and the like beside them.

    Raises:
        RetrievalError: its metadata use the key that is ours.
    """
    if REST in node.metadata:
        raise RetrievalError(f"node {node.node_id!r}: {REST} is no key for metadata, it holds what LlamaIndex adds")
    rest = {k: v for k, v in node.model_dump(mode="json", include=KEPT).items() if v != USUAL.get(k)}
    metadata = node.metadata | ({REST: rest} if rest else {})
    return {"id": node.node_id, "text": node.get_content(MetadataMode.NONE), "metadata": metadata}


def from_stored_node(hit: Hit) -> TextNode:
    """What `as_stored` made, or a document that came into the index in another way."""
    metadata, rest = {k: v for k, v in hit.metadata.items() if k != REST}, hit.metadata.get(REST)
    known = {k: v for k, v in rest.items() if k in KEPT} if isinstance(rest, Mapping) else {}
    return TextNode.model_validate({"id_": hit.id, "text": hit.text, "metadata": metadata, **known})
