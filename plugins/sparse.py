"""What kinds of index share whose documents are weighted words in inverted lists; see `retrieval.sparse_index`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .contracts import Arrays, IndexKind

if TYPE_CHECKING:
    from ..retrieval.sparse_index import Searcher


class SparseKind(IndexKind):
    """Merging lists, and looking at them."""

    def merge(self, segments: Sequence[Arrays], live: NDArray[np.bool_]) -> tuple[int, Arrays]:
        """Inverted lists of several segments in one."""
        from ..retrieval import sparse_index

        made = sparse_index.merge(segments, live)
        return len(made["places"]), made

    def searcher(self, shared: Arrays, segments: Sequence[Arrays], documents: int) -> "Searcher":
        """A view of a snapshot's lists."""
        from ..retrieval.sparse_index import Searcher

        return Searcher(shared, segments, documents)
