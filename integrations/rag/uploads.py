"""Uploads of files through the web page. Each file owns the documents that were read from it."""

import gzip
import io
import json
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

from ...retrieval.errors import RetrievalError, first_line
from ...retrieval.index import Index
from ...retrieval.loaders import Chunker, DocumentSource
from ...retrieval.malloc_trim import release_memory

UPLOAD = "_upload"  # metadata key for the name of the uploaded file
LARGEST_FILE = 128 << 20  # maximum size of a file after decompression, in bytes


def add_upload(index: Index, name: str, content: bytes) -> dict[str, int]:
    """Add the documents of a file to the index, and delete those of an earlier upload with the same name.

    A file that a synchronization has read is another source, which an upload does not replace.

    Args:
        index: Index to write to.
        name: Name of the file.
        content: Contents of the file; decompressed if the name ends in ``.gz``.

    Returns:
        The number of added documents, and the number of documents in the index.

    Raises:
        RetrievalError: The file cannot be read, or an id belongs to a document from elsewhere; the index is unchanged.
    """
    if name in ("", "..") or not name.isprintable():
        raise RetrievalError("name: is not the name of a file")
    if name.lower().endswith(".gz"):
        name, content = name[:-3], _unpacked(name, content)
        if name.lower().endswith(".gz"):
            raise RetrievalError(f"{name}.gz: is compressed twice")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        _check_packed(name, path)
        source = DocumentSource.of(path, name, Chunker(lambda: index.encoder), number_ids=True)
        documents, size = [], 0
        for document in source:
            metadata = {**document.metadata, UPLOAD: name}
            documents.append(replace(document, metadata=metadata, source=f"upload:{name}", digest=None))
            size += len(document.text) + len(json.dumps(document.metadata))
            if size > LARGEST_FILE:  # tables may be compressed internally
                raise RetrievalError(f"{name}: contains more than {LARGEST_FILE >> 20} MiB of text")
    if not documents:
        raise RetrievalError("the file contains no text")
    added = index.add(documents, replace_sources=True)
    release_memory()
    return {"added": added, "documents": len(index)}


def _check_packed(name: str, path: Path) -> None:
    """Check the decompressed size of a Parquet table.

    Raises:
        RetrievalError: The table is too large, or cannot be read.
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
            raise RetrievalError(f"{name}: contains more than {LARGEST_FILE >> 20} MiB")


def _unpacked(name: str, content: bytes) -> bytes:
    """Decompress a gzip file.

    Raises:
        RetrievalError: The contents are larger than `LARGEST_FILE`, or cannot be read.
    """
    try:
        with gzip.open(io.BytesIO(content)) as file:
            plain = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RetrievalError(f"{name}: {error}") from None
    if len(plain) > LARGEST_FILE:
        raise RetrievalError(f"{name}: contains more than {LARGEST_FILE >> 20} MiB")
    return plain
