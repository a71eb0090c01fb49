"""Changes to an index: add, replace and delete documents, merge segments, retrain shared arrays.

Each change is one atomic commit.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .document_filter import DocumentFilter, Filter
from .errors import RetrievalError
from .registry import LazyEncoder
from .store import Change, Snapshot, Store, Writer
from .store.documents import Document
from .validation import BATCH, as_document, check_names, document_batches

MAX_DELETED_SHARE = 0.2  # a segment with a larger share of deleted documents is rewritten
MAX_SMALL_SEGMENTS, SMALL_SEGMENT = 8, 50_000  # more than 8 segments with fewer than 50,000 documents are merged

Progress = Callable[[str, int, int | None], None]  # stage, number done, total number (None if unknown)


class IndexWriter:
    """Writer of one index; the lock of the store admits one writer at a time."""

    def __init__(self, store: Store, kind: Any, encoder: LazyEncoder, selection: DocumentFilter) -> None:
        self._store, self._kind, self._encoder, self._selection = store, kind, encoder, selection

    def put(
        self, documents: Iterable[Any], progress: Progress | None, replace: bool, skip: bool, learn: bool = True
    ) -> int:
        """Add documents and return how many were added.

        Args:
            documents: Documents in the form that `Index.add` accepts.
            progress: Callback for the progress; see `Index.add`.
            replace: Whether documents with the same ids are replaced.
            skip: Whether documents whose ids are in the index are skipped.
            learn: Whether the shared arrays may be retrained; see `Index.add`.

        Raises:
            RetrievalError: A document is invalid, or its id is in the index and is neither replaced nor skipped.
        """
        on_progress = progress or (lambda *_: None)
        total = len(documents) if isinstance(documents, Sequence) else getattr(documents, "estimate", None)
        added = 0
        with self._store.writer() as writer:
            for incoming in document_batches(map(as_document, documents), unique=not (replace or skip)):
                existing = self._selection.numbers([d.id for d in incoming])
                if existing and not (replace or skip):
                    raise RetrievalError(f"document {next(iter(existing))!r} is in the index already; use upsert")
                batch = [d for d in incoming if not (skip and d.id in existing)]
                if batch:
                    replaced = list(existing.values()) if replace else []
                    self._commit(writer, batch, replaced, on_progress, added, total, learn)
                added += len(batch)
            self._merge(writer)
        return added

    def _commit(
        self,
        writer: Writer,
        batch: list[Document],
        dead: list[int],
        on_progress: Progress,
        before: int,
        total: int | None,
        learn: bool,
    ) -> None:
        """Encode a batch and commit it."""
        snapshot = self._store.snapshot
        first, shared = snapshot.manifest.next_document, snapshot.shared
        numbers, texts, replaced = np.arange(first, first + len(batch)), [d.text for d in batch], []
        if learn and shared and self._kind.needs_retraining(shared, snapshot.manifest.count + len(batch)):
            shared, replaced = {}, [s.about.number for s in snapshot.segments]
            staying = snapshot.live.copy()
            staying[dead] = False
            old = self._store.documents.get(np.flatnonzero(staying).tolist())
            numbers = np.concatenate([np.array(sorted(old), np.int64), numbers])
            texts = [*(old[n].text for n in sorted(old)), *texts]
        done = before - (len(texts) - len(batch))  # documents that are encoded again do not count as new

        def count(encoded: int) -> None:
            nonlocal done
            done += encoded
            on_progress("encoding", max(done, before), total)

        on_progress("encoding", before, total)
        encoded = self._encoder().encode_documents(texts, count)
        on_progress("indexing", before + len(batch), total)
        trained = {} if shared else self._kind.train(encoded, max(total or 0, len(encoded)))
        rows, arrays = self._kind.segment(encoded, numbers, shared or trained)
        writer.commit(Change(batch, dead, [(len(numbers), rows, arrays)], replaces=replaced, shared=trained or None))

    def delete(self, ids: Sequence[str], where: Filter | None) -> int:
        """Delete documents; see `Index.delete`."""
        with self._store.writer() as writer:
            dead = set(self._selection.numbers(check_names(ids)).values())
            if where is not None:
                dead |= set(np.flatnonzero(self._selection.matching(self._store.snapshot, where)).tolist())
            if dead:
                writer.commit(Change(dead=sorted(dead)))
                self._merge(writer)
            return len(dead)

    def compact(self, retrain: bool, progress: Progress | None) -> None:
        """Compact the index; see `Index.compact`."""
        with self._store.writer() as writer:
            if retrain and self._store.refresh().manifest.count:
                self._retrain(writer, progress or (lambda *_: None))
            self._merge(writer, [s.number for s in self._store.snapshot.manifest.segments])
            live = self._store.snapshot.live
            rows = self._store.documents.ask("SELECT number FROM documents")
            self._store.documents.drop(n for (n,) in rows if not live[n])

    def _retrain(self, writer: Writer, on_progress: Progress) -> None:
        """Encode all documents again in batches; the shared arrays are trained on the first batch."""
        snapshot = self._store.snapshot
        numbers = np.flatnonzero(snapshot.live)
        shared: Any = {}
        segments = []
        for begin in range(0, len(numbers), BATCH):
            part = numbers[begin : begin + BATCH]
            texts = self._store.documents.get(part.tolist())
            encoded = self._encoder().encode_documents([texts[int(n)].text for n in part])
            on_progress("encoding", begin + len(part), len(numbers))
            shared = shared or self._kind.train(encoded, len(numbers))
            segments.append((len(part), *self._kind.segment(encoded, part, shared)))
        replaced = [s.about.number for s in snapshot.segments]
        writer.commit(Change(segments=segments, replaces=replaced, shared=shared))

    def _merge(self, writer: Writer, chosen: Sequence[int] | None = None) -> None:
        """Merge the ``chosen`` segments, or by default those with many deleted documents and many small ones."""
        snapshot = self._store.snapshot
        dead = {s.about.number: self._dead(s, snapshot) for s in snapshot.segments}
        if chosen is None:
            chosen = [
                s.about.number
                for s in snapshot.segments
                if dead[s.about.number] > MAX_DELETED_SHARE * s.about.documents
            ]
            small = [s.about.number for s in snapshot.segments if s.about.documents < SMALL_SEGMENT]
            if len(small) > MAX_SMALL_SEGMENTS:
                chosen = sorted({*chosen, *small})
        segments = [s for s in snapshot.segments if s.about.number in set(chosen)]
        if not segments:
            return
        rows, arrays = self._kind.merge([s.arrays for s in segments], snapshot.live)
        alive = sum(s.about.documents - dead[s.about.number] for s in segments)
        new = [(alive, rows, arrays)] if alive else []
        writer.commit(Change(segments=new, replaces=[s.about.number for s in segments]))

    @staticmethod
    def _dead(segment: Any, snapshot: Snapshot) -> int:
        """Return the number of documents of a segment that were deleted since it was written."""
        if snapshot.manifest.count == len(snapshot.live):
            return 0
        present = np.zeros(len(snapshot.live), np.bool_)
        present[segment.arrays["documents"]] = True
        return int((present & ~snapshot.live).sum())
