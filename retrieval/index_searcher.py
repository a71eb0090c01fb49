"""How an index is searched: settings, a searcher for each commit, the best documents by their internal numbers."""

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

Ranked = tuple[NDArray[np.int32], NDArray[np.float32]]  # internal numbers and scores, best first


class IndexSearcher:
    """All that searches one index; in any number of threads."""

    def __init__(self, store: Store, kind: Any, encoder: LazyEncoder, selection: DocumentFilter) -> None:
        self._store, self._kind, self._encoder, self._selection = store, kind, encoder, selection
        self._mutex = threading.Lock()
        self._ready: tuple[int, Any] | None = None

    def close(self) -> None:
        """Let go of what was made for a commit."""
        self._ready = None

    def ranked(
        self,
        queries: Sequence[str],
        k: int,
        where: Filter | None,
        snapshot: Snapshot,
        changes: Mapping[str, Any],
    ) -> list[Ranked]:
        """See `Index.search_numbers`."""
        if not isinstance(k, int) or k < 1:
            raise RetrievalError(f"k: expected a whole number of 1 or more, got {k!r}")
        if isinstance(queries, str):
            raise RetrievalError("queries: expected a list, got a text; see search")
        for query in queries:
            check_text("query", query)
        chosen = self.settings(snapshot, changes)
        allow = self._selection.allow(snapshot, where)
        if not queries:
            return []
        encoded = self._kind.queries(self._encoder(), list(queries), chosen)
        if not snapshot.segments or (allow is not None and not allow.any()):
            nothing = np.empty(0, np.int32), np.empty(0, np.float32)
            return [nothing] * len(queries)
        searcher = self.searcher(snapshot)
        possible = min(k, snapshot.manifest.count if where is None else int(np.unpackbits(allow).sum()))  # type: ignore[arg-type]
        again = self._kind.rescored(chosen)
        possible = min(max(k, again), possible) if again else possible
        found = [
            search_until_found(self._kind, searcher, encoded[i], max(k, again), chosen, possible, allow)
            for i in range(len(queries))
        ]
        if again:
            found = [self._rescored(encoded[i], *pair, again, chosen) for i, pair in enumerate(found)]
        return [(numbers[:k], scores[:k]) for numbers, scores in found]

    def _rescored(
        self, query: Any, numbers: NDArray[np.int32], scores: NDArray[np.float32], count: int, settings: Any
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The best ``count`` in the order of scores that their texts give; those behind them stay there."""
        documents = self._store.documents.get(numbers[:count].tolist())
        there = np.array([n for n in numbers[:count].tolist() if n in documents], np.int32)
        anew = self._kind.rescore(self._encoder(), query, [documents[n].text for n in there.tolist()], settings)
        order = np.argsort(-anew, kind="stable")
        return np.concatenate([there[order], numbers[count:]]), np.concatenate([anew[order], scores[count:]])

    def encoded(self, query: Any, k: int, where: Filter | None, settings: Any, snapshot: Snapshot) -> Ranked:
        """The best documents for a query that is encoded already, by these settings and no wider ones."""
        allow = self._selection.allow(snapshot, where)
        if not snapshot.segments or (allow is not None and not allow.any()):
            return np.empty(0, np.int32), np.empty(0, np.float32)
        return self._kind.search(self.searcher(snapshot), query, k, settings, allow)

    def searcher(self, snapshot: Snapshot) -> Any:
        """What the index's kind searches of a commit.

        Raises:
            DamagedIndex: its files do not fit each other.
        """
        with self._mutex:
            if self._ready is None or self._ready[0] != snapshot.manifest.number:
                arrays = [s.arrays for s in snapshot.segments]
                try:
                    made = self._kind.searcher(snapshot.shared, arrays, len(snapshot.live))
                except (ValueError, KeyError, IndexError) as error:
                    self._store.check()  # which names the file, where one was damaged
                    raise DamagedIndex(f"{self._store.folder}: arrays do not fit each other ({error})") from None
                self._ready = snapshot.manifest.number, made
            return self._ready[1]

    def settings(self, snapshot: Snapshot, changes: Mapping[str, Any]) -> Any:
        """Settings of a commit, with these changes.

        Raises:
            RetrievalError: there is no such setting, or not such a value.
        """
        return build_settings(self._kind, {**snapshot.manifest.settings, **changes})
