"""Base class of index types that store term weights in inverted lists; see `retrieval.sparse_index`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind, ScoreExplanation

if TYPE_CHECKING:
    from ..retrieval.sparse_index import InvertedIndexSearcher
    from ..retrieval.sparse_vectors import SparseVectors


MANY = 1000  # number of documents from which on an index is not retrained


class InvertedIndexKind(IndexKind):
    """Base class of the index types ``bm25`` and ``vdr``."""

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """Return whether an index of fewer than `MANY` trained documents has doubled in size."""
        trained = int(shared["trained"][0])
        return trained < MANY and documents >= 2 * trained

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Merge the inverted lists of several segments."""
        from ..retrieval import sparse_index

        merged = sparse_index.merge_sparse_segments(segments, live)
        return len(merged["places"]), merged

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> "InvertedIndexSearcher":
        """Return a searcher of the inverted lists of a commit."""
        from ..retrieval.sparse_index import InvertedIndexSearcher

        return InvertedIndexSearcher(shared, segments, documents)


def explain_shared_terms(
    searcher: "InvertedIndexSearcher", query: "SparseVectors", number: int, name: Callable[[int], str]
) -> list[ScoreExplanation]:
    """Return the terms that a query and a document share, with their contributions to the score, largest first.

    Args:
        searcher: Searcher of the index.
        query: Term weights of one query.
        number: Internal id of the document.
        name: Function that returns the name of a term id.
    """
    products = query.values * searcher.weights(number, query.indices)
    order = [i for i in np.argsort(-products, kind="stable").tolist() if products[i] > 0]
    return [ScoreExplanation(w, w, float(products[i])) for i in order if (w := name(int(query.indices[i])))]
