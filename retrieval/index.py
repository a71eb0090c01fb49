"""Index of documents: add, replace, delete, search and explain.

Every change is atomic: after a crash the index is at its last commit, and searches continue during a change.

    from pilotfish.retrieval import Index

    index = Index.create("my-index")
    index.add([{"id": "a", "text": "Pilot fish travel with sharks."}])
    for hit in index.search("which fish follow sharks?", k=5):
        print(hit.id, hit.score, hit.snippet)
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import snippets
from .defaults import CHUNK_TOKENS, LOCK_TIMEOUT, OVERLAP
from .document_filter import DocumentFilter, Filter
from .errors import RetrievalError
from .index_searcher import IndexSearcher, Ranked
from .index_writer import IndexWriter, Progress
from .registry import LazyEncoder, absolute_encoder_name, resolve_encoder, resolve_index_kind
from .store import Change, Snapshot, Store
from .store.documents import Document
from .store.manifest import CURRENT
from .sync import SyncReport
from .validation import BATCH, check_names


@dataclass(frozen=True)
class Hit:
    """Search result.

    Attributes:
        id: Id of the document.
        score: Score of the document; higher is better. Comparable within one search only.
        text: Full text of the document.
        metadata: Metadata of the document.
        snippet: Passage of the text with the most query terms.
        source: Name of the file, or of another origin, that the document is a part of; None if it has none.
    """

    id: str
    score: float
    text: str
    metadata: Mapping[str, Any]
    snippet: str
    source: str | None = None


class Index:
    """Index in a folder.

    Several threads and processes may search at once. Changes are made one after the other: those of one process queue,
    and a change waits up to ``lock_timeout`` seconds for a change of another process. An index can be pickled: it is
    opened again in the same folder.
    """

    def __init__(
        self, store: Store, kind: Any, load: Callable[[], Any], opening: Mapping[str, Any] | None = None
    ) -> None:
        """Wrap an open store; use `create` or `open` instead. ``opening`` has the arguments of `open` for a pickle."""
        self._opening = dict(opening or {})
        self._store, self.kind, self._encoder = store, kind, LazyEncoder(load)
        self._selection = DocumentFilter(store)
        parts = store, kind, self._encoder, self._selection
        self._changes, self._searching = IndexWriter(*parts), IndexSearcher(*parts)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        kind: str = "xtr",
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        precision: str = "float32",
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> "Index":
        """Create an empty index.

        Args:
            folder: Folder of the index; must be empty or not exist yet.
            kind: Name of a registered index type.
            encoder: Name of a registered encoder, or folder of a checkpoint; None for the default of the index type.
            options: Options of the index type; see `pilotfish plugins`.
            device: Device of the encoder: `cpu`, `cuda` or `auto`.
            precision: Precision of the encoder: `float32`, `bfloat16`, `float16` or `int8`.
            lock_timeout: Seconds that a change waits for a change of another process.

        Raises:
            RetrievalError: The folder is not empty, or the index type, an option or the encoder is invalid.
            OSError: The folder cannot be written.
        """
        index_kind, parsed = resolve_index_kind(kind, options or {})
        default = index_kind.default_encoder
        name = absolute_encoder_name(encoder) if encoder and encoder != default else default
        loaded = resolve_encoder(index_kind, name, device, precision)
        about = {"name": name, "fingerprint": loaded.fingerprint, "dimension": loaded.dimension}
        store = Store.create(Path(folder), kind, asdict(parsed), about, lock_timeout)
        return cls(store, index_kind, lambda: loaded, {"device": device, "precision": precision})

    @classmethod
    def open(
        cls,
        folder: str | Path,
        encoder: str | None = None,
        device: str = "auto",
        precision: str = "float32",
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> "Index":
        """Open an index at its latest commit. The encoder is loaded on first use.

        Args:
            folder: Folder of the index.
            encoder: Current name or folder of the encoder, if it has moved since the index was created.
            device: Device of the encoder; see `create`.
            precision: Precision of the encoder; see `create`.
            lock_timeout: Seconds that a change waits for a change of another process.

        Raises:
            RetrievalError: There is no index in the folder, it is damaged, or it may not be read.
        """
        store = Store(Path(folder), lock_timeout)
        about = store.snapshot.manifest
        index_kind, _ = resolve_index_kind(about.kind, about.options)
        name = encoder or about.encoder["name"]

        def load() -> Any:
            loaded = resolve_encoder(index_kind, name, device, precision)
            if loaded.fingerprint != about.encoder["fingerprint"]:
                raise RetrievalError(
                    f"{folder}: was made with another encoder than {name} (fingerprint "
                    f"{about.encoder['fingerprint']}, not {loaded.fingerprint}); name the right one with --encoder"
                )
            return loaded

        return cls(store, index_kind, load, {"encoder": encoder, "device": device, "precision": precision})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder and the arguments of `open`."""
        arguments = {**self._opening, "lock_timeout": self._store.lock_timeout}
        return functools.partial(type(self).open, self._store.folder.absolute(), **arguments), ()

    @classmethod
    def open_or_create(
        cls,
        folder: str | Path,
        kind: str | None = None,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> "Index":
        """Open the index in a folder, or create it if there is none.

        ``kind`` is the index type that an existing index must have; for a new index, None means ``xtr``.

        Raises:
            RetrievalError: `open` or `create` fails, or the existing index has another type.
        """
        if not (Path(folder) / CURRENT).exists():
            return cls.create(folder, kind or "xtr", encoder, options)
        opened = cls.open(folder, encoder)
        if kind not in (None, opened.kind.name):
            raise RetrievalError(f"{folder}: is of kind {opened.kind.name}, not {kind}")
        return opened

    @property
    def encoder(self) -> Any:
        """Encoder of the index, loaded on first use.

        Raises:
            RetrievalError: The encoder cannot be loaded, or is not the one that the index was created with.
        """
        return self._encoder()

    def close(self) -> None:
        """Close the files of the index."""
        self._store.close()
        self._searching.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- documents

    def __len__(self) -> int:
        """Return the number of documents, without deleted ones."""
        return self._store.refresh().manifest.count

    def __contains__(self, name: str) -> bool:
        return bool(self._selection.numbers([name]))

    def get(self, name: str) -> Document | None:
        """Return the document with an id, or None if there is none."""
        numbers = self._selection.numbers([name])
        return self._store.documents.get(list(numbers.values())).get(numbers[name]) if numbers else None

    def has(self, ids: Sequence[str]) -> set[str]:
        """Return those of ``ids`` that are in the index."""
        return set(self._selection.numbers(check_names(ids)))

    @property
    def folder(self) -> Path:
        """Folder of the index."""
        return self._store.folder

    @property
    def snapshot(self) -> Snapshot:
        """Snapshot of the latest commit."""
        return self._store.refresh()

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Return documents by internal doc id."""
        return self._store.documents.get(numbers)

    def names(self, numbers: Sequence[int]) -> list[str]:
        """Return the document ids of internal doc ids, which `search_numbers` returns."""
        documents = self._store.documents.get(numbers)
        return [documents[n].id for n in numbers if n in documents]

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all documents, in insertion order."""
        snapshot = self._store.refresh()
        for number, name in self._store.documents.ask("SELECT number, id FROM documents ORDER BY number"):
            if number < len(snapshot.live) and snapshot.live[number]:
                yield name

    def select(self, where: Filter | None = None) -> Iterator[Document]:
        """Iterate over the documents that pass a filter, or over all documents, in insertion order."""
        snapshot = self._store.refresh()
        numbers = np.flatnonzero(snapshot.live if where is None else self._selection.matching(snapshot, where))
        for begin in range(0, len(numbers), BATCH):
            part = numbers[begin : begin + BATCH].tolist()
            documents = self._store.documents.get(part)
            yield from (documents[n] for n in part if n in documents)

    def sources(self) -> dict[str, int]:
        """Return the number of documents of each source, sorted by name; documents without a source are not counted."""
        return self._selection.sources()

    def add(
        self,
        documents: Iterable[Any],
        progress: Progress | None = None,
        learn: bool = True,
        replace_sources: bool | None = None,
    ) -> int:
        """Add documents and return how many were added.

        Args:
            documents: Mappings with ``id``, ``text`` and optionally ``metadata`` and ``source``, `Document` objects, or
                the documents of files (`loaders.DocumentSource`).
            progress: Callback with the stage, the number done and the total number (None if unknown).
            learn: Whether the shared arrays may be retrained if the index has outgrown them
                (`IndexKind.needs_retraining`).
            replace_sources: Whether the documents of each source replace all that the index has of it. The documents of
                a source have to follow each other. None means True for files, and False otherwise.

        Raises:
            RetrievalError: A document is invalid, or its id is in the index already (see `upsert`). Nothing of its
                batch is added.
            LockedIndex: Another process changes the index; see ``lock_timeout`` of `open`.
            OSError: The disk is full or not writable. Earlier batches are committed.
        """
        whole = _has_whole_sources(documents) if replace_sources is None else replace_sources
        return self._changes.put(documents, progress, replace=False, skip=False, learn=learn, replace_sources=whole)

    def upsert(
        self, documents: Iterable[Any], progress: Progress | None = None, replace_sources: bool | None = None
    ) -> int:
        """Add documents, replacing those with the same ids, and return how many were added or replaced; see `add`."""
        whole = _has_whole_sources(documents) if replace_sources is None else replace_sources
        return self._changes.put(documents, progress, replace=True, skip=False, replace_sources=whole)

    def resume(self, documents: Iterable[Any], progress: Progress | None = None) -> int:
        """Add the documents whose ids are not in the index yet, and return how many were added."""
        return self._changes.put(documents, progress, replace=False, skip=True)

    def sync(
        self,
        paths: Iterable[str | Path],
        chunk_tokens: int = CHUNK_TOKENS,
        overlap: int = OVERLAP,
        number_ids: bool = False,
        skip_bad: bool = True,
        ignore: Iterable[str] = (),
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> SyncReport:
        """Make the documents of files those of the files that exist now, in one commit.

        New files are added, files with other contents are replaced, and the documents of files that no longer exist are
        deleted. Documents that were not read from a file stay. Without a difference, nothing is written.

        Args:
            paths: Files and folders. A file is known by its name relative to the folder.
            chunk_tokens: Tokens per chunk of a text.
            overlap: Tokens that consecutive chunks share.
            number_ids: Whether records without an id get an id from their file name and record number.
            skip_bad: Whether files that cannot be read are skipped. The documents of their earlier versions stay.
            ignore: Patterns of files to ignore in folders, as in ``.gitignore``.
            dry_run: Whether the differences are returned without a change of the index.
            progress: Callback for the progress; see `add`.

        Raises:
            RetrievalError: A path does not exist, there is no file in a known format, or a document is invalid, or its
                id belongs to a document from elsewhere. The index is unchanged.
            LockedIndex: Another process changes the index; see ``lock_timeout`` of `open`.
        """
        from .loaders import Chunker, DocumentSource

        paths = list(paths)
        if "-" in paths:
            raise RetrievalError("standard input is not a file that can be compared; use add")
        chunk = Chunker(lambda: self.encoder, chunk_tokens, overlap)
        return self._changes.sync(DocumentSource(paths, chunk, number_ids, skip_bad, ignore), dry_run, progress)

    def delete(self, ids: Sequence[str] = (), where: Filter | None = None) -> int:
        """Delete documents by id, and all that pass a filter; return how many were deleted.

        Unknown ids are ignored.
        """
        return self._changes.delete(ids, where)

    def compact(self, retrain: bool = False, progress: Progress | None = None) -> None:
        """Rewrite the index as one segment without deleted documents, and remove their texts.

        Args:
            retrain: Whether all documents are encoded again and the shared arrays are retrained; useful if the index
                has grown far beyond its first documents.
            progress: Callback for the progress of encoding; see `add`.
        """
        self._changes.compact(retrain, progress)

    def configure(self, **settings: Any) -> None:
        """Change the search settings of the index.

        Raises:
            RetrievalError: A setting is unknown, or its value is invalid.
        """
        with self._store.writer() as writer:
            self._searching.settings(self._store.snapshot, settings)
            writer.commit(Change(settings={**self._store.snapshot.manifest.settings, **settings}))

    # ----------------------------------------------------------------------------------------------------- search

    def search(self, query: str, k: int = 10, where: Filter | None = None, **settings: Any) -> list[Hit]:
        """Return the best documents for a query.

        Args:
            query: Query text.
            k: Maximum number of hits.
            where: Metadata filter, for example ``year >= 2020 AND lang in (en, de)``; see `filters`.
            settings: Search settings that override those of the index.

        Raises:
            RetrievalError: The filter or a setting is invalid.
        """
        return self.search_many([query], k, where, **settings)[0]

    def search_many(
        self, queries: Sequence[str], k: int = 10, where: Filter | None = None, **settings: Any
    ) -> list[list[Hit]]:
        """Search for several queries, which are encoded as a batch; see `search`."""
        snapshot = self._store.refresh()
        results = self.search_numbers(queries, k, where, snapshot, **settings)
        documents = self._store.documents.get(list({int(n) for numbers, _ in results for n in numbers}))
        return [_hits(query, *pair, documents) for query, pair in zip(queries, results, strict=True)]

    def search_numbers(
        self,
        queries: Sequence[str],
        k: int,
        where: Filter | None = None,
        snapshot: Snapshot | None = None,
        **settings: Any,
    ) -> list[Ranked]:
        """Return the internal doc ids and scores of the hits of each query, without reading the documents."""
        return self._searching.ranked(queries, k, where, snapshot or self._store.refresh(), settings)

    def explain(self, query: str, name: str, **settings: Any) -> list[Any]:
        """Return the parts of a document's score: a list of `plugins.contracts.ScoreExplanation`.

        Raises:
            RetrievalError: There is no document with this id.
        """
        snapshot = self._store.refresh()
        numbers = self._selection.numbers([name])
        if not numbers:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        text = self._store.documents.get([numbers[name]])[numbers[name]].text
        search_settings = self._searching.settings(snapshot, settings)
        allow = self._selection.allow(snapshot, None)
        return self.kind.explain(
            self._searching.searcher(snapshot), self.encoder, query, text, numbers[name], search_settings, allow
        )

    def term_weights(self, query: str, name: str, **settings: Any) -> Any:
        """Return the term weights of a query and a document: a `plugins.contracts.TermWeights`.

        The result is None if the index type has no terms.

        Raises:
            RetrievalError: There is no document with this id.
        """
        document = self.get(name)
        if document is None:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        return self.kind.term_weights(self.encoder, query, document.text, self.settings(**settings))

    def settings(self, **changes: Any) -> Any:
        """Return the search settings of the index with ``changes`` applied.

        Raises:
            RetrievalError: A setting is unknown, or its value is invalid.
        """
        return self._searching.settings(self._store.refresh(), changes)

    def searcher(self) -> Any:
        """Return the searcher for the latest commit; its class depends on the index type."""
        return self._searching.searcher(self._store.refresh())

    def count(self, where: Filter | None) -> int:
        """Return the number of documents that pass a filter, or of all documents if it is None."""
        return len(self) if where is None else int(self._selection.matching(self._store.refresh(), where).sum())

    def search_encoded(self, query: Any, text: str, k: int, where: Filter | None, settings: Any) -> list[Hit]:
        """Return the best documents for an encoded query, without widening the search (`IndexKind.wider`)."""
        numbers, scores = self._searching.encoded(query, k, where, settings, self._store.refresh())
        return _hits(text, numbers, scores, self._store.documents.get(numbers.tolist()))

    # ------------------------------------------------------------------------------------------------- maintenance

    def check(self) -> None:
        """Read all files and compare their checksums.

        Raises:
            DamagedIndex: A file differs from what was written.
        """
        about = self._store.check()
        if about.segments:
            self._searching.searcher(self._store.snapshot)

    def stats(self) -> dict[str, Any]:
        """Return the contents and sizes of the index."""
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


def _has_whole_sources(documents: Iterable[Any]) -> bool:
    """Return whether documents come from files that are read as a whole, as those of `loaders.DocumentSource`."""
    return bool(getattr(documents, "whole_sources", False))


def _hits(
    query: str, numbers: NDArray[np.int32], scores: NDArray[np.float32], documents: Mapping[int, Document]
) -> list[Hit]:
    """Build the hits of those documents that still exist."""
    return [
        Hit(d.id, float(score), d.text, d.metadata, snippets.best_snippet(d.text, query), d.source)
        for n, score in zip(numbers.tolist(), scores, strict=True)
        if (d := documents.get(n)) is not None
    ]
