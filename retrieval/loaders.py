"""Loaders of documents from files: records of tables, and chunks of texts.

| file | documents |
|---|---|
| `.jsonl`, `.ndjson`, `.json` (a list), `.csv`, `.tsv`, `.parquet` | one per record, see below |
| `.txt`, `.md`, `.html`, `.pdf` | one per chunk; ids are `PATH#N`, metadata are `source`, `chunk` and `page` |

Each document has the name of its file as `source`. A record has `id` or `_id`, `text`, and optionally `title`
(prepended to the text) and `metadata`; other fields become metadata. All formats except `.parquet` and `.pdf` may be
compressed (`.gz`).
"""

import collections
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilotfish._internal.atomic_write import file_sha256

from .defaults import CHUNK_TOKENS, OVERLAP
from .errors import RetrievalError
from .file_finder import files_of_folder
from .record_files import FIELDS, RECORDS, read_records
from .store.documents import COUNT_MARK, Document
from .text_encoding import open_binary, open_text, suffix_of
from .text_files import TEXTS, read_texts
from .validation import as_document

NAMED = 8  # fields that a message names
Chunk = Callable[[str], list[str]]


@dataclass(frozen=True)
class Chunker:
    """Function that splits a text into chunks of at most ``tokens`` tokens of an encoder, which share ``overlap``."""

    encoder: Callable[[], Any]
    tokens: int = CHUNK_TOKENS
    overlap: int = OVERLAP

    def __call__(self, text: str) -> list[str]:
        return self.encoder().chunks(text, self.tokens, self.overlap)

    def __str__(self) -> str:
        return f"{self.tokens} {self.overlap}"


class DocumentSource:
    """Documents of files, in a fixed order.

    Attributes:
        files: Path and name of each file; the name is the source of its documents, and the ids of chunks begin with it.
        chunk: Function that splits a text into chunks; may be set after the files were found, and before an iteration.
        skipped: Reason for each file that was left out, wholly or in part, by name, and for each folder that cannot be
            read, by its name with a slash; complete after an iteration.
        whole_sources: True: the documents of a file replace all that an index has of it.
    """

    whole_sources = True

    def __init__(
        self,
        paths: Iterable[str | Path],
        chunk: Chunk,
        number_ids: bool = False,
        skip_bad: bool = False,
        ignore: Iterable[str] = (),
    ) -> None:
        """Find the files.

        Args:
            paths: Files, folders, or ``-`` for records on standard input. Folders are searched recursively; hidden
                files, indexes, and JSON files that do not contain a list are skipped.
            chunk: Function that splits a text into chunks.
            number_ids: Whether records without an id get an id from their file name and record number.
            skip_bad: Whether files that cannot be read are skipped. They are read before their first document is
                returned, so that no part of a bad file is indexed.
            ignore: Patterns of files to ignore in folders; see `file_finder.files_of_folder`.

        Raises:
            RetrievalError: A path does not exist, or there is no file in a known format. Without ``skip_bad``, a folder
                contains a broken link or a file name that is not UTF-8.
        """
        self.chunk, self._number, self._skip_bad = chunk, number_ids, skip_bad
        self.skipped: dict[str, str] = {}
        self.files = []
        files, unreadable = _find([str(p) for p in paths], ignore)
        for path, name in files:
            if reason := _bad_name(path, name):
                unreadable[name] = reason
            else:
                self.files.append((path, name))
        if unreadable and not skip_bad:
            raise RetrievalError(next(iter(unreadable.values())))
        self.skipped |= unreadable

    @classmethod
    def of(cls, path: Path, name: str, chunk: Chunk, number_ids: bool = False) -> "DocumentSource":
        """Create a source of one file, under another name than in the file system.

        Raises:
            RetrievalError: The suffix of the name belongs to no known format.
        """
        if suffix_of(name) not in RECORDS + TEXTS:
            raise RetrievalError(f"{name}: files end in {', '.join(RECORDS + TEXTS)}")
        source = cls.__new__(cls)
        source.chunk, source._number, source._skip_bad = chunk, number_ids, False
        source.skipped, source.files = {}, [(path, name)]
        return source

    @property
    def estimate(self) -> int | None:
        """Approximate number of documents, or None if it cannot be estimated from the number of lines."""
        if not all(
            path is not None and suffix_of(name) in (".jsonl", ".ndjson", ".csv", ".tsv") for path, name in self.files
        ):
            return None
        count = 0
        for path, name in self.files:
            assert path is not None
            try:
                with open_binary(path, name) as file:
                    count += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            except (OSError, EOFError, zlib.error):  # reported when the file is read
                return None
        return max(count, 1)

    def __iter__(self) -> Iterator[Document]:
        """Iterate over all documents.

        Raises:
            RetrievalError: A document is invalid; the message names the file and the record. With ``skip_bad``, there
                is no document because files were skipped.
        """
        empty = True
        for path, name in self.files:
            for document in self.read(path, name) or ():
                empty = False
                yield document
        if empty and self._skip_bad and self.skipped:
            first, *others = self.skipped.values()
            raise RetrievalError(first + (f"; {len(others)} other files were skipped, too" if others else ""))

    def read(self, path: Path | None, name: str) -> Iterable[Document] | None:
        """Return the documents of one of ``files``, or None if it cannot be read and bad files are skipped.

        Raises:
            RetrievalError: A document is invalid, and bad files are not skipped.
        """
        if path is None:  # standard input can be read only once
            return self._documents(path, name)
        try:
            digest = self.digest(path, name)
            documents = self._checked(path, name) if self._skip_bad else self._documents(path, name)
        except RetrievalError as error:
            if not self._skip_bad:
                raise
            self.skipped[name] = str(error)
            return None
        return _marked(documents, name, digest)

    def has_digest(self, path: Path, name: str, digest: str) -> bool:
        """Return whether a file can be read and has a digest."""
        try:
            return self.digest(path, name) == digest
        except RetrievalError:
            return False

    def digest(self, path: Path, name: str) -> str:
        """Return the digest of a file's contents, and for a text of the settings of chunks.

        Raises:
            RetrievalError: The file cannot be read.
        """
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise RetrievalError(f"{name}: {error.strerror or error}") from None
        return f"{digest} {self.chunk}" if suffix_of(name) in TEXTS and isinstance(self.chunk, Chunker) else digest

    def check(self) -> None:
        """Read all files, so that a bad one is reported before anything is written.

        Raises:
            RetrievalError: A document is invalid; the message names the file and the record.
        """
        for path, name in self.files:
            if path is not None:
                self._checked(path, name)

    def _checked(self, path: Path, name: str) -> Iterable[Document]:
        """Return the documents of a file of which every document is valid."""
        if suffix_of(name) not in RECORDS:
            return list(self._documents(path, name))
        collections.deque(self._documents(path, name), maxlen=0)
        return self._documents(path, name)  # read again, since a table may be larger than the memory

    def _documents(self, path: Path | None, name: str) -> Iterator[Document]:
        return self._records(path, name) if suffix_of(name) in RECORDS or name == "-" else self._pieces(path, name)

    def _records(self, path: Path | None, name: str) -> Iterator[Document]:
        number, empty, notes = 0, 0, list[str]()
        for number, record in read_records(path, name, notes.append):
            try:
                document = as_document(self._document(record, f"{name}:{number}"))
            except RetrievalError as error:
                raise RetrievalError(f"{name}, record {number}: {error}") from None
            if document.text.strip():
                yield document
            else:
                empty += 1
        if empty:
            notes.append(f"{name}: {empty} records without text")
        if not number and not notes:
            notes.append(f"{name}: no records")
        if notes:
            self.skipped[name] = "; ".join(notes)

    def _document(self, record: Any, place: str) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise RetrievalError("not an object")
        record_id = next((record[key] for key in ("_id", "id") if record.get(key) is not None), None)
        if record_id is None and self._number:
            record_id = place
        if isinstance(record_id, int) and not isinstance(record_id, bool):
            record_id = str(record_id)
        if record_id is None:
            names = _names(record)
            raise RetrievalError(f"it has no id; add --number-ids to have records numbered; its fields are {names}")
        text, title = record.get("text"), record.get("title")
        if text is None and "text" not in record:
            raise RetrievalError(f"it has no field 'text'; its fields are {_names(record)}")
        if isinstance(text, str) and isinstance(title, str) and title.strip():
            text = f"{title.strip()} {text}"
        metadata = record.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise RetrievalError("its metadata are not an object")
        others = {k: v for k, v in record.items() if k not in FIELDS and v is not None}
        if isinstance(title, str) and title.strip():
            others["title"] = title.strip()
        return {"id": record_id, "text": text, "metadata": {**others, **(metadata or {})}}

    def _pieces(self, path: Path | None, name: str) -> Iterator[Document]:
        assert path is not None
        number = pages = 0
        for text, more in read_texts(path, name):
            pages += "page" in more
            if not text.strip():
                continue
            for piece in self.chunk(text):
                if piece.strip():
                    yield as_document(
                        {"id": f"{name}#{number}", "text": piece, "metadata": {"source": name, "chunk": number, **more}}
                    )
                    number += 1
        if not number:
            reason = f"{pages} page{'s' * (pages != 1)}, no text layer" if pages else "no text"
            self.skipped[name] = f"{name}: {reason}"


def _marked(documents: Iterable[Document], name: str, digest: str) -> Iterator[Document]:
    """Return documents with their source and digest; that of the last one contains their number.

    So an index knows whether it has all documents of a file; see `DocumentFilter.digests`.
    """
    count, last = 0, None
    for document in documents:
        if last is not None:
            yield last
        count, last = count + 1, replace(document, source=name, digest=digest)
    if last is not None:
        yield replace(last, digest=f"{digest}{COUNT_MARK}{count}")


def _find(paths: list[str], ignore: Iterable[str]) -> tuple[list[tuple[Path | None, str]], dict[str, str]]:
    """Return (path, name) of all files, and the reason for each folder that cannot be read, by name.

    The ids of a file's chunks begin with its name.
    """
    files: list[tuple[Path | None, str]] = []
    unreadable: dict[str, str] = {}
    for argument in paths:
        path = Path(argument)
        if not argument:
            raise RetrievalError("a path is empty; the current folder is .")
        if argument == "-":
            files.append((None, "-"))
        elif path.is_file():
            if suffix_of(argument) not in RECORDS + TEXTS:
                raise RetrievalError(f"{argument}: files end in {', '.join(RECORDS + TEXTS)}")
            files.append((path, path.name))
        elif path.is_dir():

            def report(error: OSError, path: Path = path) -> None:
                folder = Path(error.filename)
                if folder == path:  # as if it did not exist: its files are not known
                    raise RetrievalError(f"{path}: {error.strerror}") from None
                name = f"{folder.relative_to(path).as_posix()}/"
                unreadable[name] = f"{name}: {error.strerror}"

            documents = [p for p in files_of_folder(path, ignore, report) if suffix_of(p.name) in RECORDS + TEXTS]
            files += [(p, p.relative_to(path).as_posix()) for p in documents if not _settings(p)]
        else:
            raise RetrievalError(f"{argument}: no such file or folder")
    if not files:
        if unreadable:
            raise RetrievalError(next(iter(unreadable.values())))
        raise RetrievalError(f"{', '.join(paths)}: no files that end in {', '.join(RECORDS + TEXTS)}")
    names = collections.Counter(name for _, name in files)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise RetrievalError(
            f"{twice}: two files of that name cannot be told apart in the index; index their common folder"
        )
    return files, unreadable


def _bad_name(path: Path | None, name: str) -> str | None:
    """Return why a file cannot be read, or an id cannot be made of its name; None if it can."""
    if path is not None and not path.exists():
        return f"{name}: is a broken link; remove it"
    if path is not None and not path.is_file():
        return f"{name}: is not a regular file"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"{name.encode(errors='backslashreplace').decode()}: its name is not UTF-8; rename it"
    return None


def _names(record: dict[str, Any]) -> str:
    """Return the first fields of a record, for messages."""
    return ", ".join(map(repr, list(record)[:NAMED])) + ", …" * (len(record) > NAMED)


def _settings(path: Path) -> bool:
    """Return whether a file found in a folder is a JSON object, and so probably the settings of a program.

    An unreadable file counts as documents; the error is reported when it is read.
    """
    if suffix_of(path.name) != ".json":
        return False
    try:
        with open_text(path, path.name) as file:
            return file.read(4096).lstrip()[:1] == "{"
    except (OSError, ValueError, EOFError, zlib.error):
        return False
