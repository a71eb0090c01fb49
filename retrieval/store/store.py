"""An index as a folder: snapshots for readers, one writer, commits that are whole or not there.

    CURRENT, manifest-N.json    see `manifest`
    shared-*.npy                what all segments need: centroids, codec
    segment-*.npy               postings; mapped into memory
    live-N.npy                  a bit for each document: not deleted
    documents.db                ids, text and metadata; see `documents`
    write.lock                  held by the writer

Readers pin a snapshot: its files are mapped, so a later commit may remove them. What a crash leaves behind (files that
no manifest names, rows that no manifest knows) has no effect, and goes with the next writer.
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

from ..errors import DamagedIndex, LockedIndex, RetrievalError, first_line
from . import manifest
from .documents import Document, Documents
from .manifest import ArrayFile, Manifest, SegmentFiles

LOCK = "write.lock"
ATTEMPTS = 20  # to open what a writer replaces in the same moment
Arrays = Mapping[str, NDArray]


@dataclass(frozen=True)
class Segment:
    """A segment that is open: what the manifest says of it, and its arrays."""

    about: SegmentFiles
    arrays: Arrays


@dataclass(frozen=True)
class Snapshot:
    """An index at one moment, open.

    Attributes:
        manifest: What it consists of.
        shared: Arrays that all segments need.
        segments: The segments.
        live: [documents] whether each internal number is a document that was not deleted.
        bits: The same as bits, the lowest of a byte first.
    """

    manifest: Manifest
    shared: Arrays
    segments: tuple[Segment, ...]
    live: NDArray[np.bool_]
    bits: NDArray[np.uint8]


@dataclass
class Change:
    """What a commit changes.

    Attributes:
        documents: To be added, under the numbers from the snapshot's ``next_document`` on.
        dead: Internal numbers to be deleted.
        segments: (documents, rows, arrays) of new segments.
        replaces: Numbers of segments that the new ones replace.
        shared: New shared arrays, if they change; all of them.
        settings: New settings, if they change.
    """

    documents: Sequence[Document] = ()
    dead: Sequence[int] = ()
    segments: Sequence[tuple[int, int, Arrays]] = ()
    replaces: Sequence[int] = ()
    shared: Arrays | None = None
    settings: Mapping[str, Any] | None = field(default=None)


class Store:
    """A folder with an index."""

    def __init__(self, folder: Path) -> None:
        """Open an index at its latest commit.

        Raises:
            RetrievalError: there is none, or it cannot be read.
        """
        self.folder = folder
        self.documents = Documents(folder)
        self._mutex = threading.Lock()  # of `refresh`: a thread that is late never goes back to an earlier commit
        self._seen: tuple[int, int] | None = None
        self.snapshot = self._open()
        self.documents.ask("SELECT 1")

    @classmethod
    def create(cls, folder: Path, kind: str, options: Mapping[str, Any], encoder: Mapping[str, Any]) -> "Store":
        """Make an empty index.

        Raises:
            RetrievalError: the folder holds something.
            OSError: it cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(not _begun(p.name) for p in folder.iterdir())):
            what = (
                "holds an index already; add to it, or go on with --resume"
                if (folder / manifest.CURRENT).exists()
                else "exists, and is not empty"
            )
            raise RetrievalError(f"{folder}: {what}")
        if outer := next((p for p in folder.absolute().parents if (p / manifest.CURRENT).exists()), None):
            raise RetrievalError(f"{folder}: lies in another index, {outer}, whose files are its own")
        folder.mkdir(parents=True, exist_ok=True)
        Documents.create(folder)
        manifest.write_manifest(folder, Manifest(0, kind, dict(options), dict(encoder), uuid.uuid4().hex))
        return cls(folder)

    def close(self) -> None:
        """Let go of the database; arrays stay mapped as long as somebody holds the snapshot."""
        self.documents.close()

    # -------------------------------------------------------------------------------------------------- for readers

    def refresh(self) -> Snapshot:
        """The latest commit; costs one look at ``CURRENT`` where nothing has changed."""
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
                # A writer may just have replaced it, and removed what the one before needed.
                if attempt + 1 == ATTEMPTS or manifest.current_manifest(self.folder) == name:
                    raise
                continue
            if identity is not None and snapshot.manifest.identity != identity:
                raise DamagedIndex(f"{self.folder}: another index is there now; open it anew")
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
            if path.stat().st_size != file.bytes:
                raise DamagedIndex(f"{self.folder}: {file.name} has {path.stat().st_size} bytes, not {file.bytes}")
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            if file.form and file.form != form(array):
                raise DamagedIndex(f"{self.folder}: {file.name} is of the form {form(array)}, not {file.form}")
            return array
        except FileNotFoundError:
            raise DamagedIndex(f"{self.folder}: {file.name} is missing") from None
        except DamagedIndex:
            raise
        except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError) as error:
            raise DamagedIndex(f"{self.folder}: {file.name} cannot be read ({first_line(error)})") from None

    def check(self) -> Manifest:
        """Read everything, and compare checksums.

        Raises:
            DamagedIndex: a file is not what was written.
        """
        snapshot = self.refresh()
        for file in snapshot.manifest.files().values():
            try:
                damaged = atomic_write.file_sha256(self.folder / file.name) != file.sha256
            except OSError as error:
                raise DamagedIndex(f"{self.folder}: {file.name} cannot be read ({error.strerror})") from None
            if damaged:
                raise DamagedIndex(f"{self.folder}: {file.name} is damaged; restore it, or build the index anew")
        if problem := self.documents.check():
            raise DamagedIndex(f"{self.folder}: documents.db is damaged ({problem})")
        known = {row[0] for row in self.documents.ask("SELECT number FROM documents")}
        if gone := set(np.flatnonzero(snapshot.live).tolist()) - known:
            raise DamagedIndex(f"{self.folder}: documents.db lacks {len(gone)} documents, number {min(gone)} first")
        return snapshot.manifest

    # --------------------------------------------------------------------------------------------------- for writers

    @contextlib.contextmanager
    def writer(self) -> Iterator["Writer"]:
        """The only one who writes.

        Raises:
            LockedIndex: somebody else does.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = _owner(self.folder / LOCK)
            raise LockedIndex(f"{self.folder}: {owner} writes to this index; wait until it is done") from None
        except PermissionError as error:
            raise LockedIndex(f"{self.folder}: may not be written ({error.strerror})") from None
        try:
            _sign(self.folder / LOCK)
            self.refresh()
            self.documents.drop_from(self.snapshot.manifest.next_document)
            yield Writer(self)
        finally:
            lock.release()


class Writer:
    """Commits changes; made by `Store.writer`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def commit(self, change: Change) -> Snapshot:
        """Make a change last: documents first, then arrays, then the manifest that names them.

        Raises:
            OSError: the disk is full or may not be written; the index is as it was.
        """
        store, before = self._store, self._store.snapshot
        about, folder = before.manifest, self._store.folder
        made: list[Path] = []
        number = about.number + 1

        def write(name: str, array: NDArray) -> ArrayFile:
            path = folder / name
            made.append(path)
            sha256 = atomic_write.write_array(path, array)
            return ArrayFile(name, path.stat().st_size, sha256, form(array))

        try:
            if change.documents:
                store.documents.add(about.next_document, change.documents)
            kept = [s for s in about.segments if s.number not in set(change.replaces)]
            for i, (count, rows, arrays) in enumerate(change.segments):
                n = about.next_segment + i
                kept.append(
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
                segments=tuple(kept),
                live=write(f"live-{number}.npy", np.packbits(live, bitorder="little")),
                next_document=len(live),
                next_segment=about.next_segment + len(change.segments),
                count=int(live.sum()),
            )
            made.append(folder / after.name)
            manifest.write_manifest(folder, after)
        except BaseException:
            # ``CURRENT`` may have been replaced all the same, when its folder could not be synced.
            with contextlib.suppress(RetrievalError, OSError):
                if manifest.current_manifest(folder) == about.name:
                    for path in made:
                        path.unlink(missing_ok=True)
            raise
        store.refresh()
        self._tidy()
        return store.snapshot

    def _tidy(self) -> None:
        """Remove files that the latest manifest does not name, of this and of earlier commits."""
        about, folder = self._store.snapshot.manifest, self._store.folder
        needed = {*about.files(), about.name, manifest.CURRENT}
        for path in folder.iterdir():
            ours = path.name.startswith(
                ("segment-", "shared-", "live-", "manifest-", ".segment-", ".shared-", ".live-")
            )
            if ours and path.name not in needed:
                with contextlib.suppress(OSError):
                    path.unlink()


def form(array: NDArray) -> str:
    """Type and shape of an array, as a manifest keeps them."""
    return f"{array.dtype.str}{list(array.shape)}"


def _begun(name: str) -> bool:
    """Whether a file is what an index leaves behind whose making was cut short: it may be begun anew."""
    return name.startswith(("documents.db", ".manifest-", ".CURRENT", "manifest-0.json"))


def _owner(path: Path) -> str:
    try:
        pid = path.with_suffix(".pid").read_text(encoding="utf-8").strip()
    except OSError:
        pid = ""
    return f"process {pid}" if pid.isdigit() else "another process"


def _sign(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.with_suffix(".pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
