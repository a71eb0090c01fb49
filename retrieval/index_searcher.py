"""Search of an index: settings, one searcher per commit, and rankings of internal doc ids."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .document_filter import DocumentFilter, Filter
from .errors import DamagedIndex, RetrievalError
from .ranking import search_until_found
from .registry import LazyEncoder, build_settings
from .store import Snapshot, Store
from .validation import check_text

Ranked = tuple[NDArray[np.int32], NDArray[np.float32]]  # internal doc ids and scores, best first


class IndexSearcher:
    """Search of one index, from any number of threads."""

    def __init__(self, store: Store, kind: Any, encoder: LazyEncoder, selection: DocumentFilter) -> None:
        self._store, self._kind, self._encoder, self._selection = store, kind, encoder, selection
        self._mutex = threading.Lock()
        self._ready: tuple[int, Any] | None = None

    def close(self) -> None:
        """Drop the searcher of the last commit."""
        self._ready = None

    def ranked(
        self,
        queries: Sequence[str],
        k: int,
        where: Filter | None,
        snapshot: Snapshot,
        changes: Mapping[str, Any],
    ) -> list[Ranked]:
        """Return the ranking of each query; see `Index.search_numbers`."""
        if not isinstance(k, int) or k < 1:
            raise RetrievalError(f"k: expected a whole number of 1 or more, got {k!r}")
        if isinstance(queries, str):
            raise RetrievalError("queries: expected a list, got a text; see search")
        for query in queries:
            check_text("query", query)
        search_settings = self.settings(snapshot, changes)
        allow = self._selection.allow(snapshot, where)
        if not queries:
            return []
        encoded = self._kind.queries(self._encoder(), list(queries), search_settings)
        if not snapshot.segments or (allow is not None and not allow.any()):
            nothing = np.empty(0, np.int32), np.empty(0, np.float32)
            return [nothing] * len(queries)
        searcher = self.searcher(snapshot)
        possible = min(k, snapshot.manifest.count if where is None else int(np.unpackbits(allow).sum()))  # type: ignore[arg-type]
        rerank_depth = self._kind.rescored(search_settings)
        possible = min(max(k, rerank_depth), possible) if rerank_depth else possible
        results = [
            search_until_found(self._kind, searcher, encoded[i], max(k, rerank_depth), search_settings, possible, allow)
            for i in range(len(queries))
        ]
        if rerank_depth:
            results = [
                self._rescored(encoded[i], *pair, rerank_depth, search_settings) for i, pair in enumerate(results)
            ]
        return [(numbers[:k], scores[:k]) for numbers, scores in results]

    def _rescored(
        self, query: Any, numbers: NDArray[np.int32], scores: NDArray[np.float32], count: int, settings: Any
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Re-rank the best ``count`` documents by scores computed from their texts; the others follow unchanged."""
        documents = self._store.documents.get(numbers[:count].tolist())
        existing = np.array([n for n in numbers[:count].tolist() if n in documents], np.int32)
        texts = [documents[n].text for n in existing.tolist()]
        new_scores = self._kind.rescore(self._encoder(), query, texts, settings)
        order = np.argsort(-new_scores, kind="stable")
        return np.concatenate([existing[order], numbers[count:]]), np.concatenate([new_scores[order], scores[count:]])

    def encoded(self, query: Any, k: int, where: Filter | None, settings: Any, snapshot: Snapshot) -> Ranked:
        """Return the best documents for an encoded query, without widening the search (`IndexKind.wider`)."""
        allow = self._selection.allow(snapshot, where)
        if not snapshot.segments or (allow is not None and not allow.any()):
            return np.empty(0, np.int32), np.empty(0, np.float32)
        return self._kind.search(self.searcher(snapshot), query, k, settings, allow)

    def searcher(self, snapshot: Snapshot) -> Any:
        """Return the searcher of the index type for a commit, and keep it until the next commit.

        Raises:
            DamagedIndex: The arrays of the commit do not fit each other.
        """
        with self._mutex:
            if self._ready is None or self._ready[0] != snapshot.manifest.number:
                arrays = [s.arrays for s in snapshot.segments]
                try:
                    searcher = self._kind.searcher(snapshot.shared, arrays, len(snapshot.live))
                except (ValueError, KeyError, IndexError) as error:
                    self._store.check()  # names the file, if one is damaged
                    raise DamagedIndex(f"{self._store.folder}: arrays do not fit each other ({error})") from None
                self._ready = snapshot.manifest.number, searcher
            return self._ready[1]

    def settings(self, snapshot: Snapshot, changes: Mapping[str, Any]) -> Any:
        """Return the search settings of a commit with ``changes`` applied.

        Raises:
            RetrievalError: A setting is unknown, or its value is invalid.
        """
        return build_settings(self._kind, {**snapshot.manifest.settings, **changes})
