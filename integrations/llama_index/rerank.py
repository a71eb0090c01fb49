"""A LlamaIndex postprocessor that re-ranks the nodes of any retriever by late interaction (MaxSim)."""

from typing import Any

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from ...retrieval.errors import RetrievalError
from ...retrieval.registry import resolve_encoder, resolve_index_kind


class PilotfishRerank(BaseNodePostprocessor):
    """A postprocessor that re-ranks nodes by MaxSim.

    The score of a node is the mean over the query's tokens of the largest inner product with a token of the node.

    Attributes:
        top_n: Number of nodes to return.
        encoder: Name of a multi-vector encoder, or the folder of a checkpoint.
        device: Device of the encoder: ``cpu``, ``cuda`` or ``auto``.
    """

    top_n: int = 5
    encoder: str = "minilm"
    device: str = "auto"
    _encoder: Any = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Load the encoder.

        Raises:
            RetrievalError: There is no such encoder, or ``top_n`` is invalid.
        """
        super().model_post_init(context)
        if self.top_n < 1:
            raise RetrievalError(f"top_n: expected 1 or more, got {self.top_n}")
        self._encoder = resolve_encoder(resolve_index_kind("xtr", {})[0], self.encoder, self.device, "float32")

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serializes the component."""
        return "PilotfishRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise RetrievalError("reranking needs a query")
        if not nodes:
            return []
        query = self._encoder.encode_queries([query_bundle.query_str])[0].vectors
        texts = [node.node.get_content(MetadataMode.NONE) for node in nodes]
        documents = self._encoder.encode_documents(texts)
        scores = [
            float((query @ part.vectors.astype(np.float32).T).max(1).mean()) if len(part.vectors) else -1.0
            for part in (documents[i] for i in range(len(texts)))
        ]
        order = np.argsort(-np.array(scores), kind="stable")[: self.top_n]
        return [NodeWithScore(node=nodes[i].node, score=scores[i]) for i in order]
