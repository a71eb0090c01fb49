"""Documents of an index (ids, texts and metadata) in SQLite.

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
from typing import Any

from ..errors import DamagedIndex

NAME = "documents.db"
LARGEST = 500  # maximum number of values in one query
IDLE = 8  # maximum number of idle connections in the pool
SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_id ON documents (id);
"""


@dataclass(frozen=True)
class Document:
    """Document with its id, text and metadata (a JSON object)."""

    id: str
    text: str
    metadata: Mapping[str, Any]


class Documents:
    """Database of one index, with a connection pool for several threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._idle: list[sqlite3.Connection] = []
        self._fixed = False  # whether a connection is immutable and does not read later writes
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
        if not self._path.is_file():
            raise DamagedIndex(f"{self._path} is missing")
        wal = self._path.with_name(f"{NAME}-wal")
        complete = not (wal.exists() and wal.stat().st_size)  # whether the write-ahead log is empty
        try:
            if os.access(self._path.parent, os.W_OK) and os.access(self._path, os.W_OK):
                try:
                    return self._open("rw")
                except sqlite3.OperationalError:
                    if not complete:
                        raise
            # SQLite cannot create its side files if the folder is read-only or the disk is full.
            database = self._open("ro&immutable=1")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise DamagedIndex(f"{self._path}: {error}") from None
        self._fixed = True
        return database

    def _open(self, mode: str) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
        try:
            database.execute("SELECT number FROM documents LIMIT 1").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close all connections."""
        with self._mutex:
            self._age += 1
            self._fixed = False
            for database in self._idle:
                database.close()
            self._idle.clear()

    def renew(self) -> None:
        """Close connections that cannot read a new commit."""
        if self._fixed:
            self.close()

    def ask(self, question: str, values: Sequence[Any] = ()) -> list[tuple]:
        """Return the rows of a query.

        Raises:
            DamagedIndex: The database cannot be read.
        """
        try:
            with self._database() as database:
                return database.execute(question, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise DamagedIndex(f"{self._path}: {error}") from None

    def numbers_of(self, ids: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Iterate over (id, internal doc id) of all rows with one of ``ids``, including deleted documents."""
        for begin in range(0, len(ids), LARGEST):
            part = ids[begin : begin + LARGEST]
            yield from self.ask(
                f"SELECT id, number FROM documents WHERE id IN ({','.join('?' * len(part))})",  # placeholders only
                part,
            )

    def get(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Return documents by internal doc id; missing ones are omitted."""
        documents = {}
        for begin in range(0, len(numbers), LARGEST):
            part = [int(n) for n in numbers[begin : begin + LARGEST]]
            rows = self.ask(
                f"SELECT number, id, text, metadata FROM documents WHERE number IN ({','.join('?' * len(part))})", part
            )
            for number, name, text, metadata in rows:
                try:
                    documents[number] = Document(name, text, json.loads(metadata))
                except (ValueError, TypeError, RecursionError):
                    raise DamagedIndex(f"{self._path}: metadata of row {number} are damaged") from None
        return documents

    def check(self) -> str | None:
        """Return the first problem of the database file or of a row's checksum, or None."""
        answers = [row[0] for row in self.ask("PRAGMA quick_check")]
        if answers != ["ok"]:
            return answers[0]
        for number, *row, checksum in self.ask("SELECT number, id, text, metadata, checksum FROM documents"):
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
        texts = ((d.id, d.text, json.dumps(d.metadata, ensure_ascii=False, sort_keys=True)) for d in documents)
        rows = ((first + i, *row, _checksum(*row)) for i, row in enumerate(texts))
        self._change("INSERT INTO documents (number, id, text, metadata, checksum) VALUES (?, ?, ?, ?, ?)", rows)

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


def _checksum(name: str, text: str, metadata: str) -> int:
    """Compute the checksum of a row; SQLite stores none."""
    return zlib.crc32("\0".join((name, text, metadata)).encode())
