"""Folder of an index: snapshots for readers, one writer, atomic commits.

    CURRENT, manifest-N.json    see `manifest`
    shared-*.npy                shared arrays (trained quantiser state): centroids, codec
    segment-*.npy               inverted lists; mapped into memory
    live-N.npy                  bitmap of the documents that are not deleted
    documents.db                ids, texts and metadata; see `documents`
    write.lock, write.pid       lock that the writer holds, and its process id; see `lock`

Readers pin a snapshot: its files are mapped into memory, so a later commit may remove them. Remains of a crash (files
and rows that belong to no manifest) have no effect and are removed by the next writer.
"""

import contextlib
import os
import threading
import tokenize
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilotfish._internal import atomic_write

from ..defaults import LOCK_TIMEOUT
from ..errors import DamagedIndex, RetrievalError, first_line, read_errors
from . import manifest
from .documents import Document, Documents
from .lock import write_lock
from .manifest import ArrayFile, Manifest, SegmentFiles

ATTEMPTS = 20  # attempts to open a commit while a writer replaces it
Arrays = Mapping[str, NDArray]


@dataclass(frozen=True)
class Segment:
    """Open segment: its entry in the manifest, and its arrays."""

    about: SegmentFiles
    arrays: Arrays


@dataclass(frozen=True)
class Snapshot:
    """Open state of an index at one commit.

    Attributes:
        manifest: Manifest of the commit.
        shared: Shared arrays (trained quantiser state) by name.
        segments: Open segments.
        live: [documents] bool, whether the document with this internal doc id is not deleted.
        bits: [ceil(documents / 8)] uint8 bitmap of ``live``, least significant bit first.
    """

    manifest: Manifest
    shared: Arrays
    segments: tuple[Segment, ...]
    live: NDArray[np.bool_]
    bits: NDArray[np.uint8]


@dataclass
class Change:
    """Changes of one commit.

    Attributes:
        documents: Documents to add, with internal doc ids from ``next_document`` of the snapshot on.
        dead: Internal doc ids of documents to delete.
        segments: New segments as (number of documents, number of postings, arrays).
        replaces: Numbers of the segments that the new ones replace.
        shared: All shared arrays if they change, else None.
        settings: All settings if they change, else None.
    """

    documents: Sequence[Document] = ()
    dead: Sequence[int] = ()
    segments: Sequence[tuple[int, int, Arrays]] = ()
    replaces: Sequence[int] = ()
    shared: Arrays | None = None
    settings: Mapping[str, Any] | None = field(default=None)


class Store:
    """Storage of an index in a folder."""

    def __init__(self, folder: Path, lock_timeout: float = LOCK_TIMEOUT) -> None:
        """Open an index at its latest commit.

        Args:
            folder: Folder of the index.
            lock_timeout: Seconds that a writer waits for a writer in another process.

        Raises:
            RetrievalError: There is no index in the folder, or it cannot be read.
        """
        self.folder, self.lock_timeout = folder, lock_timeout
        self.documents = Documents(folder)
        self._mutex = threading.Lock()  # of `refresh`: a slow thread must not return to an earlier commit
        self._seen: tuple[int, int] | None = None
        self.snapshot = self._open()
        self.documents.ask("SELECT 1")

    @classmethod
    def create(
        cls,
        folder: Path,
        kind: str,
        options: Mapping[str, Any],
        encoder: Mapping[str, Any],
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> "Store":
        """Create an empty index.

        Raises:
            RetrievalError: The folder is not empty, or lies in another index.
            OSError: The folder cannot be written.
        """
        check_new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        Documents.create(folder)
        manifest.write_manifest(folder, Manifest(0, kind, dict(options), dict(encoder), uuid.uuid4().hex))
        return cls(folder, lock_timeout)

    def close(self) -> None:
        """Close the database. Arrays stay mapped as long as their snapshot is referenced."""
        self.documents.close()

    # -------------------------------------------------------------------------------------------------- for readers

    def refresh(self) -> Snapshot:
        """Return the snapshot of the latest commit; without a new commit, the cost is one ``stat`` of ``CURRENT``."""
        if self._stamp() != self._seen:
            with self._mutex:
                if self._stamp() != self._seen:
                    self.snapshot = self._open(self.snapshot.manifest.identity)
        return self.snapshot

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.folder / manifest.CURRENT)  # noqa: PTH116 -- called for every search
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _open(self, identity: str | None = None) -> Snapshot:
        for attempt in range(ATTEMPTS):
            stamp = self._stamp()
            name = manifest.current_manifest(self.folder)
            try:
                snapshot = self._load(manifest.read_manifest(self.folder, name))
            except DamagedIndex:
                # A writer may have replaced the manifest meanwhile, and removed files of the old one.
                if attempt + 1 == ATTEMPTS or manifest.current_manifest(self.folder) == name:
                    raise
                continue
            if identity is not None and snapshot.manifest.identity != identity:
                raise DamagedIndex(f"{self.folder}: another index is there now; open it again")
            self.documents.renew()
            self._seen = stamp
            return snapshot
        raise DamagedIndex(f"{self.folder}: {manifest.CURRENT} changes faster than it can be read")

    def _load(self, about: Manifest) -> Snapshot:
        shared = {name: self._map(f) for name, f in about.shared.items()}
        segments = tuple(Segment(s, {name: self._map(f) for name, f in s.arrays.items()}) for s in about.segments)
        live, bits = np.zeros(about.next_document, np.bool_), np.zeros(0, np.uint8)
        if about.live is not None:
            bits = self._map(about.live)
            if bits.dtype != np.uint8 or len(bits) != (about.next_document + 7) // 8:
                raise DamagedIndex(f"{self.folder}: {about.live.name} is damaged")
            live = np.unpackbits(bits, count=about.next_document, bitorder="little").view(np.bool_)
        return Snapshot(about, shared, segments, live, bits)

    def _map(self, file: ArrayFile) -> NDArray:
        path = self.folder / file.name
        try:
            with read_errors(path):
                if path.stat().st_size != file.bytes:
                    raise DamagedIndex(f"{self.folder}: {file.name} has {path.stat().st_size} bytes, not {file.bytes}")
                array = _load_array(path)
            if file.form and file.form != form(array):
                raise DamagedIndex(f"{self.folder}: {file.name} is of the form {form(array)}, not {file.form}")
            return array
        except RetrievalError:
            raise
        except (ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError) as error:
            raise DamagedIndex(f"{self.folder}: {file.name} cannot be read ({first_line(error)})") from None

    def check(self) -> Manifest:
        """Read all files and compare their checksums.

        Raises:
            DamagedIndex: A file differs from what was written.
        """
        snapshot = self.refresh()
        for file in snapshot.manifest.files().values():
            with read_errors(self.folder / file.name):
                damaged = atomic_write.file_sha256(self.folder / file.name) != file.sha256
            if damaged:
                raise DamagedIndex(f"{self.folder}: {file.name} is damaged; restore it, or build the index again")
        if problem := self.documents.check():
            raise DamagedIndex(f"{self.folder}: documents.db is damaged ({problem})")
        known = {row[0] for row in self.documents.ask("SELECT number FROM documents")}
        if lost := set(np.flatnonzero(snapshot.live).tolist()) - known:
            raise DamagedIndex(f"{self.folder}: documents.db lacks {len(lost)} documents, doc id {min(lost)} first")
        return snapshot.manifest

    # --------------------------------------------------------------------------------------------------- for writers

    @contextlib.contextmanager
    def writer(self) -> Iterator["Writer"]:
        """Lock the index for writing, remove documents that belong to no manifest, and yield the writer.

        Writers of this process queue.

        Raises:
            LockedIndex: A writer in another process was not done after ``lock_timeout``, or the index is not writable.
        """
        with write_lock(self.folder, self.lock_timeout):
            self.refresh()
            self.documents.drop_from(self.snapshot.manifest.next_document)
            yield Writer(self)


class Writer:
    """Writer of an index; created by `Store.writer`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def commit(self, change: Change) -> Snapshot:
        """Commit a change durably: first the documents, then the arrays, then the manifest that lists them.

        Raises:
            OSError: The disk is full or not writable; the index is unchanged.
        """
        store, before = self._store, self._store.snapshot
        about, folder = before.manifest, self._store.folder
        created: list[Path] = []
        number, mode = about.number + 1, atomic_write.file_mode(folder)

        def write(name: str, array: NDArray) -> ArrayFile:
            path = folder / name
            created.append(path)
            sha256 = atomic_write.write_array(path, array, mode)
            return ArrayFile(name, path.stat().st_size, sha256, form(array))

        try:
            if change.documents:
                store.documents.add(about.next_document, change.documents)
            segments = [s for s in about.segments if s.number not in set(change.replaces)]
            for i, (count, rows, arrays) in enumerate(change.segments):
                n = about.next_segment + i
                segments.append(
                    SegmentFiles(n, count, rows, {k: write(f"segment-{n}-{k}.npy", a) for k, a in arrays.items()})
                )
            shared = about.shared
            if change.shared is not None:
                shared = {k: write(f"shared-{number}-{k}.npy", a) for k, a in change.shared.items()}
            live = np.concatenate([before.live, np.ones(len(change.documents), np.bool_)])
            live[np.asarray(change.dead, np.int64)] = False
            after = replace(
                about,
                number=number,
                settings=about.settings if change.settings is None else dict(change.settings),
                shared=shared,
                segments=tuple(segments),
                live=write(f"live-{number}.npy", np.packbits(live, bitorder="little")),
                next_document=len(live),
                next_segment=about.next_segment + len(change.segments),
                count=int(live.sum()),
            )
            created.append(folder / after.name)
            manifest.write_manifest(folder, after)
        except BaseException:
            # ``CURRENT`` may have been replaced anyway, if only the sync of its folder failed.
            with contextlib.suppress(RetrievalError, OSError):
                if manifest.current_manifest(folder) == about.name:
                    for path in created:
                        path.unlink(missing_ok=True)
            raise
        store.refresh()
        self._tidy()
        return store.snapshot

    def _tidy(self) -> None:
        """Remove the files of an index that the latest manifest does not list."""
        about, folder = self._store.snapshot.manifest, self._store.folder
        needed = {*about.files(), about.name, manifest.CURRENT}
        for path in folder.iterdir():
            is_index_file = path.name.startswith(
                ("segment-", "shared-", "live-", "manifest-", ".segment-", ".shared-", ".live-")
            )
            if is_index_file and path.name not in needed:
                with contextlib.suppress(OSError):
                    path.unlink()


def check_new_folder(folder: Path) -> None:
    """Check that an index can be created in a folder.

    Raises:
        RetrievalError: The folder is not empty, or lies in another index.
    """
    if folder.exists() and (not folder.is_dir() or any(not _begun(p.name) for p in folder.iterdir())):
        reason = (
            "holds an index already; add to it, or go on with --resume"
            if (folder / manifest.CURRENT).exists()
            else "exists, and is not empty"
        )
        raise RetrievalError(f"{folder}: {reason}")
    if outer := next((p for p in folder.absolute().parents if (p / manifest.CURRENT).exists()), None):
        raise RetrievalError(f"{folder}: lies in another index, {outer}; choose a folder outside of it")


_parser = threading.Lock()


def _load_array(path: Path) -> NDArray:
    """Map an array into memory.

    NumPy parses the header of the file with `ast`, which fails in CPython 3.11 if threads use it at the same time
    (python/cpython#106905); other users of `ast` do not take our lock, hence the second attempt.
    """
    with _parser:
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except SystemError:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def form(array: NDArray) -> str:
    """Return dtype and shape of an array in the format of manifests."""
    return f"{array.dtype.str}{list(array.shape)}"


def _begun(name: str) -> bool:
    """Return whether a file is from an interrupted `Store.create`, which may be repeated."""
    return name.startswith(("documents.db", ".manifest-", ".CURRENT", "manifest-0.json"))
