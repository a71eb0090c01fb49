"""Files that come by the page: each owns the documents that it brought, and no others."""

import gzip
import io
import tempfile
import threading
import zlib
from dataclasses import replace
from pathlib import Path

from ...retrieval.allocator import give_back
from ...retrieval.errors import RetrievalError
from ...retrieval.filters import Compare
from ...retrieval.incoming import CHUNK_TOKENS, OVERLAP
from ...retrieval.index import Index
from ...retrieval.inputs import Source

UPLOAD = "_upload"  # metadata of documents that came by the page: their file
LARGEST_FILE = 128 << 20  # bytes, when it is no longer compressed


def add(index: Index, name: str, content: bytes, writing: threading.Lock) -> dict[str, int]:
    """Put a file's documents into the index, in the place of those of an earlier upload of that name.

    Raises:
        RetrievalError: it cannot be read, or has a document of an id that is there from elsewhere; nothing was changed.
    """
    if name in ("", "..") or not name.isprintable():
        raise RetrievalError("name: is no file's")
    if name.lower().endswith(".gz"):
        name, content = name[:-3], _unpacked(name, content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        source = Source.of(path, name, lambda text: index.encoder.chunks(text, CHUNK_TOKENS, OVERLAP), number_ids=True)
        given = [replace(d, metadata={**d.metadata, UPLOAD: name}) for d in source]
    if not given:
        raise RetrievalError("the file holds no text")
    with writing:
        old = {d.id for d in index.select(Compare((UPLOAD,), "=", (name,)))}
        new = {d.id for d in given}
        if others := sorted(index.has(list(new - old))):
            raise RetrievalError(
                f"{name}: document {others[0]!r} is in the index already, not by an upload of that name"
            )
        added = index.upsert(given)
        index.delete(list(old - new))
    give_back()
    return {"added": added, "documents": len(index)}


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
