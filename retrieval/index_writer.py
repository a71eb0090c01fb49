"""Changes to an index: add, replace and delete documents, merge segments, retrain shared arrays.

Each change is one atomic commit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .document_filter import DocumentFilter, Filter
from .errors import RetrievalError
from .registry import LazyEncoder
from .store import Change, Segment, Store, Writer
from .store.documents import Document
from .sync import SyncPlan, SyncReport, plan_sync
from .validation import BATCH, as_document, check_names, document_batches

if TYPE_CHECKING:
    from .loaders import DocumentSource

MAX_DELETED_SHARE = 0.2  # a segment with a larger share of deleted documents is rewritten
MAX_SMALL_SEGMENTS, SMALL_SEGMENT = 8, 50_000  # more than 8 segments with fewer than 50,000 documents are merged

Progress = Callable[[str, int, int | None], None]  # stage, number done, total number (None if unknown)


class IndexWriter:
    """Writer of one index; the lock of the store admits one writer at a time."""

    def __init__(self, store: Store, kind: Any, encoder: LazyEncoder, selection: DocumentFilter) -> None:
        self._store, self._kind, self._encoder, self._selection = store, kind, encoder, selection

    def put(
        self,
        documents: Iterable[Any],
        progress: Progress | None,
        replace: bool,
        skip: bool,
        learn: bool = True,
        replace_sources: bool = False,
    ) -> int:
        """Add documents and return how many were added.

        Args:
            documents: Documents in the form that `Index.add` accepts.
            progress: Callback for the progress; see `Index.add`.
            replace: Whether documents with the same ids are replaced.
            skip: Whether documents whose ids are in the index are skipped.
            learn: Whether the shared arrays may be retrained; see `Index.add`.
            replace_sources: Whether the documents of each source replace all that the index has of it. The documents of
                a source have to follow each other.

        Raises:
            RetrievalError: A document is invalid, or its id is in the index and is neither replaced nor skipped.
        """
        on_progress = progress or (lambda *_: None)
        total = len(documents) if isinstance(documents, Sequence) else getattr(documents, "estimate", None)
        added = 0
        replaced_sources, resumed = set[str](), set[str | None]()
        with self._store.writer() as writer:
            for incoming in document_batches(map(as_document, documents), unique=not (replace or skip)):
                sources = {d.source for d in incoming if d.source is not None} if replace_sources else set()
                dead = set(self._selection.numbers_of_sources(sources - replaced_sources))
                replaced_sources |= sources
                if skip:  # documents that the interrupted build added, and whose file has changed since
                    dead |= set(self._selection.outdated([d for d in incoming if d.source not in resumed]))
                    resumed |= {d.source for d in incoming}
                existing = self._selection.numbers([d.id for d in incoming])
                if not (replace or skip):
                    self._check_new({name: n for name, n in existing.items() if n not in dead})
                present = {name for name, n in existing.items() if n not in dead}
                batch = [d for d in incoming if not (skip and d.id in present)]
                dead |= set(existing.values()) if replace else set()
                if batch:
                    self._write(writer, batch, sorted(dead), on_progress, added, total, learn)
                added += len(batch)
            self._merge(writer)
        return added

    def sync(self, source: "DocumentSource", dry_run: bool, progress: Progress | None) -> SyncReport:
        """Synchronize the index with files in one commit; see `Index.sync`."""
        if dry_run:
            return self._plan(source)[0].report
        with self._store.writer() as writer:
            plan, dead = self._plan(source)
            if dead or plan.documents:
                on_progress = progress or (lambda *_: None)
                self._write(writer, plan.documents, dead, on_progress, 0, len(plan.documents), merge=True)
            return plan.report

    def _plan(self, source: "DocumentSource") -> tuple[SyncPlan, list[int]]:
        """Return the plan of a synchronization, and the internal doc ids of the documents to delete."""
        plan = plan_sync(self._selection.digests(), source)
        dead = self._selection.numbers_of_sources(plan.outdated)
        others = self._selection.numbers([d.id for d in plan.documents])
        self._check_new({name: n for name, n in others.items() if n not in set(dead)})
        return plan.with_removed(len(dead)), dead

    def _check_new(self, existing: Mapping[str, int]) -> None:
        """Check that there is no existing document with the id of a new one.

        Raises:
            RetrievalError: There is one; the message names its source.
        """
        if not existing:
            return
        name, number = next(iter(existing.items()))
        source = self._store.documents.get([number])[number].source
        place = "" if source is None else f", from {source}"
        raise RetrievalError(f"document {name!r} is in the index already{place}; use upsert, or another id")

    def _write(
        self,
        writer: Writer,
        documents: list[Document],
        dead: list[int],
        on_progress: Progress,
        before: int,
        total: int | None,
        learn: bool = True,
        merge: bool = False,
    ) -> None:
        """Encode documents, and commit them and the deletion of others at once.

        Args:
            writer: Writer of the index.
            documents: Documents to add.
            dead: Internal doc ids of documents to delete.
            on_progress: Callback for the progress.
            before: Number of documents that this call of `Index.add` has committed before.
            total: Number of documents that it will commit, or None if unknown.
            learn: Whether the shared arrays may be retrained, for which all documents are encoded again.
            merge: Whether small segments are merged in the same commit.
        """
        snapshot = self._store.snapshot
        first, shared = snapshot.manifest.next_document, snapshot.shared
        live = np.concatenate([snapshot.live, np.ones(len(documents), np.bool_)])
        live[np.asarray(dead, np.int64)] = False
        numbers, size, replaced = np.arange(first, first + len(documents)), BATCH, set[int]()
        if learn and shared and documents and self._kind.needs_retraining(shared, int(live.sum())):
            numbers, shared = np.flatnonzero(live), {}
            size, replaced = len(numbers), {s.about.number for s in snapshot.segments}
        done = before - (len(numbers) - len(documents))  # documents that are encoded again do not count as new

        def count(encoded: int) -> None:
            nonlocal done
            done += encoded
            on_progress("encoding", max(done, before), total)

        on_progress("encoding", before, total)
        trained: Mapping[str, Any] | None = None
        segments: list[tuple[int, int, Any]] = []
        for begin in range(0, len(numbers), size):
            part = numbers[begin : begin + size]
            old = self._store.documents.get(part[part < first].tolist())
            texts = [old[n].text if n < first else documents[n - first].text for n in part.tolist()]
            encoded = self._encoder().encode_documents(texts, count)
            if not shared:
                shared = trained = self._kind.train(encoded, max(total or 0, len(numbers)))
            segments.append((len(part), *self._kind.segment(encoded, part, shared)))
        on_progress("indexing", before + len(documents), total)
        if merge:
            staying = [s for s in snapshot.segments if s.about.number not in replaced]
            segments, merged = self._merged(staying, segments, live)
            replaced |= merged
        writer.commit(Change(documents, dead, segments, replaces=sorted(replaced), shared=trained))

    def _merged(
        self, old: Sequence[Segment], new: list[tuple[int, int, Any]], live: NDArray[np.bool_]
    ) -> tuple[list[tuple[int, int, Any]], set[int]]:
        """Merge segments that are small or have many deleted documents.

        Returns:
            The segments to write, and the numbers of the old segments that they replace.
        """
        chosen = _to_merge(old, live, len(new))
        if not chosen:
            return new, set()
        arrays = [s.arrays for s in old if s.about.number in chosen] + [arrays for _, _, arrays in new]
        rows, merged = self._kind.merge(arrays, live)
        alive = sum(s.about.documents - _num_deleted(s, live) for s in old if s.about.number in chosen)
        alive += sum(count for count, _, _ in new)
        return ([(alive, rows, merged)] if alive else []), chosen

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

    def _merge(self, writer: Writer, chosen: Iterable[int] | None = None) -> None:
        """Merge the ``chosen`` segments, or by default those with many deleted documents and many small ones."""
        snapshot = self._store.snapshot
        numbers = _to_merge(snapshot.segments, snapshot.live) if chosen is None else set(chosen)
        segments = [s for s in snapshot.segments if s.about.number in numbers]
        if not segments:
            return
        rows, arrays = self._kind.merge([s.arrays for s in segments], snapshot.live)
        alive = sum(s.about.documents - _num_deleted(s, snapshot.live) for s in segments)
        new = [(alive, rows, arrays)] if alive else []
        writer.commit(Change(segments=new, replaces=[s.about.number for s in segments]))


def _to_merge(segments: Sequence[Segment], live: NDArray[np.bool_], new: int = 0) -> set[int]:
    """Return the numbers of the segments to merge; ``new`` small segments will be added."""
    chosen = {s.about.number for s in segments if _num_deleted(s, live) > MAX_DELETED_SHARE * s.about.documents}
    small = {s.about.number for s in segments if s.about.documents < SMALL_SEGMENT}
    return chosen | small if len(small) + new > MAX_SMALL_SEGMENTS else chosen


def _num_deleted(segment: Segment, live: NDArray[np.bool_]) -> int:
    """Return the number of documents of a segment that were deleted since it was written."""
    if live.all():
        return 0
    present = np.zeros(len(live), np.bool_)
    present[segment.arrays["documents"]] = True
    return int((present & ~live).sum())
