"""Files that come by the page: each owns the documents that it brought, and no others."""

import gzip
import io
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

from ...retrieval.errors import RetrievalError, first_line
from ...retrieval.filters import Compare
from ...retrieval.index import Index
from ...retrieval.loaders import DocumentSource
from ...retrieval.malloc_trim import release_memory
from ...retrieval.validation import CHUNK_TOKENS, OVERLAP

UPLOAD = "_upload"  # metadata of documents that came by the page: their file
LARGEST_FILE = 128 << 20  # bytes, when it is no longer compressed


def add_upload(index: Index, name: str, content: bytes) -> dict[str, int]:
    """Put a file's documents into the index, in the place of those of an earlier upload of that name.

    One at a time: nobody else may write meanwhile.

    Raises:
        RetrievalError: it cannot be read, or has a document of an id that is there from elsewhere; nothing was changed.
    """
    if name in ("", "..") or not name.isprintable():
        raise RetrievalError("name: is no file's")
    if name.lower().endswith(".gz"):
        name, content = name[:-3], _unpacked(name, content)
        if name.lower().endswith(".gz"):
            raise RetrievalError(f"{name}.gz: is packed twice")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        _check_packed(name, path)
        source = DocumentSource.of(
            path, name, lambda text: index.encoder.chunks(text, CHUNK_TOKENS, OVERLAP), number_ids=True
        )
        given, size = [], 0
        for document in source:
            given.append(replace(document, metadata={**document.metadata, UPLOAD: name}))
            size += len(document.text) + len(json.dumps(document.metadata))
            if size > LARGEST_FILE:  # tables may be packed in themselves
                raise RetrievalError(f"{name}: holds more than {LARGEST_FILE >> 20} MiB of text")
    if not given:
        raise RetrievalError("the file holds no text")
    old = {d.id for d in index.select(Compare((UPLOAD,), "=", (name,)))}
    new = {d.id for d in given}
    if others := sorted(index.has(list(new - old))):
        raise RetrievalError(f"{name}: document {others[0]!r} is in the index already, not by an upload of that name")
    added = index.upsert(given)
    index.delete(list(old - new))
    release_memory()
    return {"added": added, "documents": len(index)}


def _check_packed(name: str, path: Path) -> None:
    """Refuse a table whose columns are too large when unpacked.

    Raises:
        RetrievalError: it is one, or cannot be read.
    """
    if name.lower().endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet as pq

        try:
            with path.open("rb") as file:
                about = pq.read_metadata(file)
        except pyarrow.ArrowException as error:
            raise RetrievalError(f"{name}: {first_line(error)}") from None
        if sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)) > LARGEST_FILE:
            raise RetrievalError(f"{name}: holds more than {LARGEST_FILE >> 20} MiB")


def _unpacked(name: str, content: bytes) -> bytes:
    """What gzip packed, if that is not more than anybody would send.

    Raises:
        RetrievalError: it is, or cannot be read.
    """
    try:
        with gzip.open(io.BytesIO(content)) as file:
            plain = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RetrievalError(f"{name}: {error}") from None
    if len(plain) > LARGEST_FILE:
        raise RetrievalError(f"{name}: holds more than {LARGEST_FILE >> 20} MiB")
    return plain
