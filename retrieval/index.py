"""An index of documents: add, replace, delete, search, explain; safe against crashes, readable while it is written.

from pilotfish.retrieval import Index

index = Index.create("my-index")
index.add([{"id": "a", "text": "Pilot fish travel with sharks."}])
for hit in index.search("which fish follow sharks?", k=5):
    print(hit.id, hit.score, hit.snippet)
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import filters, snippets
from .errors import DamagedIndex, RetrievalError
from .incoming import BATCH, as_document, batches, check_names, check_text
from .kinds import encoder_of, from_anywhere, kind_of
from .ranking import found_by
from .store import Change, Snapshot, Store, Writer
from .store.documents import Document
from .store.manifest import CURRENT

DEAD = 0.2  # of a segment's documents: it is written anew
SMALL, SMALLEST = 8, 50_000  # so many segments with fewer documents are merged
FILTERS = 64  # filters whose documents are remembered

Filter = str | filters.Filter
Progress = Callable[[str, int, int | None], None]  # stage, done, of how many


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
        self._store, self.kind, self._load = store, kind, load
        self._mutex = threading.Lock()  # of what is made for a snapshot
        self._ready: tuple[int, Any] | None = None
        self._allowed: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()

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
        made, parsed = kind_of(kind, options or {})
        name = from_anywhere(encoder) if encoder and encoder != made.default_encoder else made.default_encoder
        loaded = encoder_of(made, name, device, precision)
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
        made, _ = kind_of(about.kind, about.options)
        name = encoder or about.encoder["name"]

        def load() -> Any:
            loaded = encoder_of(made, name, device, precision)
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

    @functools.cached_property
    def encoder(self) -> Any:
        """The encoder.

        Raises:
            RetrievalError: it is not there, or not the one that the index was made with.
        """
        return self._load()

    def close(self) -> None:
        """Let go of files."""
        self._store.close()
        self._ready = None

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- documents

    def __len__(self) -> int:
        """Documents that can be found."""
        return self._store.refresh().manifest.count

    def __contains__(self, name: str) -> bool:
        return bool(self._numbers([name]))

    def get(self, name: str) -> Document | None:
        """A document by its id; None where there is none."""
        numbers = self._numbers([name])
        return self._store.documents.get(list(numbers.values())).get(numbers[name]) if numbers else None

    def has(self, ids: Sequence[str]) -> set[str]:
        """Those of ``ids`` that are there."""
        return set(self._numbers(check_names(ids)))

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
        numbers = np.flatnonzero(snapshot.live if where is None else self._passing(snapshot, where))
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
        return self._put(documents, progress, replace=False, skip=False, learn=learn)

    def upsert(self, documents: Iterable[Any], progress: Progress | None = None) -> int:
        """Add documents, in the place of those with the same ids; returns how many."""
        return self._put(documents, progress, replace=True, skip=False)

    def resume(self, documents: Iterable[Any], progress: Progress | None = None) -> int:
        """Add those documents whose ids are not there yet; returns how many."""
        return self._put(documents, progress, replace=False, skip=True)

    def delete(self, ids: Sequence[str] = (), where: Filter | None = None) -> int:
        """Delete documents by their ids, or all that pass a filter; returns how many. Unknown ids are passed over."""
        with self._store.writer() as writer:
            dead = set(self._numbers(check_names(ids)).values())
            if where is not None:
                dead |= set(np.flatnonzero(self._passing(self._store.snapshot, where)).tolist())
            if dead:
                writer.commit(Change(dead=sorted(dead)))
                self._merge(writer)
            return len(dead)

    def compact(self, relearn: bool = False, progress: Progress | None = None) -> None:
        """Write everything anew in one segment, without what was deleted, and forget deleted documents' text.

        Args:
            relearn: Encode all documents again, and learn from them what all segments share: for an index that has
                grown far beyond its first documents.
            progress: Is told how far encoding is.
        """
        with self._store.writer() as writer:
            if relearn and len(self):
                self._relearn(writer, progress or (lambda *_: None))
            self._merge(writer, [s.number for s in self._store.snapshot.manifest.segments])
            live = self._store.snapshot.live
            rows = self._store.documents.ask("SELECT number FROM documents")
            self._store.documents.drop(n for (n,) in rows if not live[n])

    def configure(self, **settings: Any) -> None:
        """Change how the index is searched from now on.

        Raises:
            RetrievalError: there is no such setting, or not such a value.
        """
        with self._store.writer() as writer:
            kept = {**self._store.snapshot.manifest.settings, **settings}
            self._settings(kept)
            writer.commit(Change(settings=kept))

    def _put(
        self, documents: Iterable[Any], progress: Progress | None, replace: bool, skip: bool, learn: bool = True
    ) -> int:
        told = progress or (lambda *_: None)
        total = len(documents) if isinstance(documents, Sequence) else getattr(documents, "estimate", None)
        added = 0
        with self._store.writer() as writer:
            for given in batches(map(as_document, documents), unique=not (replace or skip)):
                there = self._numbers([d.id for d in given])
                if there and not (replace or skip):
                    raise RetrievalError(f"document {next(iter(there))!r} is in the index already; use upsert")
                batch = [d for d in given if not (skip and d.id in there)]
                if batch:
                    self._commit(writer, batch, list(there.values()) if replace else [], told, added, total, learn)
                added += len(batch)
            self._merge(writer)
        return added

    def _commit(
        self,
        writer: Writer,
        batch: list[Document],
        dead: list[int],
        told: Progress,
        before: int,
        total: int | None,
        learn: bool,
    ) -> None:
        """Encode a batch and make it last."""
        snapshot = self._store.snapshot
        first, shared = snapshot.manifest.next_document, snapshot.shared
        numbers, texts, replaced = np.arange(first, first + len(batch)), [d.text for d in batch], []
        if learn and shared and self.kind.outgrown(shared, snapshot.manifest.count + len(batch)):
            shared, replaced = {}, [s.about.number for s in snapshot.segments]
            staying = snapshot.live.copy()
            staying[dead] = False
            old = self._store.documents.get(np.flatnonzero(staying).tolist())
            numbers = np.concatenate([np.array(sorted(old), np.int64), numbers])
            texts = [*(old[n].text for n in sorted(old)), *texts]
        done = before - (len(texts) - len(batch))  # those that are encoded again are none of the new ones

        def count(encoded: int) -> None:
            nonlocal done
            done += encoded
            told("encoding", max(done, before), total)

        told("encoding", before, total)
        encoded = self.encoder.encode_documents(texts, count)
        told("indexing", before + len(batch), total)
        trained = {} if shared else self.kind.train(encoded, max(total or 0, len(encoded)))
        rows, arrays = self.kind.segment(encoded, numbers, shared or trained)
        writer.commit(Change(batch, dead, [(len(numbers), rows, arrays)], replaces=replaced, shared=trained or None))

    def _relearn(self, writer: Writer, told: Progress) -> None:
        """Encode everything, part by part, for new shared arrays from the first part."""
        snapshot = self._store.snapshot
        numbers = np.flatnonzero(snapshot.live)
        shared: Any = {}
        segments = []
        for begin in range(0, len(numbers), BATCH):
            part = numbers[begin : begin + BATCH]
            texts = self._store.documents.get(part.tolist())
            encoded = self.encoder.encode_documents([texts[int(n)].text for n in part])
            told("encoding", begin + len(part), len(numbers))
            shared = shared or self.kind.train(encoded, len(numbers))
            segments.append((len(part), *self.kind.segment(encoded, part, shared)))
        replaced = [s.about.number for s in snapshot.segments]
        writer.commit(Change(segments=segments, replaces=replaced, shared=shared))

    def _merge(self, writer: Writer, chosen: Sequence[int] | None = None) -> None:
        """Merge ``chosen`` segments; without, those with many dead documents, and many small ones."""
        snapshot = self._store.snapshot
        dead = {s.about.number: self._dead(s, snapshot) for s in snapshot.segments}
        if chosen is None:
            chosen = [s.about.number for s in snapshot.segments if dead[s.about.number] > DEAD * s.about.documents]
            small = [s.about.number for s in snapshot.segments if s.about.documents < SMALLEST]
            if len(small) > SMALL:
                chosen = sorted({*chosen, *small})
        segments = [s for s in snapshot.segments if s.about.number in set(chosen)]
        if not segments:
            return
        rows, arrays = self.kind.merge([s.arrays for s in segments], snapshot.live)
        alive = sum(s.about.documents - dead[s.about.number] for s in segments)
        new = [(alive, rows, arrays)] if alive else []
        writer.commit(Change(segments=new, replaces=[s.about.number for s in segments]))

    @staticmethod
    def _dead(segment: Any, snapshot: Snapshot) -> int:
        """Documents of a segment that were deleted since it was made."""
        if snapshot.manifest.count == len(snapshot.live):
            return 0
        present = np.zeros(len(snapshot.live), np.bool_)
        present[segment.arrays["documents"]] = True
        return int((present & ~snapshot.live).sum())

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
    ) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Internal numbers and scores of hits; what `search_many` does without looking at documents."""
        if not isinstance(k, int) or k < 1:
            raise RetrievalError(f"k: expected a whole number of 1 or more, got {k!r}")
        if isinstance(queries, str):
            raise RetrievalError("queries: expected a list, got a text; see search")
        for query in queries:
            check_text("query", query)
        snapshot = snapshot or self._store.refresh()
        chosen = self._settings({**snapshot.manifest.settings, **settings})
        allow = self._allow(snapshot, where)
        if not queries:
            return []
        encoded = self.kind.queries(self.encoder, list(queries), chosen)
        if not snapshot.segments or (allow is not None and not allow.any()):
            nothing = np.empty(0, np.int32), np.empty(0, np.float32)
            return [nothing] * len(queries)
        searcher = self._searcher(snapshot)
        possible = min(k, snapshot.manifest.count if where is None else int(np.unpackbits(allow).sum()))  # type: ignore[arg-type]
        again = self.kind.rescored(chosen)
        possible = min(max(k, again), possible) if again else possible
        found = [
            found_by(self.kind, searcher, encoded[i], max(k, again), chosen, possible, allow)
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
        anew = self.kind.rescore(self.encoder, query, [documents[n].text for n in there.tolist()], settings)
        order = np.argsort(-anew, kind="stable")
        return np.concatenate([there[order], numbers[count:]]), np.concatenate([anew[order], scores[count:]])

    def explain(self, query: str, name: str, **settings: Any) -> list[Any]:
        """Why a document has its score: a list of `plugins.contracts.Reason`.

        Raises:
            RetrievalError: there is no such document.
        """
        snapshot = self._store.refresh()
        numbers = self._numbers([name])
        if not numbers:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        text = self._store.documents.get([numbers[name]])[numbers[name]].text
        chosen = self._settings({**snapshot.manifest.settings, **settings})
        allow = self._allow(snapshot, None)
        return self.kind.explain(self._searcher(snapshot), self.encoder, query, text, numbers[name], chosen, allow)

    def reading(self, query: str, name: str, **settings: Any) -> Any:
        """A query and a document in weighted words: a `plugins.contracts.Reading`; None of a kind that has none.

        Raises:
            RetrievalError: there is no such document.
        """
        document = self.get(name)
        if document is None:
            raise RetrievalError(f"{self._store.folder}: there is no document {name!r}")
        return self.kind.reading(self.encoder, query, document.text, self.settings(**settings))

    def settings(self, **changes: Any) -> Any:
        """How the index is searched, with these changes.

        Raises:
            RetrievalError: there is no such setting, or not such a value.
        """
        return self._settings({**self._store.refresh().manifest.settings, **changes})

    def searcher(self) -> Any:
        """What the index's kind searches of the latest commit."""
        return self._searcher(self._store.refresh())

    def count(self, where: Filter | None) -> int:
        """Documents that pass a filter; None for all."""
        return len(self) if where is None else int(self._passing(self._store.refresh(), where).sum())

    def search_encoded(self, query: Any, text: str, k: int, where: Filter | None, settings: Any) -> list[Hit]:
        """The best documents for a query that is encoded already, by these settings and no wider ones."""
        snapshot = self._store.refresh()
        allow = self._allow(snapshot, where)
        if not snapshot.segments or (allow is not None and not allow.any()):
            return []
        numbers, scores = self.kind.search(self._searcher(snapshot), query, k, settings, allow)
        documents = self._store.documents.get(numbers.tolist())
        return _hits(text, numbers, scores, documents)

    def _searcher(self, snapshot: Snapshot) -> Any:
        with self._mutex:
            if self._ready is None or self._ready[0] != snapshot.manifest.number:
                arrays = [s.arrays for s in snapshot.segments]
                try:
                    made = self.kind.searcher(snapshot.shared, arrays, len(snapshot.live))
                except (ValueError, KeyError, IndexError) as error:
                    self._store.check()  # which names the file, where one was damaged
                    raise DamagedIndex(f"{self._store.folder}: arrays do not fit each other ({error})") from None
                self._ready = snapshot.manifest.number, made
            return self._ready[1]

    def _allow(self, snapshot: Snapshot, where: Filter | None) -> NDArray[np.uint8] | None:
        """A bit for each document that may be found; None for all."""
        if where is None:
            return None if snapshot.manifest.count == len(snapshot.live) else snapshot.bits
        return np.packbits(self._passing(snapshot, where), bitorder="little")

    def _passing(self, snapshot: Snapshot, where: Filter) -> NDArray[np.bool_]:
        """[documents] which pass a filter and are live."""
        condition = filters.parse(where) if isinstance(where, str) else where
        if not isinstance(condition, filters.Filter):
            raise RetrievalError(f"filter: expected text or a filter, got {type(where).__name__}")
        text, values = filters.to_sql(condition)
        # Python takes 1 and true for equal, filters do not.
        key = text, tuple((type(v), v) for v in values), snapshot.manifest.number
        with self._mutex:
            if (known := self._allowed.get(key)) is not None:
                return known
        found = np.zeros(len(snapshot.live), np.bool_)
        rows = self._store.documents.ask(f"SELECT number FROM documents WHERE {text}", values)  # marks only
        numbers = np.array([n for (n,) in rows], np.int64)
        found[numbers[numbers < len(found)]] = True
        found &= snapshot.live
        with self._mutex:
            self._allowed[key] = found
            while len(self._allowed) > FILTERS:
                self._allowed.popitem(last=False)
        return found

    def _settings(self, values: Mapping[str, Any]) -> Any:
        from ..plugins.config import ConfigError, build_options

        try:
            return build_options(self.kind.Settings, values, f"{self.kind.name} setting")
        except ConfigError as error:
            raise RetrievalError(str(error)) from None

    # ------------------------------------------------------------------------------------------------------ upkeep

    def check(self) -> None:
        """Read everything and compare checksums.

        Raises:
            DamagedIndex: a file is not what was written.
        """
        about = self._store.check()
        if about.segments:
            self._searcher(self._store.snapshot)

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
            "settings": asdict(self._settings(about.settings)),
        }

    def _numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """Internal numbers of those ids that are there."""
        for name in ids:
            check_text("id", name)
        live = self._store.refresh().live
        return {name: n for name, n in self._store.documents.numbers_of(ids) if n < len(live) and live[n]}


def _hits(
    query: str, numbers: NDArray[np.int32], scores: NDArray[np.float32], documents: Mapping[int, Document]
) -> list[Hit]:
    """Hits of the documents that are still there."""
    return [
        Hit(d.id, float(score), d.text, d.metadata, snippets.best(d.text, query))
        for n, score in zip(numbers.tolist(), scores, strict=True)
        if (d := documents.get(n)) is not None
    ]
