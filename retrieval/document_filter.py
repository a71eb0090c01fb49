"""Which documents of an index may be found: by their ids, by a filter over metadata, and only while they live."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import filters
from .errors import RetrievalError
from .store import Snapshot, Store
from .validation import check_text

FILTERS = 64  # filters whose documents are remembered
Filter = str | filters.Filter


class DocumentFilter:
    """Documents of one index by what is asked of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mutex = threading.Lock()
        self._known: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()

    def numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """Internal numbers of those ids that are there."""
        for name in ids:
            check_text("id", name)
        live = self._store.refresh().live
        return {name: n for name, n in self._store.documents.numbers_of(ids) if n < len(live) and live[n]}

    def allow(self, snapshot: Snapshot, where: Filter | None) -> NDArray[np.uint8] | None:
        """A bit for each document that may be found; None for all."""
        if where is None:
            return None if snapshot.manifest.count == len(snapshot.live) else snapshot.bits
        return np.packbits(self.matching(snapshot, where), bitorder="little")

    def matching(self, snapshot: Snapshot, where: Filter) -> NDArray[np.bool_]:
        """[documents] which pass a filter and are live."""
        condition = filters.parse(where) if isinstance(where, str) else where
        if not isinstance(condition, filters.Filter):
            raise RetrievalError(f"filter: expected text or a filter, got {type(where).__name__}")
        text, values = filters.to_sql(condition)
        # Python takes 1 and true for equal, filters do not.
        key = text, tuple((type(v), v) for v in values), snapshot.manifest.number
        with self._mutex:
            if (known := self._known.get(key)) is not None:
                return known
        found = np.zeros(len(snapshot.live), np.bool_)
        rows = self._store.documents.ask(f"SELECT number FROM documents WHERE {text}", values)  # marks only
        numbers = np.array([n for (n,) in rows], np.int64)
        found[numbers[numbers < len(found)]] = True
        found &= snapshot.live
        with self._mutex:
            self._known[key] = found
            while len(self._known) > FILTERS:
                self._known.popitem(last=False)
        return found
