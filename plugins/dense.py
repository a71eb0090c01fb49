"""One vector for each document, and the product with every one of them: what most people have, and exact."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind, NoOptions
from .hookspecs import Register, hookimpl


class Dense(IndexKind):
    """Inner products with all vectors; see the module."""

    name: ClassVar[str] = "dense"
    default_encoder: ClassVar[str] = "minilm"
    Options: ClassVar[type] = NoOptions

    def __init__(self, options: NoOptions) -> None:
        del options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """``minilm``, or the folder of a checkpoint; the same as XTR's, which makes these vectors by the way."""
        from ..retrieval.encoders import load_multi_vector_encoder

        return load_multi_vector_encoder(name, device, precision)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """Nothing but the width."""
        del expected
        return {"width": np.array([document_vectors(encoded).shape[1]], np.int64)}

    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """The vectors."""
        del shared
        return len(encoded), {"documents": numbers.astype(np.int32), "vectors": document_vectors(encoded)}

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Vectors behind each other."""
        kept = [live[s["documents"]] for s in segments]
        merged = {
            name: np.concatenate([s[name][k] for s, k in zip(segments, kept, strict=True)])
            for name in ("documents", "vectors")
        }
        return len(merged["documents"]), merged

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> list[tuple[NDArray, NDArray]]:
        """Numbers and vectors of each segment."""
        width = int(shared["width"][0]) if shared else 0
        for s in segments:
            if s["vectors"].shape != (len(s["documents"]), width):
                raise ValueError(f"{s['vectors'].shape} vectors of {len(s['documents'])} documents, {width} wide")
            if len(s["documents"]) and not 0 <= s["documents"].min() <= s["documents"].max() < documents:
                raise ValueError(f"numbers of documents beyond {documents}")
        return [(s["documents"], s["vectors"]) for s in segments]

    def search(
        self, searcher: Any, query: Any, k: int, settings: NoOptions, allow: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The greatest products."""
        from ..retrieval.ranking import is_allowed, top_documents

        del settings
        vector = document_vectors(query)[0]
        documents, scores = np.empty(0, np.int32), np.empty(0, np.float32)
        for numbers, vectors in searcher:
            kept = is_allowed(allow, numbers)
            more = vectors @ vector
            documents, scores = top_documents(np.append(documents, numbers[kept]), np.append(scores, more[kept]), k)
        return documents, scores


def document_vectors(encoded: Any) -> NDArray[np.float32]:
    """One vector for each text, [texts, width]: the encoder's own, or the mean of its tokens'."""
    if encoded.pooled is not None:
        return encoded.pooled
    sums = np.zeros((len(encoded), encoded.vectors.shape[1]), np.float32)
    np.add.at(sums, encoded.text_ids, encoded.vectors.astype(np.float32))
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)


@hookimpl
def register_indexes(register: Register) -> None:
    """Built-ins come through the same door as anybody's plugin."""
    register(Dense)
