"""A LlamaIndex retriever over a Pilotfish index."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.vector_stores.types import MetadataFilters

from ...retrieval.errors import RetrievalError
from ...retrieval.index import Hit, Index
from .filters import to_pilotfish_filter

REST = "_llama_index"  # metadata key for the fields of LlamaIndex's nodes other than text and metadata
OWN = {"id_", "text", "metadata", "embedding"}  # fields that are stored as parts of a document, or not at all
TYPES = {c.class_name(): c for c in (TextNode, ImageNode, IndexNode, Node, Document, ImageDocument)}


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
    """Convert a node to a document of the index; its type and other fields are stored under a reserved key.

    Raises:
        RetrievalError: The node's metadata contains the reserved key, or its type is not one of LlamaIndex's.
    """
    if REST in node.metadata:
        raise RetrievalError(f"node {node.node_id!r}: the metadata key {REST} is reserved")
    kind = TYPES.get(node.class_name())
    if kind is None:
        raise RetrievalError(f"node {node.node_id!r}: is a {node.class_name()}; known are {', '.join(TYPES)}")
    defaults = _fields(kind.model_construct())  # are not stored
    rest = {k: v for k, v in _fields(node).items() if v != defaults.get(k)}
    if kind is not TextNode:
        rest["class_name"] = node.class_name()
    metadata = {**node.metadata, **({REST: rest} if rest else {})}
    return {"id": node.node_id, "text": node.get_content(MetadataMode.NONE), "metadata": metadata}


def from_stored_node(hit: Hit) -> BaseNode:
    """Convert a document of the index to a node of the original type; it need not come from `to_stored_node`."""
    metadata, rest = {k: v for k, v in hit.metadata.items() if k != REST}, hit.metadata.get(REST)
    known = dict(rest) if isinstance(rest, Mapping) else {}
    kind = TYPES.get(known.pop("class_name", ""), TextNode)
    known = {k: v for k, v in known.items() if k in kind.model_fields and k not in OWN}
    if issubclass(kind, TextNode):
        known["text"] = hit.text
    elif hit.text or known.get("text_resource"):
        known["text_resource"] = {**(known.get("text_resource") or {}), "text": hit.text}
    return kind.model_validate({"id_": hit.id, "metadata": metadata, **known})


def _fields(node: BaseNode) -> dict[str, Any]:
    """Return the fields of a node that are not parts of a document, in the form of JSON."""
    fields = node.model_dump(mode="json", exclude=OWN, include=set(type(node).model_fields))
    for name, value in fields.items():
        if name.endswith("_resource") and isinstance(value, dict):
            data = getattr(node, name).data  # base64, which `model_dump` leaves out
            fields[name] = {k: v for k, v in value.items() if v is not None} | ({"data": data.decode()} if data else {})
    if isinstance(fields.get("text_resource"), dict):
        fields["text_resource"].pop("text", None)
    return fields
