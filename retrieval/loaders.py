"""Documents from files: tables of records, and texts that are cut into pieces.

| file | documents |
|---|---|
| `.jsonl`, `.ndjson`, `.json` (a list), `.csv`, `.tsv`, `.parquet` | one a record, see below |
| `.txt`, `.md`, `.html`, `.pdf` | pieces of so many tokens; ids are `PATH#N`, metadata `source`, `chunk`, `page` |

A record has `id` or `_id`, `text`, perhaps `title` (put before the text) and `metadata`; further fields become
metadata. All but `.parquet` and `.pdf` may be compressed, `.gz`.
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from .errors import RetrievalError, first_line
from .store.documents import Document
from .store.manifest import CURRENT, SHARDS
from .validation import as_document

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".text", ".md", ".markdown", ".html", ".htm", ".pdf", ".rst")
Chunk = Callable[[str], list[str]]
LONGEST_FIELD = 1 << 27  # characters of a table's field
FIELDS = ("_id", "id", "text", "title", "metadata")


class DocumentSource:
    """Files with documents, in a fixed order."""

    def __init__(self, paths: Iterable[str | Path], chunk: Chunk, number_ids: bool = False) -> None:
        """Find the files.

        Args:
            paths: Files, folders (searched through; hidden files, indexes, and JSON that is no list left out), or
                ``-`` for records on standard input.
            chunk: Cuts a text into pieces.
            number_ids: Records without an id get their file and number for one.

        Raises:
            RetrievalError: a path is not there, or nothing can be read.
        """
        self._chunk, self._number = chunk, number_ids
        self.files = _find([str(p) for p in paths])

    @classmethod
    def of(cls, path: Path, name: str, chunk: Chunk, number_ids: bool = False) -> "DocumentSource":
        """One file, under another name than it lies in the file system.

        Raises:
            RetrievalError: no such file can be read.
        """
        if _suffix(name) not in RECORDS + TEXTS:
            raise RetrievalError(f"{name}: files end in {', '.join(RECORDS + TEXTS)}")
        source = cls.__new__(cls)
        source._chunk, source._number, source.files = chunk, number_ids, [(path, name)]
        return source

    @property
    def estimate(self) -> int | None:
        """About how many documents there are; None where that cannot be told without reading all."""
        if not all(
            path is not None and _suffix(name) in (".jsonl", ".ndjson", ".csv", ".tsv") for path, name in self.files
        ):
            return None
        count = 0
        for path, name in self.files:
            assert path is not None
            try:
                with gzip.open(path) if name.lower().endswith(".gz") else path.open("rb") as file:
                    count += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            except (OSError, EOFError, zlib.error):  # said when it is read
                return None
        return max(count, 1)

    def __iter__(self) -> Iterator[Document]:
        """All documents.

        Raises:
            RetrievalError: one is wrong; the message names file and place.
        """
        for path, name in self.files:
            yield from (
                self._records(path, name) if _suffix(name) in RECORDS or name == "-" else self._pieces(path, name)
            )

    def _records(self, path: Path | None, name: str) -> Iterator[Document]:
        for number, record in _records(path, name):
            try:
                yield as_document(self._document(record, f"{name}:{number}"))
            except RetrievalError as error:
                raise RetrievalError(f"{name}, record {number}: {error}") from None

    def _document(self, record: Any, place: str) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise RetrievalError("not an object")
        given = record.get("_id", record.get("id"))
        if given is None and self._number:
            given = place
        if isinstance(given, int) and not isinstance(given, bool):
            given = str(given)
        if given is None:
            raise RetrievalError("it has no id; add --number-ids to have records numbered")
        text, title = record.get("text"), record.get("title")
        if isinstance(text, str) and isinstance(title, str) and title.strip():
            text = f"{title.strip()} {text}"
        metadata = record.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise RetrievalError("its metadata are no object")
        others = {k: v for k, v in record.items() if k not in FIELDS and v is not None}
        if isinstance(title, str) and title.strip():
            others["title"] = title.strip()
        return {"id": given, "text": text, "metadata": {**others, **(metadata or {})}}

    def _pieces(self, path: Path | None, name: str) -> Iterator[Document]:
        assert path is not None
        number = 0
        for text, more in _texts(path, name):
            if not text.strip():
                continue
            for piece in self._chunk(text):
                if piece.strip():
                    yield as_document(
                        {"id": f"{name}#{number}", "text": piece, "metadata": {"source": name, "chunk": number, **more}}
                    )
                    number += 1


def _find(paths: list[str]) -> list[tuple[Path | None, str]]:
    """(path, name) of all files; a name is what ids begin with."""
    found: list[tuple[Path | None, str]] = []
    for given in paths:
        path = Path(given)
        if given == "-":
            found.append((None, "-"))
        elif path.is_file():
            if _suffix(given) not in RECORDS + TEXTS:
                raise RetrievalError(f"{given}: files end in {', '.join(RECORDS + TEXTS)}")
            found.append((path, path.name))
        elif path.is_dir():
            for folder, folders, names in os.walk(path):
                if any((Path(folder) / name).exists() for name in (CURRENT, SHARDS)):
                    folders.clear()  # an index is no document
                    continue
                folders[:] = sorted(n for n in folders if not n.startswith("."))
                inside = [
                    Path(folder) / n for n in sorted(names) if not n.startswith(".") and _suffix(n) in RECORDS + TEXTS
                ]
                if broken := next((p for p in inside if not p.exists()), None):
                    raise RetrievalError(f"{broken}: a link to nothing")
                found += [(p, p.relative_to(path).as_posix()) for p in inside if not _settings(p)]
        else:
            raise RetrievalError(f"{given}: no such file or folder")
    if not found:
        raise RetrievalError(f"{', '.join(paths)}: no files that end in {', '.join(RECORDS + TEXTS)}")
    names = [name for path, name in found if path is None or _suffix(name) in TEXTS]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise RetrievalError(f"{twice}: two files of that name would give the same ids; index their common folder")
    return found


def _settings(path: Path) -> bool:
    """Whether a file of a folder is JSON that is no list: settings of some program, not documents.

    One that cannot be read is taken for documents, and refused when it is read.
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


def _open(path: Path | None, name: str) -> IO[str]:
    if path is None:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    if name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _records(path: Path | None, name: str) -> Iterator[tuple[int, Any]]:
    """(number, record) of a file.

    Raises:
        RetrievalError: it cannot be read.
    """
    kind, at = _suffix(name) if path else ".jsonl", 0
    try:
        if kind == ".parquet":
            assert path is not None
            yield from enumerate(_parquet(path, name), 1)
            return
        with _open(path, name) as file:
            if kind == ".json":
                whole = json.load(file)
                if not isinstance(whole, list):
                    raise RetrievalError(f"{name}: expected a list of objects")
                yield from enumerate(whole, 1)
            elif kind in (".csv", ".tsv"):
                csv.field_size_limit(LONGEST_FIELD)
                rows = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
                for at, row in enumerate(rows, 1):
                    if None in row:
                        raise RetrievalError(f"{name}, record {at}: more fields than the head names")
                    yield at, {k: v if k in FIELDS else _plain(v) for k, v in row.items() if k}
            else:
                for at, line in enumerate(file, 1):
                    if line.strip():
                        yield at, json.loads(line)
    except RetrievalError:
        raise
    except UnicodeDecodeError:
        raise RetrievalError(f"{name}, record {at + 1}: not UTF-8 text") from None
    except (ValueError, csv.Error, EOFError, zlib.error, RecursionError) as error:
        lines = kind in (".jsonl", ".ndjson") and isinstance(error, json.JSONDecodeError | RecursionError)
        where = f"{name}, record {at if lines else at + 1}" if kind != ".json" else name
        raise RetrievalError(f"{where}: {first_line(error)}") from None
    except OSError as error:
        raise RetrievalError(f"{name}: {error.strerror or error}") from None


def _plain(text: str | None) -> Any:
    """A field of a table as a number where it looks like one; None where it is empty."""
    if text is None or text == "":
        return None
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if str(value) == text and math.isfinite(value) else text
    return text


def _parquet(path: Path, name: str) -> Iterator[dict[str, Any]]:
    _need("pyarrow", ".parquet")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # whose path pyarrow would tell otherwise
            texts = [f.name for f in pq.read_schema(file) if pyarrow.types.is_string(f.type)]
            # Values that come often are kept once, and rows unfolded one by one: packed tables may be huge.
            for batch in pq.ParquetFile(file, read_dictionary=texts).iter_batches(1024):
                yield from (_json(batch.slice(row, 1).to_pylist()[0]) for row in range(batch.num_rows))
    except pyarrow.ArrowException as error:
        raise RetrievalError(f"{name}: {first_line(error)}") from None


def _json(value: Any) -> Any:
    """A value of a typed table as JSON holds it: dates as text, decimals as numbers, no number as null."""
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
    """(text, metadata) of the parts of a file that are cut by themselves."""
    if _suffix(name) == ".pdf":
        yield from _pdf(path, name)
        return
    try:
        with _open(path, name) as file:
            text = file.read()
    except UnicodeDecodeError:
        raise RetrievalError(f"{name}: not UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RetrievalError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if _suffix(name) in (".md", ".markdown"):
        _need("markdown_it", ".md", "markdown-it-py")
        from markdown_it import MarkdownIt

        text = _html(name, MarkdownIt().render(text))
    elif _suffix(name) in (".html", ".htm"):
        text = _html(name, text)
    yield text, {}


def _html(name: str, text: str) -> str:
    """What a page shows, a block on each line.

    Raises:
        RetrievalError: it cannot be read.
    """
    _need("bs4", ".html and .md", "beautifulsoup4")
    from bs4 import BeautifulSoup

    try:
        page = BeautifulSoup(text, "html.parser")
    except Exception as error:  # parsers have errors of all kinds for what is no HTML
        raise RetrievalError(f"{name}: cannot be read as HTML ({first_line(error)})") from None
    for hidden in page(["script", "style", "noscript", "template"]):
        hidden.decompose()
    return "\n".join(" ".join(line.split()) for line in page.get_text("\n").splitlines() if line.strip())


def _pdf(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _need("pypdf", ".pdf")
    import pypdf

    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, 1):
            yield page.extract_text(), {"page": number}
    except Exception as error:  # damaged files meet errors of all kinds in it
        raise RetrievalError(f"{name}: cannot be read as PDF ({first_line(error)})") from None


def _need(module: str, what: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        raise RetrievalError(f"{what} needs {package or module}; pip install pilotfish[retrieval]")
