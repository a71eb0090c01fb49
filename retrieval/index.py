"""An index of documents: add, replace, delete, search, explain; safe against crashes, readable while it is written.

from pilotfish.retrieval import Index

index = Index.create("my-index")
index.add([{"id": "a", "text": "Pilot fish travel with sharks."}])
for hit in index.search("which fish follow sharks?", k=5):
    print(hit.id, hit.score, hit.snippet)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import snippets
from .document_filter import DocumentFilter, Filter
from .errors import RetrievalError
from .index_searcher import IndexSearcher, Ranked
from .index_writer import IndexWriter, Progress
from .registry import LazyEncoder, absolute_encoder_name, resolve_encoder, resolve_index_kind
from .store import Change, Snapshot, Store
from .store.documents import Document
from .store.manifest import CURRENT
from .validation import BATCH, check_names


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        id: Its owner's name for it.
        score: Higher is better; comparable within one search.
        text: All of it.
        metadata: As it was given.
        snippet: The part of the text that has most of the query's words.
    """

    id: str
    score: float
    text: str
    metadata: Mapping[str, Any]
    snippet: str


class Index:
    """An index in a folder. Several threads and processes may search, one at a time may write."""

    def __init__(self, store: Store, kind: Any, load: Callable[[], Any]) -> None:
        """Not for users: see `create` and `open`."""
        self._store, self.kind, self._encoder = store, kind, LazyEncoder(load)
        self._selection = DocumentFilter(store)
        parts = store, kind, self._encoder, self._selection
        self._changes, self._searching = IndexWriter(*parts), IndexSearcher(*parts)

    # ------------------------------------------------------------------------------------------------ making one

    @classmethod
    def create(
        cls,
        folder: str | Path,
        kind: str = "xtr",
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        precision: str = "float32",
    ) -> "Index":
        """Make an empty index.

        Args:
            folder: Where; it must not hold anything.
            kind: How documents are found; the names of registered kinds.
            encoder: A registered encoder, or the folder of a checkpoint; None for the kind's own.
            options: Of the kind; see `pilotfish plugins`.
            device: For the encoder: `cpu`, `cuda` or `auto`.
            precision: For the encoder.

        Raises:
            RetrievalError: the folder holds something, or there is no such kind, option or encoder.
            OSError: the folder cannot be written.
        """
        made, parsed = resolve_index_kind(kind, options or {})
        name = absolute_encoder_name(encoder) if encoder and encoder != made.default_encoder else made.default_encoder
        loaded = resolve_encoder(made, name, device, precision)
        about = {"name": name, "fingerprint": loaded.fingerprint, "dimension": loaded.dimension}
        return cls(Store.create(Path(folder), kind, asdict(parsed), about), made, lambda: loaded)

    @classmethod
    def open(
        cls, folder: str | Path, encoder: str | None = None, device: str = "auto", precision: str = "float32"
    ) -> "Index":
        """Open an index at its latest commit.

        Args:
            folder: Where it is.
            encoder: Where its encoder is now, if that was moved.
            device: See `create`.
            precision: See `create`.

        The encoder is loaded when it is needed first.

        Raises:
            RetrievalError: there is no index, or it is damaged.
        """
        store = Store(Path(folder))
        about = store.snapshot.manifest
        made, _ = resolve_index_kind(about.kind, about.options)
        name = encoder or about.encoder["name"]

        def load() -> Any:
            loaded = resolve_encoder(made, name, device, precision)
            if loaded.fingerprint != about.encoder["fingerprint"]:
                raise RetrievalError(
                    f"{folder}: was made with another encoder than {name} (fingerprint "
                    f"{about.encoder['fingerprint']}, not {loaded.fingerprint}); name the right one with --encoder"
                )
            return loaded

        return cls(store, made, load)

    @classmethod
    def open_or_create(
        cls,
        folder: str | Path,
        kind: str | None = None,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> "Index":
        """The index in a folder, made where there is none; ``kind`` is ``xtr`` then, where nothing is said.

        Raises:
            RetrievalError: as `open` and `create`; or it is of another kind.
        """
        if not (Path(folder) / CURRENT).exists():
            return cls.create(folder, kind or "xtr", encoder, options)
        opened = cls.open(folder, encoder)
        if kind not in (None, opened.kind.name):
            raise RetrievalError(f"{folder}: is of kind {opened.kind.name}, not {kind}")
        return opened

    @property
    def encoder(self) -> Any:
        """The encoder.

        Raises:
            RetrievalError: it is not there, or not the one that the index was made with.
        """
        return self._encoder()

    def close(self) -> None:
        """Let go of files."""
        self._store.close()
        self._searching.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- documents

    def __len__(self) -> int:
        """Documents that can be found."""
        return self._store.refresh().manifest.count

    def __contains__(self, name: str) -> bool:
        return bool(self._selection.numbers([name]))

    def get(self, name: str) -> Document | None:
        """A document by its id; None where there is none."""
        numbers = self._selection.numbers([name])
        return self._store.documents.get(list(numbers.values())).get(numbers[name]) if numbers else None

    def has(self, ids: Sequence[str]) -> set[str]:
        """Those of ``ids`` that are there."""
        return set(self._selection.numbers(check_names(ids)))

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._store.folder

    @property
    def snapshot(self) -> Snapshot:
        """The latest commit."""
        return self._store.refresh()

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by internal numbers."""
        return self._store.documents.get(numbers)

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Ids of internal numbers, as `search_numbers` returns them."""
        found = self._store.documents.get(numbers)
        return [found[n].id for n in numbers if n in found]

    def ids(self) -> Iterator[str]:
        """Ids of all documents, in the order they were added."""
        snapshot = self._store.refresh()
        for number, name in self._store.documents.ask("SELECT number, id FROM documents ORDER BY number"):
            if number < len(snapshot.live) and snapshot.live[number]:
                yield name

    def select(self, where: Filter | None = None) -> Iterator[Document]:
        """Documents that pass a filter, all without one, in the order they were added."""
        snapshot = self._store.refresh()
        numbers = np.flatnonzero(snapshot.live if where is None else self._selection.matching(snapshot, where))
        for begin in range(0, len(numbers), BATCH):
            part = numbers[begin : begin + BATCH].tolist()
            found = self._store.documents.get(part)
            yield from (found[n] for n in part if n in found)

    def add(self, documents: Iterable[Any], progress: Progress | None = None, learn: bool = True) -> int:
        """Add documents; returns how many.

        Args:
            documents: Each a mapping with ``id``, ``text`` and perhaps ``metadata``, or a `Document`.
            progress: Is told how far it is.
            learn: Learn anew what all segments share, where the index has outgrown it.

        Raises:
            RetrievalError: one is wrong, or its id is taken (nothing of its batch is added; see `upsert`).
            OSError: the disk is full, or may not be written; earlier batches are in.
        """
        return self._changes.put(documents, progress, replace=False, skip=False, learn=learn)

    def upsert(self, documents: Iterable[Any], progress: Progress | None = None) -> int:
        """Add documents, in the place of those with the same ids; returns how many."""
        return self._changes.put(documents, progress, replace=True, skip=False)

    def resume(self, documents: Iterable[Any], progress: Progress | None = None) -> int:
        """Add those documents whose ids are not there yet; returns how many."""
        return self._changes.put(documents, progress, replace=False, skip=True)

    def delete(self, ids: Sequence[str] = (), where: Filter | None = None) -> int:
        """Delete documents by their ids, or all that pass a filter; returns how many. Unknown ids are passed over."""
        return self._changes.delete(ids, where)

    def compact(self, relearn: bool = False, progress: Progress | None = None) -> None:
        """Write everything anew in one segment, without what was deleted, and forget deleted documents' text.

        Args:
            relearn: Encode all documents again, and learn from them what all segments share: for an index that has
                grown far beyond its first documents.
            progress: Is told how far encoding is.
        """
        self._changes.compact(relearn, progress)

    def configure(self, **settings: Any) -> None:
        """Change how the index is searched from now on.

        Raises:
            RetrievalError: there is no such setting, or not such a value.
        """
        with self._store.writer() as writer:
            self._searching.settings(self._store.snapshot, settings)
            writer.commit(Change(settings={**self._store.snapshot.manifest.settings, **settings}))

    # ----------------------------------------------------------------------------------------------------- search

    def search(self, query: str, k: int = 10, where: Filter | None = None, **settings: Any) -> list[Hit]:
        """The best documents for a query.

        Args:
            query: Text.
            k: Hits at most.
            where: A filter over metadata, as ``year >= 2020 AND lang in (en, de)``; see `filters`.
            settings: In place of the index's own, for this search.

        Raises:
            RetrievalError: the filter or a setting is wrong.
        """
        return self.search_many([query], k, where, **settings)[0]

    def search_many(
        self, queries: Sequence[str], k: int = 10, where: Filter | None = None, **settings: Any
    ) -> list[list[Hit]]:
        """`search` for several queries, which are encoded together."""
        snapshot = self._store.refresh()
        found = self.search_numbers(queries, k, where, snapshot, **settings)
        documents = self._store.documents.get(list({int(n) for numbers, _ in found for n in numbers}))
        return [_hits(query, *pair, documents) for query, pair in zip(queries, found, strict=True)]

    def search_numbers(
        self,
        queries: Sequence[str],
        k: int,
        where: Filter | None = None,
        snapshot: Snapshot | None = None,
        **settings: Any,
    ) -> list[Ranked]:
        """Internal numbers and scores of hits; what `search_many` does without looking at documents."""
        return self._searching.ranked(queries, k, where, snapshot or self._store.refresh(), settings)

    def explain(self, query: str, name: str, **settings: Any) -> list[Any]:
        """Why a document has its score: a list of `plugins.contracts.Reason`.

        Raises:
            RetrievalError: there is no such document.
        """
        snapshot = self._store.refresh()
        numbers = self._selection.numbers([name])
        if not numbers:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        text = self._store.documents.get([numbers[name]])[numbers[name]].text
        chosen = self._searching.settings(snapshot, settings)
        allow = self._selection.allow(snapshot, None)
        return self.kind.explain(
            self._searching.searcher(snapshot), self.encoder, query, text, numbers[name], chosen, allow
        )

    def term_weights(self, query: str, name: str, **settings: Any) -> Any:
        """A query and a document in weighted words: a `plugins.contracts.Reading`; None of a kind that has none.

        Raises:
            RetrievalError: there is no such document.
        """
        document = self.get(name)
        if document is None:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        return self.kind.term_weights(self.encoder, query, document.text, self.settings(**settings))

    def settings(self, **changes: Any) -> Any:
        """How the index is searched, with these changes.

        Raises:
            RetrievalError: there is no such setting, or not such a value.
        """
        return self._searching.settings(self._store.refresh(), changes)

    def searcher(self) -> Any:
        """What the index's kind searches of the latest commit."""
        return self._searching.searcher(self._store.refresh())

    def count(self, where: Filter | None) -> int:
        """Documents that pass a filter; None for all."""
        return len(self) if where is None else int(self._selection.matching(self._store.refresh(), where).sum())

    def search_encoded(self, query: Any, text: str, k: int, where: Filter | None, settings: Any) -> list[Hit]:
        """The best documents for a query that is encoded already, by these settings and no wider ones."""
        numbers, scores = self._searching.encoded(query, k, where, settings, self._store.refresh())
        return _hits(text, numbers, scores, self._store.documents.get(numbers.tolist()))

    # ------------------------------------------------------------------------------------------------------ upkeep

    def check(self) -> None:
        """Read everything and compare checksums.

        Raises:
            DamagedIndex: a file is not what was written.
        """
        about = self._store.check()
        if about.segments:
            self._searching.searcher(self._store.snapshot)

    def stats(self) -> dict[str, Any]:
        """What the index holds, and how large it is."""
        snapshot = self._store.refresh()
        about = snapshot.manifest
        rows = sum(s.rows for s in about.segments)
        size = sum(f.bytes for f in about.files().values())
        text = sum(p.stat().st_size for p in self._store.folder.glob("documents.db*"))
        return {
            "kind": about.kind,
            "encoder": about.encoder["name"],
            "documents": about.count,
            "deleted": sum(s.documents for s in about.segments) - about.count,
            "segments": len(about.segments),
            "postings": rows,
            "bytes": size,
            "bytes_per_posting": round(size / rows, 1) if rows else 0.0,
            "text_bytes": text,
            "commit": about.number,
            "options": about.options,
            "settings": asdict(self._searching.settings(snapshot, {})),
        }


def _hits(
    query: str, numbers: NDArray[np.int32], scores: NDArray[np.float32], documents: Mapping[int, Document]
) -> list[Hit]:
    """Hits of the documents that are still there."""
    return [
        Hit(d.id, float(score), d.text, d.metadata, snippets.best_snippet(d.text, query))
        for n, score in zip(numbers.tolist(), scores, strict=True)
        if (d := documents.get(n)) is not None
    ]
