"""Dense retrieval: one vector for each document, and an exact search by inner product."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind, NoOptions
from .hookspecs import Register, hookimpl


class Dense(IndexKind):
    """Exact inner-product search over all document vectors."""

    name: ClassVar[str] = "dense"
    default_encoder: ClassVar[str] = "minilm"
    Options: ClassVar[type] = NoOptions

    def __init__(self, options: NoOptions) -> None:
        del options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """Load a sentence encoder: ``minilm``, or the folder of a checkpoint; the encoders are the same as for XTR."""
        from ..retrieval.encoders import load_multi_vector_encoder

        return load_multi_vector_encoder(name, device, precision)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """Return the dimension of the vectors."""
        del expected
        return {"width": np.array([document_vectors(encoded).shape[1]], np.int64)}

    def segment(self, encoded: Any, numbers: NDArray[np.int64], shared: Arrays) -> tuple[int, Arrays]:
        """Store the document vectors."""
        del shared
        return len(encoded), {"documents": numbers.astype(np.int32), "vectors": document_vectors(encoded)}

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Concatenate the vectors of live documents."""
        masks = [live[s["documents"]] for s in segments]
        merged = {
            name: np.concatenate([s[name][mask] for s, mask in zip(segments, masks, strict=True)])
            for name in ("documents", "vectors")
        }
        return len(merged["documents"]), merged

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> list[tuple[NDArray, NDArray]]:
        """Return the internal doc ids and vectors of each segment."""
        width = int(shared["width"][0]) if shared else 0
        for s in segments:
            if s["vectors"].shape != (len(s["documents"]), width):
                raise ValueError(f"vectors {s['vectors'].shape}, expected {len(s['documents'])} of dimension {width}")
            if len(s["documents"]) and not 0 <= s["documents"].min() <= s["documents"].max() < documents:
                raise ValueError(f"internal doc ids are not below {documents}")
        return [(s["documents"], s["vectors"]) for s in segments]

    def search(
        self, searcher: Any, query: Any, k: int, settings: NoOptions, allow: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the documents with the largest inner products."""
        from ..retrieval.ranking import is_allowed, top_documents

        del settings
        vector = document_vectors(query)[0]
        documents, scores = np.empty(0, np.int32), np.empty(0, np.float32)
        for numbers, vectors in searcher:
            mask = is_allowed(allow, numbers)
            more = vectors @ vector
            documents, scores = top_documents(np.append(documents, numbers[mask]), np.append(scores, more[mask]), k)
        return documents, scores


def document_vectors(encoded: Any) -> NDArray[np.float32]:
    """Return one vector per text, [num_texts, dimension]: the encoder's, or the normalised sum of its token vectors."""
    if encoded.pooled is not None:
        return encoded.pooled
    sums = np.zeros((len(encoded), encoded.vectors.shape[1]), np.float32)
    np.add.at(sums, encoded.text_ids, encoded.vectors.astype(np.float32))
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)


@hookimpl
def register_indexes(register: Register) -> None:
    """Register the plugin."""
    register(Dense)
