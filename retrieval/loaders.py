"""Loaders of documents from files: records of tables, and chunks of texts.

| file | documents |
|---|---|
| `.jsonl`, `.ndjson`, `.json` (a list), `.csv`, `.tsv`, `.parquet` | one per record, see below |
| `.txt`, `.md`, `.html`, `.pdf` | one per chunk; ids are `PATH#N`, metadata are `source`, `chunk` and `page` |

A record has `id` or `_id`, `text`, and optionally `title` (prepended to the text) and `metadata`; other fields become
metadata. All formats except `.parquet` and `.pdf` may be compressed (`.gz`).
"""

import collections
import datetime
import decimal
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from . import csv_files, text_encoding
from .errors import RetrievalError, first_line
from .file_finder import files_of_folder
from .store.documents import Document
from .validation import as_document

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".text", ".md", ".markdown", ".html", ".htm", ".pdf", ".rst")
Chunk = Callable[[str], list[str]]
FIELDS = ("_id", "id", "text", "title", "metadata")


class DocumentSource:
    """Documents of files, in a fixed order.

    Attributes:
        files: Path and name of each file; the ids of a file's chunks begin with its name.
        skipped: Reason for each file that was left out, wholly or in part, by name; complete after an iteration.
    """

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
        self._chunk, self._number, self._skip_bad = chunk, number_ids, skip_bad
        self.skipped: dict[str, str] = {}
        self.files = []
        for path, name in _find([str(p) for p in paths], ignore):
            if reason := _bad_name(path, name):
                if not skip_bad:
                    raise RetrievalError(reason)
                self.skipped[name] = reason
            else:
                self.files.append((path, name))

    @classmethod
    def of(cls, path: Path, name: str, chunk: Chunk, number_ids: bool = False) -> "DocumentSource":
        """Create a source of one file, under another name than in the file system.

        Raises:
            RetrievalError: The suffix of the name belongs to no known format.
        """
        if _suffix(name) not in RECORDS + TEXTS:
            raise RetrievalError(f"{name}: files end in {', '.join(RECORDS + TEXTS)}")
        source = cls.__new__(cls)
        source._chunk, source._number, source._skip_bad = chunk, number_ids, False
        source.skipped, source.files = {}, [(path, name)]
        return source

    @property
    def estimate(self) -> int | None:
        """Approximate number of documents, or None if it cannot be estimated from the number of lines."""
        if not all(
            path is not None and _suffix(name) in (".jsonl", ".ndjson", ".csv", ".tsv") for path, name in self.files
        ):
            return None
        count = 0
        for path, name in self.files:
            assert path is not None
            try:
                with text_encoding.open_binary(path, name) as file:
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
            try:
                # Standard input can be read only once.
                documents = self._checked(path, name) if self._skip_bad and path else self._documents(path, name)
            except RetrievalError as error:
                self.skipped[name] = str(error)
                continue
            for document in documents:
                empty = False
                yield document
        if empty and self._skip_bad and self.skipped:
            first, *others = self.skipped.values()
            raise RetrievalError(first + (f"; {len(others)} other files were skipped, too" if others else ""))

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
        if _suffix(name) not in RECORDS:
            return list(self._documents(path, name))
        collections.deque(self._documents(path, name), maxlen=0)
        return self._documents(path, name)  # read again, since a table may be larger than the memory

    def _documents(self, path: Path | None, name: str) -> Iterator[Document]:
        return self._records(path, name) if _suffix(name) in RECORDS or name == "-" else self._pieces(path, name)

    def _records(self, path: Path | None, name: str) -> Iterator[Document]:
        empty = 0
        for number, record in _records(path, name):
            try:
                document = as_document(self._document(record, f"{name}:{number}"))
            except RetrievalError as error:
                raise RetrievalError(f"{name}, record {number}: {error}") from None
            if document.text.strip():
                yield document
            else:
                empty += 1
        if empty:
            self.skipped[name] = f"{name}: {empty} records without text"

    def _document(self, record: Any, place: str) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise RetrievalError("not an object")
        record_id = next((record[key] for key in ("_id", "id") if record.get(key) is not None), None)
        if record_id is None and self._number:
            record_id = place
        if isinstance(record_id, int) and not isinstance(record_id, bool):
            record_id = str(record_id)
        if record_id is None:
            raise RetrievalError("it has no id; add --number-ids to have records numbered")
        text, title = record.get("text"), record.get("title")
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
        for text, more in _texts(path, name):
            pages += "page" in more
            if not text.strip():
                continue
            for piece in self._chunk(text):
                if piece.strip():
                    yield as_document(
                        {"id": f"{name}#{number}", "text": piece, "metadata": {"source": name, "chunk": number, **more}}
                    )
                    number += 1
        if not number:
            reason = f"{pages} page{'s' * (pages != 1)}, no text layer" if pages else "no text"
            self.skipped[name] = f"{name}: {reason}"


def _find(paths: list[str], ignore: Iterable[str]) -> list[tuple[Path | None, str]]:
    """Return (path, name) of all files; the ids of a file's chunks begin with its name."""
    files: list[tuple[Path | None, str]] = []
    for argument in paths:
        path = Path(argument)
        if argument == "-":
            files.append((None, "-"))
        elif path.is_file():
            if _suffix(argument) not in RECORDS + TEXTS:
                raise RetrievalError(f"{argument}: files end in {', '.join(RECORDS + TEXTS)}")
            files.append((path, path.name))
        elif path.is_dir():
            documents = [p for p in files_of_folder(path, ignore) if _suffix(p.name) in RECORDS + TEXTS]
            files += [(p, p.relative_to(path).as_posix()) for p in documents if not _settings(p)]
        else:
            raise RetrievalError(f"{argument}: no such file or folder")
    if not files:
        raise RetrievalError(f"{', '.join(paths)}: no files that end in {', '.join(RECORDS + TEXTS)}")
    names = [name for path, name in files if path is None or _suffix(name) in TEXTS]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise RetrievalError(f"{twice}: two files of that name would give the same ids; index their common folder")
    return files


def _bad_name(path: Path | None, name: str) -> str | None:
    """Return why a file cannot be read, or an id cannot be made of its name; None if it can."""
    if path is not None and not path.exists():
        return f"{name}: is a broken link; remove it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"{name.encode(errors='backslashreplace').decode()}: its name is not UTF-8; rename it"
    return None


def _settings(path: Path) -> bool:
    """Return whether a file found in a folder is a JSON object, and so probably the settings of a program.

    An unreadable file counts as documents; the error is reported when it is read.
    """
    if _suffix(path.name) != ".json":
        return False
    try:
        with _open(path, path.name) as file:
            return file.read(4096).lstrip()[:1] == "{"
    except (OSError, ValueError, EOFError, zlib.error):
        return False


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _open(path: Path | None, name: str, encoding: str | None = None) -> IO[str]:
    """Open a text file; without an encoding, UTF-8 or that of the byte order mark, as JSON requires."""
    if path is None:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    encoding = encoding or text_encoding.marked_encoding(path, name) or "utf-8"
    return io.TextIOWrapper(text_encoding.open_binary(path, name), encoding=encoding, newline="")


def _records(path: Path | None, name: str) -> Iterator[tuple[int, Any]]:
    """Iterate over the records of a file, as (record number from 1 on, record).

    Raises:
        RetrievalError: The file cannot be read.
    """
    suffix, at = _suffix(name) if path else ".jsonl", 0
    try:
        if suffix == ".parquet":
            assert path is not None
            yield from enumerate(_parquet(path, name), 1)
        elif suffix in (".csv", ".tsv"):
            assert path is not None
            encoding = text_encoding.detect_encoding(path, name)
            delimiter = "\t" if suffix == ".tsv" else ","
            yield from csv_files.read_csv(lambda: _open(path, name, encoding), name, delimiter, FIELDS)
        elif suffix == ".json":
            with _open(path, name) as file:
                records = json.load(file)
            if not isinstance(records, list):
                raise RetrievalError(f"{name}: expected a list of objects")
            yield from enumerate(records, 1)
        else:
            with _open(path, name) as file:
                for at, line in enumerate(file, 1):
                    if line.strip():
                        yield at, _parse_line(line, f"{name}, record {at}")
    except RetrievalError:
        raise
    except UnicodeError:
        raise RetrievalError(f"{name}, record {at + 1}: not UTF-8 text") from None
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise RetrievalError(f"{name}: {first_line(error)}") from None
    except OSError as error:
        raise RetrievalError(f"{name}: {error.strerror or error}") from None


def _parse_line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise RetrievalError(f"{place}: {first_line(error)}") from None


def _parquet(path: Path, name: str) -> Iterator[dict[str, Any]]:
    _need("pyarrow", ".parquet")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # opened here, so that error messages of pyarrow do not contain the path
            texts = [f.name for f in pq.read_schema(file) if pyarrow.types.is_string(f.type)]
            # Dictionary encoding and conversion row by row limit memory: compressed tables may be huge.
            for batch in pq.ParquetFile(file, read_dictionary=texts).iter_batches(1024):
                rows = _microseconds(batch)
                yield from (_json(rows.slice(row, 1).to_pylist()[0]) for row in range(rows.num_rows))
    except pyarrow.ArrowException as error:
        raise RetrievalError(f"{name}: {first_line(error)}") from None


def _microseconds(batch: Any) -> Any:
    """Truncate timestamps to microseconds, the precision of Python's datetime."""
    import pyarrow

    for i, field in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(field.type) and field.type.unit == "ns":
            truncated = batch.column(i).cast(pyarrow.timestamp("us", field.type.tz), safe=False)
            batch = batch.set_column(i, field.name, truncated)
    return batch


def _json(value: Any) -> Any:
    """Convert a value of a Parquet table to JSON: dates to text, decimals to numbers, NaN and infinity to null."""
    match value:
        case dict():
            return {k: _json(v) for k, v in value.items()}
        case list():
            return [_json(v) for v in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() if value.is_finite():
            return int(value) if value == value.to_integral_value() else float(value)
        case decimal.Decimal():
            return None
        case float():
            return value if math.isfinite(value) else None
    return value


def _texts(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over (text, metadata) of the parts of a file that are chunked separately."""
    if _suffix(name) == ".pdf":
        yield from _pdf(path, name)
        return
    is_html = _suffix(name) in (".html", ".htm")
    try:
        declared = _declared_encoding(path, name) if is_html else None
        with _open(path, name, text_encoding.detect_encoding(path, name, declared)) as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise RetrievalError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if _suffix(name) in (".md", ".markdown"):
        _need("markdown_it", ".md", "markdown-it-py")
        from markdown_it import MarkdownIt

        text = _html(name, MarkdownIt().render(text))
    elif is_html:
        text = _html(name, text)
    yield text, {}


def _declared_encoding(path: Path, name: str) -> str | None:
    """Return the encoding that an HTML page or XML file declares."""
    _need("bs4", ".html and .md", "beautifulsoup4")
    from bs4.dammit import EncodingDetector

    with text_encoding.open_binary(path, name) as file:
        return EncodingDetector.find_declared_encoding(file.read(4096), is_html=True)


def _html(name: str, text: str) -> str:
    """Return the visible text of an HTML page, one block per line.

    Raises:
        RetrievalError: The page cannot be parsed.
    """
    _need("bs4", ".html and .md", "beautifulsoup4")
    from bs4 import BeautifulSoup

    try:
        page = BeautifulSoup(text, "html.parser")
    except Exception as error:  # parsers raise many types of errors for invalid HTML
        raise RetrievalError(f"{name}: cannot be read as HTML ({first_line(error)})") from None
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    return "\n".join(" ".join(line.split()) for line in page.get_text("\n").splitlines() if line.strip())


def _pdf(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _need("pypdf", ".pdf")
    import pypdf

    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
            # PDF files can contain halves of surrogate pairs, which are no characters.
            text = page.extract_text().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text, {"page": number}
    except Exception as error:  # pypdf raises many types of errors for damaged files
        raise RetrievalError(f"{name}: cannot be read as PDF ({first_line(error)})") from None


def _need(module: str, what: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        raise RetrievalError(f"{what} needs {package or module}; pip install pilotfish[retrieval]")
