"""An index as a vector store of LangChain's."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from ...retrieval.errors import RetrievalError
from ...retrieval.filters import EVERYTHING, Filter
from ...retrieval.index import Hit, Index
from .filters import to_pilotfish_filter

AnyFilter = str | Filter | Mapping[str, Any]


class PilotfishVectorStore(VectorStore):
    """Documents of LangChain's in an index; it encodes by itself, so no embeddings are given.

    Filters are ours, as ``year >= 2020 AND lang in (en, de)``, or mappings, see `filters.translate`. Methods that are
    asked for vectors, and those for diversity (``mmr``), are not there: documents have one vector for each token, or
    weights of words.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str | None = None,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Open the index in a folder; make it where there is none.

        Args:
            folder: Of the index.
            kind: Of the index, where it is made: ``xtr``, ``vdr``, ``hybrid``, ...
            encoder: See `Index.create`.
            options: Of the kind.
            settings: Of searches, in place of the index's own.

        Raises:
            RetrievalError: it cannot be opened or made.
        """
        self.index = Index.open_or_create(folder, kind, encoder, options)
        self._search_settings = settings
        self.index.settings(**settings)  # wrong ones are refused now

    @property
    def embeddings(self) -> Embeddings | None:
        """None: see the class."""
        return None

    @classmethod
    def from_texts(  # type: ignore[override]
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict] | None = None,
        *,
        ids: list[str] | None = None,
        folder: str | Path,
        **kwargs: Any,
    ) -> "PilotfishVectorStore":
        """Put texts into the index in ``folder``; further arguments are those of the class.

        Raises:
            RetrievalError: an embedding is given, which nothing would be done with.
        """
        if embedding is not None:
            raise RetrievalError("embedding: the index encodes by itself; leave it out, or name an encoder")
        store = cls(folder, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts, in the place of those with the same ids; returns ids, drawn where none is given.

        Raises:
            RetrievalError: one is wrong, or there are not as many of everything.
        """
        if kwargs:
            raise RetrievalError(f"add: unknown argument {next(iter(kwargs))!r}")
        given = list(texts)
        names = [name or uuid.uuid4().hex for name in (ids if ids is not None else [None] * len(given))]
        about = metadatas if metadatas is not None else [{}] * len(given)
        if not len(given) == len(names) == len(about):
            raise RetrievalError(f"add: {len(given)} texts, {len(about)} metadata, {len(names)} ids")
        documents = zip(names, given, about, strict=True)
        self.index.upsert([{"id": n, "text": t, "metadata": m} for n, t, m in documents])
        return names

    def delete(self, ids: list[str] | None = None, *, where: AnyFilter | None = None, **kwargs: Any) -> bool | None:
        """Delete by ids, or all that pass a filter; with neither, everything."""
        if kwargs:
            raise RetrievalError(f"delete: unknown argument {next(iter(kwargs))!r}")
        everything = ids is None and where is None
        self.index.delete(ids or [], EVERYTHING if everything else to_pilotfish_filter(where))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents by ids; unknown ones are passed over."""
        found = (self.index.get(name) for name in ids)
        return [Document(id=d.id, page_content=d.text, metadata=dict(d.metadata)) for d in found if d is not None]

    def similarity_search(
        self, query: str, k: int = 4, filter: AnyFilter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The best ``k`` documents that pass a filter; further arguments are settings of the search."""
        return [document for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)]

    def similarity_search_with_score(  # type: ignore[override]
        self, query: str, k: int = 4, filter: AnyFilter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The same with scores: higher is better, comparable within one search."""
        hits = self.index.search(query, k, to_pilotfish_filter(filter), **{**self._search_settings, **kwargs})
        return [(to_langchain_document(hit), hit.score) for hit in hits]

    def _select_relevance_score_fn(self) -> Any:
        raise NotImplementedError("scores can be compared within one search only, so there is no relevance from 0 to 1")


def to_langchain_document(hit: Hit) -> Document:
    """A hit as LangChain has documents."""
    return Document(id=hit.id, page_content=hit.text, metadata=dict(hit.metadata))
