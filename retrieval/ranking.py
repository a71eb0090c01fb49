"""Selection of the best documents by score."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_documents(
    documents: NDArray[np.int32], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the k best documents and their scores, best first; ties are in doc id order."""
    if len(scores) > k:
        mask = scores >= np.partition(scores, -k)[-k]
        documents, scores = documents[mask], scores[mask]
    order = np.lexsort((documents, -scores))[:k]
    return documents[order], scores[order]


def is_allowed(allow: NDArray[np.uint8] | None, documents: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which documents are set in the bitmap ``allow`` (least significant bit first); all if it is None."""
    if allow is None:
        return np.ones(len(documents), np.bool_)
    return (allow[documents >> 3] >> (documents & 7).astype(np.uint8)) & 1 == 1


def search_until_found(
    kind: Any, searcher: Any, query: Any, k: int, settings: Any, possible: int, allow: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Search, and widen the search (`IndexKind.wider`) until ``possible`` documents are found or it cannot be widened.

    A filter that lets few documents pass needs a wider search for ``k`` hits.
    """
    while True:
        hits = kind.search(searcher, query, k, settings, allow)
        if len(hits[0]) >= possible or (more := kind.wider(settings, searcher)) is None:
            return hits
        settings = more
