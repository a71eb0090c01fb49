"""An index type with one bit for each dimension of a document vector: 32 times smaller than ``dense``.

A bit is set where the document's value is above the threshold of the dimension. Queries are not quantised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pilotfish import IndexKind, hookimpl

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class BinaryVectorsOptions:
    """Options of the example.

    Attributes:
        center: Whether the threshold of a dimension is its mean over the first documents; else it is zero.
    """

    center: bool = True


class BinaryVectors(IndexKind):
    """Exhaustive search over document vectors of one bit per dimension."""

    name: ClassVar[str] = "binary_vectors"
    default_encoder: ClassVar[str] = "minilm"
    Options: ClassVar[type] = BinaryVectorsOptions

    def __init__(self, options: BinaryVectorsOptions) -> None:
        self.options = options

    def load_encoder(self, name: str, device: str = "auto", precision: str = "float32") -> Any:
        """Load a sentence encoder: ``minilm``, or the folder of a checkpoint."""
        from pilotfish.retrieval.encoders import load_multi_vector_encoder

        return load_multi_vector_encoder(name, device, precision)

    def train(self, encoded: Any, expected: int) -> Arrays:
        """Return the threshold of each dimension."""
        return {"threshold": encoded.pooled.mean(0) * self.options.center}

    def segment(self, encoded: Any, numbers: np.ndarray, shared: Any) -> tuple[int, Arrays]:
        """Pack the bits of each document."""
        bits = np.packbits(encoded.pooled > shared["threshold"], axis=1)
        return len(encoded), {"documents": numbers.astype(np.int32), "bits": bits}

    def merge(self, segments: Sequence[Any], live: np.ndarray) -> tuple[int, Arrays]:
        """Concatenate the bits of live documents."""
        documents, bits = (np.concatenate([s[name] for s in segments]) for name in ("documents", "bits"))
        mask = live[documents]
        return int(mask.sum()), {"documents": documents[mask], "bits": bits[mask]}

    def searcher(self, shared: Any, segments: Sequence[Any], documents: int) -> tuple[Any, Sequence[Any]]:
        """Return the arrays of a commit."""
        return shared, segments

    def search(
        self, searcher: Any, query: Any, k: int, settings: Any, allow: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents whose bits agree most with the signs of the query, weighted by its magnitudes."""
        shared, segments = searcher
        vector = query.pooled[0] - shared["threshold"]
        found, scores = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for segment in segments:
            documents, bits = segment["documents"], segment["bits"]
            if allow is not None:  # a filter is a bitmap of internal doc ids
                mask = np.unpackbits(allow, bitorder="little")[documents] > 0
                documents, bits = documents[mask], bits[mask]
            found.append(documents)
            scores.append(np.unpackbits(bits, axis=1, count=len(vector)) @ (2 * vector) - vector.sum())
        documents, score = np.concatenate(found), np.concatenate(scores).astype(np.float32)
        best = np.lexsort((documents, -score))[:k]  # of equal documents the older one first
        return documents[best], score[best]


@hookimpl
def register_indexes(register) -> None:
    """Register the index type."""
    register(BinaryVectors)
