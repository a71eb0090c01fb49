"""Documents of an index (ids, texts, metadata and sources) in SQLite.

A row has the internal doc id as its key. Doc ids only grow and are never reused. A row is valid if the current manifest
covers its doc id and marks it as live, so a transaction without a following manifest has no effect; see `store`.
"""

import contextlib
import json
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pilotfish._internal.atomic_write import file_mode

from ..errors import AccessDenied, DamagedIndex, read_errors
from ..filter_sql import register_functions

NAME = "documents.db"
LARGEST = 500  # maximum number of values in one query
ATTEMPTS = 20  # attempts of a query while a writer changes the file
IDLE = 8  # maximum number of idle connections in the pool
SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    source TEXT,
    digest TEXT,
    checksum INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_id ON documents (id);
CREATE INDEX IF NOT EXISTS by_source ON documents (source, digest) WHERE source IS NOT NULL;
"""


COUNT_MARK = "#"


@dataclass(frozen=True)
class Document:
    """Document of an index.

    Attributes:
        id: Id of the document.
        text: Full text of the document.
        metadata: Metadata of the document, a JSON object.
        source: Name of the file, or of another origin, that the document is a part of; None if it has none.
        digest: Digest of the file's contents, for documents that were read from files (`DocumentSource.digest`);
            that of the last document of a file ends with `COUNT_MARK` and the number of documents.
    """

    id: str
    text: str
    metadata: Mapping[str, Any]
    source: str | None = None
    digest: str | None = None


class _Stamp(NamedTuple):
    """State of the database file, and whether its write-ahead log is empty."""

    inode: int
    modified: int
    size: int
    complete: bool


class Documents:
    """Database of one index, with a connection pool for several threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._idle: list[sqlite3.Connection] = []
        self._immutable: _Stamp | None = None  # state of the files for which there are immutable connections
        self._age = 0  # generation of the pool: connections from before the last `close` are not reused
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            database, age = self._idle.pop() if self._idle else None, self._age
        database = database or self._connect()
        try:
            yield database
        finally:
            with self._mutex:
                keep = age == self._age and len(self._idle) < IDLE
                if keep:
                    self._idle.append(database)
            if not keep:
                database.close()

    def _connect(self) -> sqlite3.Connection:
        """Open the database for reading and writing, or else for reading.

        A user without write permission reads the write-ahead log through the existing ``-shm`` file. Without that
        file, the database is opened as immutable, which is correct as long as the log is empty and nobody writes;
        `_stamp` tells when this has changed.
        """
        with read_errors(self._path):
            self._path.open("rb").close()
        writable = os.access(self._path.parent, os.W_OK) and os.access(self._path, os.W_OK)
        failure: sqlite3.Error | UnicodeDecodeError | None = None
        for mode in ("rw", "ro") if writable else ("ro",):
            try:
                return self._open(mode)
            except sqlite3.OperationalError as error:  # no permission, disk full or a missing file
                failure = failure or error
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise DamagedIndex(f"{self._path}: {error}") from None
        stamp = self._stamp()
        if stamp is None or not stamp.complete:
            if not writable:
                raise AccessDenied(
                    f"{self._path}: its last changes are in a write-ahead log that a user without write permission "
                    "cannot read; run `pilotfish index check` as the owner of the index"
                )
            raise DamagedIndex(f"{self._path}: {failure}")
        try:
            database = self._open("ro&immutable=1")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise DamagedIndex(f"{self._path}: {error}") from None
        self._immutable = stamp
        return database

    def _open(self, mode: str) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
        register_functions(database)
        try:
            database.execute("SELECT number FROM documents LIMIT 1").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def _stamp(self) -> "_Stamp | None":
        """Return the state of the files; None if the database is missing."""
        try:
            database = self._path.stat()
        except OSError:
            return None
        try:
            complete = not self._path.with_name(f"{NAME}-wal").stat().st_size
        except OSError:
            complete = True
        return _Stamp(database.st_ino, database.st_mtime_ns, database.st_size, complete)

    def close(self) -> None:
        """Close all connections."""
        with self._mutex:
            self._age += 1
            self._immutable = None
            for database in self._idle:
                database.close()
            self._idle.clear()

    def renew(self) -> None:
        """Close connections that cannot read a new commit."""
        if self._immutable is not None and self._immutable != self._stamp():
            self.close()

    def ask(self, question: str, values: Sequence[Any] = ()) -> list[tuple]:
        """Return the rows of a query.

        Raises:
            DamagedIndex: The database cannot be read.
            AccessDenied: The user may not read the database.
        """
        for attempt in range(ATTEMPTS):
            self.renew()
            failure: Exception | None = None
            rows: list[tuple] = []
            try:
                with self._database() as database:
                    rows = database.execute(question, values).fetchall()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                failure = error
            if self._immutable is not None and self._immutable != self._stamp() and attempt + 1 < ATTEMPTS:
                continue  # a writer changed the file during the query
            if failure is not None:
                raise DamagedIndex(f"{self._path}: {failure}")
            return rows
        raise AssertionError("the last attempt returns or raises")

    def numbers_of(self, ids: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Iterate over (id, internal doc id) of all rows with one of ``ids``, including deleted documents."""
        for begin in range(0, len(ids), LARGEST):
            part = ids[begin : begin + LARGEST]
            yield from self.ask(
                f"SELECT id, number FROM documents WHERE id IN ({','.join('?' * len(part))})",  # placeholders only
                part,
            )

    def numbers_of_sources(self, sources: Sequence[str]) -> Iterator[int]:
        """Iterate over the internal doc ids of all rows with one of ``sources``, including deleted documents."""
        for begin in range(0, len(sources), LARGEST):
            part = sources[begin : begin + LARGEST]
            marks = ",".join("?" * len(part))
            yield from (n for (n,) in self.ask(f"SELECT number FROM documents WHERE source IN ({marks})", part))

    def get(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Return documents by internal doc id; missing ones are omitted."""
        documents = {}
        for begin in range(0, len(numbers), LARGEST):
            part = [int(n) for n in numbers[begin : begin + LARGEST]]
            rows = self.ask(
                "SELECT number, id, text, metadata, source, digest FROM documents "
                f"WHERE number IN ({','.join('?' * len(part))})",
                part,
            )
            for number, name, text, metadata, *origin in rows:
                try:
                    documents[number] = Document(name, text, json.loads(metadata), *origin)
                except (ValueError, TypeError, RecursionError):
                    raise DamagedIndex(f"{self._path}: metadata of row {number} are damaged") from None
        return documents

    def check(self) -> str | None:
        """Return the first problem of the database file or of a row's checksum, or None."""
        answers = [row[0] for row in self.ask("PRAGMA quick_check")]
        if answers != ["ok"]:
            return answers[0]
        for number, *row, checksum in self.ask(
            "SELECT number, id, text, metadata, source, digest, checksum FROM documents"
        ):
            if _checksum(*row) != checksum:
                return f"row {number}"
        return None

    # ---------------------------------------------------------------------------------------------------- for writers

    @staticmethod
    def create(folder: Path) -> None:
        """Create an empty database.

        Raises:
            OSError: The disk is full or not writable.
        """
        database = sqlite3.connect(folder / NAME)
        try:
            (folder / NAME).chmod(file_mode(folder))  # SQLite gives the same mode to its other files
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise OSError(None, str(error), str(folder / NAME)) from None
        finally:
            database.close()

    def add(self, first: int, documents: Iterable[Document]) -> None:
        """Add documents with doc ids from ``first`` on, in one durable transaction.

        Raises:
            OSError: The disk is full or not writable; nothing was added.
        """
        texts = ((d.id, d.text, json.dumps(d.metadata, ensure_ascii=False), d.source, d.digest) for d in documents)
        rows = ((first + i, *row, _checksum(*row)) for i, row in enumerate(texts))
        self._change(
            "INSERT INTO documents (number, id, text, metadata, source, digest, checksum) VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete the rows with these doc ids."""
        self._change("DELETE FROM documents WHERE number = ?", ((int(n),) for n in numbers))

    def drop_from(self, first: int) -> None:
        """Delete the rows from doc id ``first`` on, which belong to no manifest."""
        self._change("DELETE FROM documents WHERE number >= ?", [(first,)])

    def _change(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        try:
            with self._database() as database:
                database.execute("PRAGMA synchronous=FULL")
                with database:
                    database.executemany(statement, rows)
        except sqlite3.OperationalError as error:  # disk full, read-only or locked
            raise OSError(None, str(error), str(self._path)) from None
        except sqlite3.DatabaseError as error:
            raise DamagedIndex(f"{self._path}: {error}") from None


def _checksum(*fields: str | None) -> int:
    """Compute the checksum of a row; SQLite stores none."""
    return zlib.crc32("\0".join(field or "" for field in fields).encode())
