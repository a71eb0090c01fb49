"""What kinds of index share whose documents are weighted words in inverted lists; see `retrieval.sparse_index`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind, ScoreExplanation

if TYPE_CHECKING:
    from ..retrieval.sparse_index import InvertedIndexSearcher
    from ..retrieval.sparse_vectors import SparseVectors


MANY = 1000  # documents that a kind has learned from


class InvertedIndexKind(IndexKind):
    """Merging lists, looking at them, and when and why."""

    def needs_retraining(self, shared: Arrays, documents: int) -> bool:
        """While they are few, when they double."""
        trained = int(shared["trained"][0])
        return trained < MANY and documents >= 2 * trained

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Inverted lists of several segments in one."""
        from ..retrieval import sparse_index

        made = sparse_index.merge_sparse_segments(segments, live)
        return len(made["places"]), made

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> "InvertedIndexSearcher":
        """A view of a snapshot's lists."""
        from ..retrieval.sparse_index import InvertedIndexSearcher

        return InvertedIndexSearcher(shared, segments, documents)


def explain_shared_terms(
    searcher: "InvertedIndexSearcher", query: "SparseVectors", number: int, name: Callable[[int], str]
) -> list[ScoreExplanation]:
    """The words that a query and a document share, and what each adds, the most first.

    Args:
        searcher: Of the document.
        query: One text's words.
        number: The document.
        name: Of a word, by its number.
    """
    products = query.values * searcher.weights(number, query.indices)
    order = [i for i in np.argsort(-products, kind="stable").tolist() if products[i] > 0]
    return [ScoreExplanation(w, w, float(products[i])) for i in order if (w := name(int(query.indices[i])))]
