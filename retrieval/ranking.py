"""The best of scored documents."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_documents(
    documents: NDArray[np.int32], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k best, best first; equal ones by number."""
    if len(scores) > k:
        kept = scores >= np.partition(scores, -k)[-k]
        documents, scores = documents[kept], scores[kept]
    order = np.lexsort((documents, -scores))[:k]
    return documents[order], scores[order]


def is_allowed(allow: NDArray[np.uint8] | None, documents: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which documents have their bit set in ``allow``, packed, the lowest first; all where it is None."""
    if allow is None:
        return np.ones(len(documents), np.bool_)
    return (allow[documents >> 3] >> (documents & 7).astype(np.uint8)) & 1 == 1


def search_until_found(
    kind: Any, searcher: Any, query: Any, k: int, settings: Any, possible: int, allow: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Hits of a kind; where the index or a filter has few documents, it looks further until ``possible`` are found."""
    while True:
        found = kind.search(searcher, query, k, settings, allow)
        if len(found[0]) >= possible or (more := kind.wider(settings, searcher)) is None:
            return found
        settings = more
