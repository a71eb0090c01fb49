"""Documents as they come in: checked, and in batches."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import RetrievalError
from .store.documents import Document

DEEPEST = 64  # objects and arrays within each other in metadata
CHUNK_TOKENS, OVERLAP = 200, 40  # of the pieces that texts are cut into, where nothing is said
BATCH = 8192  # documents of one commit; the first ones are what centroids and codec are learned from


def check_names(names: Any) -> list[str]:
    """Ids as a list; a single text would be taken for a list of letters.

    Raises:
        RetrievalError: they are none.
    """
    if isinstance(names, str):
        raise RetrievalError(f"ids: expected a list, got the text {names!r}")
    return list(names)


def check_text(what: str, text: Any) -> None:
    """Refuse what is no text, or none that can be written: halves of surrogate pairs.

    Raises:
        RetrievalError: it is not.
    """
    if not isinstance(text, str):
        raise RetrievalError(f"{what}: expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RetrievalError(f"{what}: not text that UTF-8 can hold") from None


def as_document(value: Any) -> Document:
    """A document of a mapping, checked.

    Raises:
        RetrievalError: it has no id or text, or its metadata are no JSON object.
    """
    if isinstance(value, Document):
        value = {"id": value.id, "text": value.text, "metadata": value.metadata}
    if not isinstance(value, Mapping):
        raise RetrievalError(f"a document is an object with id and text, not {type(value).__name__}")
    known = {"id", "text", "metadata"}
    if extra := sorted(set(map(str, value)) - known):
        raise RetrievalError(f"document {value.get('id')!r}: unknown key {extra[0]!r}; put it into metadata")
    name, text, metadata = value.get("id"), value.get("text"), value.get("metadata") or {}
    if not isinstance(name, str) or not name:
        raise RetrievalError(f"a document's id is a text that is not empty, not {name!r}")
    if not isinstance(text, str):
        raise RetrievalError(f"document {name!r}: its text is missing or no text")
    try:
        if not isinstance(metadata, Mapping):
            raise TypeError
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False))
        if _depth(plain) > DEEPEST:
            raise RetrievalError(f"document {name!r}: metadata are more than {DEEPEST} levels deep")
        _ = (name + text + json.dumps(plain, ensure_ascii=False)).encode()
    except RetrievalError:
        raise
    except (TypeError, ValueError, RecursionError):
        wrong = (
            next((k for k, v in metadata.items() if not _writable(v)), None) if isinstance(metadata, Mapping) else None
        )
        where = "text and metadata have" if wrong is None else f"metadata field {wrong!r} has"
        raise RetrievalError(f"document {name!r}: {where} to be what JSON can hold") from None
    return Document(name, text, plain)


def _depth(value: Any) -> int:
    """Objects and arrays within each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _writable(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def document_batches(documents: Iterable[Document], unique: bool) -> Iterator[list[Document]]:
    """Documents in batches, the last of each id within one.

    Raises:
        RetrievalError: an id comes twice, where it has to be ``unique``.
    """
    batch: dict[str, Document] = {}
    for document in documents:
        if batch.pop(document.id, None) is not None and unique:
            raise RetrievalError(f"document {document.id!r} comes twice; give each an id of its own, or upsert")
        batch[document.id] = document
        if len(batch) == BATCH:
            yield list(batch.values())
            batch = {}
    if batch:
        yield list(batch.values())
