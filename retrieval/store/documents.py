"""The documents of an index: their own ids, text and metadata, in SQLite.

Rows are only ever added, under internal numbers that are never used twice. A row counts when a manifest knows its
number and has its bit set, so a transaction that was not followed by a manifest has no effect; see `store`.
"""

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
LARGEST = 500  # names in one question
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
    """A document as its owner knows it: id, text, and metadata, any JSON object."""

    id: str
    text: str
    metadata: Mapping[str, Any]


class Documents:
    """The database of one index; each thread has a connection of its own."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._mutex = threading.Lock()

    @property
    def _database(self) -> sqlite3.Connection:
        if (open_one := getattr(self._local, "database", None)) is None:
            open_one = self._local.database = self._connect()
            with self._mutex:
                self._opened.append(open_one)
        return open_one

    def _connect(self) -> sqlite3.Connection:
        if not self._path.is_file():
            raise DamagedIndex(f"{self._path} is missing")
        # A folder that may not be written cannot hold SQLite's side files; nothing changes there either.
        fixed = "" if os.access(self._path.parent, os.W_OK) and os.access(self._path, os.W_OK) else "&immutable=1"
        mode = "rw" if not fixed else "ro"
        try:
            database = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode={mode}{fixed}", uri=True, timeout=30, check_same_thread=False
            )
            database.execute("SELECT number, id, text, metadata FROM documents LIMIT 1").fetchone()
        except sqlite3.Error as error:
            raise DamagedIndex(f"{self._path}: {error}") from None
        return database

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._mutex:
            for database in self._opened:
                database.close()
            self._opened.clear()
        self._local = threading.local()

    def ask(self, question: str, values: Sequence[Any] = ()) -> list[tuple]:
        """Rows that answer a question.

        Raises:
            DamagedIndex: the database cannot be read.
        """
        try:
            return self._database.execute(question, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise DamagedIndex(f"{self._path}: {error}") from None

    def numbers_of(self, ids: Sequence[str]) -> Iterator[tuple[str, int]]:
        """(id, internal number) of all rows with one of ``ids``, deleted documents among them."""
        for begin in range(0, len(ids), LARGEST):
            part = ids[begin : begin + LARGEST]
            yield from self.ask(
                f"SELECT id, number FROM documents WHERE id IN ({','.join('?' * len(part))})",  # marks only
                part,
            )

    def get(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by internal numbers; those that are gone are left out."""
        found = {}
        for begin in range(0, len(numbers), LARGEST):
            part = [int(n) for n in numbers[begin : begin + LARGEST]]
            rows = self.ask(
                f"SELECT number, id, text, metadata FROM documents WHERE number IN ({','.join('?' * len(part))})", part
            )
            for number, name, text, metadata in rows:
                found[number] = Document(name, text, json.loads(metadata))
        return found

    def check(self) -> str | None:
        """What SQLite finds wrong with the file, if anything."""
        answers = [row[0] for row in self.ask("PRAGMA quick_check")]
        if answers != ["ok"]:
            return answers[0]
        for number, *row, checksum in self.ask("SELECT number, id, text, metadata, checksum FROM documents"):
            if _checksum(*row) != checksum:
                return f"row {number}"
        return None

    # ------------------------------------------------------------------------------------------------- the writer's

    @staticmethod
    def create(folder: Path) -> None:
        """Make an empty database."""
        database = sqlite3.connect(folder / NAME)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
        finally:
            database.close()

    def add(self, first: int, documents: Iterable[Document]) -> None:
        """Add rows from internal number ``first`` on, in one transaction that lasts.

        Raises:
            OSError: the disk is full, or may not be written; nothing was added.
        """
        texts = ((d.id, d.text, json.dumps(d.metadata, ensure_ascii=False, sort_keys=True)) for d in documents)
        rows = ((first + i, *row, _checksum(*row)) for i, row in enumerate(texts))
        self._change("INSERT INTO documents (number, id, text, metadata, checksum) VALUES (?, ?, ?, ?, ?)", rows)

    def drop(self, numbers: Iterable[int]) -> None:
        """Remove rows for good."""
        self._change("DELETE FROM documents WHERE number = ?", ((int(n),) for n in numbers))

    def drop_from(self, first: int) -> None:
        """Remove the rows that no manifest came to know."""
        self._change("DELETE FROM documents WHERE number >= ?", [(first,)])

    def _change(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        database = self._database
        try:
            database.execute("PRAGMA synchronous=FULL")
            with database:
                database.executemany(statement, rows)
        except sqlite3.OperationalError as error:  # full, read-only, locked
            raise OSError(None, str(error), str(self._path)) from None
        except sqlite3.DatabaseError as error:
            raise DamagedIndex(f"{self._path}: {error}") from None


def _checksum(name: str, text: str, metadata: str) -> int:
    """Of a row: SQLite keeps none."""
    return zlib.crc32("\0".join((name, text, metadata)).encode())
