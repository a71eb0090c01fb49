"""Selection of the live documents of an index by id or by metadata filter."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import filters
from .errors import RetrievalError
from .filter_sql import to_sql
from .store import Snapshot, Store
from .store.documents import COUNT_MARK, Document
from .validation import check_text

FILTERS = 64  # maximum number of cached filter results
Filter = str | filters.Filter


class DocumentFilter:
    """Document filter of one index, with a cache of filter results."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mutex = threading.Lock()
        self._known: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()

    def numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the internal doc ids of live documents by id; unknown ids are omitted."""
        for name in ids:
            check_text("id", name)
        live = self._store.refresh().live
        return {name: n for name, n in self._store.documents.numbers_of(ids) if n < len(live) and live[n]}

    def numbers_of_sources(self, sources: Iterable[str]) -> list[int]:
        """Return the internal doc ids of the live documents of sources, ascending."""
        live = self._store.refresh().live
        return sorted(n for n in self._store.documents.numbers_of_sources(list(sources)) if n < len(live) and live[n])

    def sources(self) -> dict[str, int]:
        """Return the number of live documents of each source, sorted by name."""
        live = self._store.refresh().live
        rows = self._store.documents.ask(
            "SELECT number, source FROM documents WHERE source IS NOT NULL ORDER BY source"
        )
        return dict(Counter(source for number, source in rows if number < len(live) and live[number]))

    def digests(self) -> dict[str, str]:
        """Return the digest of each source of live documents that was read from a file.

        It is empty if some documents of the file are missing: an addition did not end, or they were deleted.
        """
        digests, counts, complete = dict[str, str](), Counter[str](), dict[str, str]()
        for _, source, digest in self._read_from_files():
            digests[source], mark, count = digest.partition(COUNT_MARK)
            counts[source] += 1
            if mark:
                complete[source] = count
        return {s: digest if complete.get(s) == str(counts[s]) else "" for s, digest in digests.items()}

    def outdated(self, documents: Iterable[Document]) -> list[int]:
        """Return the internal doc ids of live documents of the same files as ``documents`` with other contents."""
        wanted = {d.source: d.digest.partition(COUNT_MARK)[0] for d in documents if d.source and d.digest}
        if not wanted:
            return []
        rows = self._read_from_files()
        return [n for n, source, d in rows if source in wanted and d.partition(COUNT_MARK)[0] != wanted[source]]

    def _read_from_files(self) -> Iterator[tuple[int, str, str]]:
        """Yield internal doc id, source and digest of the live documents that were read from files."""
        live = self._store.refresh().live
        for row in self._store.documents.ask("SELECT number, source, digest FROM documents WHERE digest IS NOT NULL"):
            if row[0] < len(live) and live[row[0]]:
                yield row

    def allow(self, snapshot: Snapshot, where: Filter | None) -> NDArray[np.uint8] | None:
        """Return a bitmap of the allowed documents, least significant bit first; None if all are allowed."""
        if where is None:
            return None if snapshot.manifest.count == len(snapshot.live) else snapshot.bits
        return np.packbits(self.matching(snapshot, where), bitorder="little")

    def matching(self, snapshot: Snapshot, where: Filter) -> NDArray[np.bool_]:
        """Return which documents pass a filter and are live, [documents]."""
        condition = filters.parse(where) if isinstance(where, str) else where
        if not isinstance(condition, filters.Filter):
            raise RetrievalError(f"filter: expected text or a filter, got {type(where).__name__}")
        text, values = to_sql(condition)
        # 1 and True are equal in Python, but not in filters.
        key = text, tuple((type(v), v) for v in values), snapshot.manifest.number
        with self._mutex:
            if (cached := self._known.get(key)) is not None:
                return cached
        mask = np.zeros(len(snapshot.live), np.bool_)
        rows = self._store.documents.ask(f"SELECT number FROM documents WHERE {text}", values)  # placeholders only
        numbers = np.array([n for (n,) in rows], np.int64)
        mask[numbers[numbers < len(mask)]] = True
        mask &= snapshot.live
        with self._mutex:
            self._known[key] = mask
            while len(self._known) > FILTERS:
                self._known.popitem(last=False)
        return mask
