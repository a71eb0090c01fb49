"""Validation and batching of documents."""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import RetrievalError
from .store.documents import Document

DEEPEST = 64  # maximum nesting of objects and arrays in metadata
LONGEST_ID = 4096  # maximum number of characters of an id, which has to fit in a URL
BATCH = 8192  # documents per commit; the first batch is the training sample of the shared arrays


def check_names(names: Any) -> list[str]:
    """Return ids as a list. A single text is refused, because it would be read as a list of letters.

    Raises:
        RetrievalError: The ids are a single text.
    """
    if isinstance(names, str):
        raise RetrievalError(f"ids: expected a list, got the text {names!r}")
    return list(names)


def check_text(what: str, text: Any) -> None:
    """Check that a value is a text that UTF-8 can encode; ``what`` names it in the error message.

    Raises:
        RetrievalError: The value is not a text, or contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise RetrievalError(f"{what}: expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RetrievalError(f"{what}: not text that UTF-8 can hold") from None


def as_document(value: Any) -> Document:
    """Validate a mapping and convert it to a document.

    Raises:
        RetrievalError: The id or the text is missing, the metadata are not a JSON object, or the source is not text.
    """
    digest = None
    if isinstance(value, Document):
        digest = value.digest
        value = {"id": value.id, "text": value.text, "metadata": value.metadata, "source": value.source}
    if not isinstance(value, Mapping):
        raise RetrievalError(f"a document is an object with id and text, not {type(value).__name__}")
    known = {"id", "text", "metadata", "source"}
    if extra := sorted(set(map(str, value)) - known):
        raise RetrievalError(f"document {value.get('id')!r}: unknown key {extra[0]!r}; put it into metadata")
    name, text, metadata = value.get("id"), value.get("text"), value.get("metadata") or {}
    if not isinstance(name, str) or not name:
        raise RetrievalError(f"a document's id is a text that is not empty, not {name!r}")
    if len(name) > LONGEST_ID:
        raise RetrievalError(f"document {name[:40]!r}…: its id has more than {LONGEST_ID} characters")
    if not isinstance(text, str):
        raise RetrievalError(f"document {name!r}: its text is missing or not a text")
    if (source := value.get("source")) is not None:
        check_text(f"document {name!r}: its source", source)
    try:
        if not isinstance(metadata, Mapping):
            raise TypeError
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False, default=_plain))
        if _depth(plain) > DEEPEST:
            raise RetrievalError(f"document {name!r}: metadata are more than {DEEPEST} levels deep")
        _ = (name + text + json.dumps(plain, ensure_ascii=False)).encode()
    except RetrievalError:
        raise
    except (TypeError, ValueError, RecursionError):
        wrong = (
            next((k for k, v in metadata.items() if not _writable(v)), None) if isinstance(metadata, Mapping) else None
        )
        fields = "text and metadata have" if wrong is None else f"metadata field {wrong!r} has"
        raise RetrievalError(f"document {name!r}: {fields} to be what JSON can hold") from None
    return Document(name, text, plain, source, digest)


def _plain(value: Any) -> Any:
    """Return a value that JSON cannot hold in the form in which filters accept it: dates in ISO format, sets as lists.

    Raises:
        TypeError: There is no such form.
    """
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    raise TypeError


def _depth(value: Any) -> int:
    """Return the depth of nested objects and arrays."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _writable(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def document_batches(documents: Iterable[Document], unique: bool) -> Iterator[list[Document]]:
    """Split documents into batches of `BATCH`. Within a batch, the last document of each id is kept.

    Raises:
        RetrievalError: A batch contains an id twice, and ids have to be ``unique``.
    """
    batch: dict[str, Document] = {}
    for document in documents:
        if batch.pop(document.id, None) is not None and unique:
            where = "" if document.source is None else f", the second time in {document.source}"
            raise RetrievalError(f"document {document.id!r} comes twice{where}; give each document a unique id")
        batch[document.id] = document
        if len(batch) == BATCH:
            yield list(batch.values())
            batch = {}
    if batch:
        yield list(batch.values())
