"""A LangChain vector store over a Pilotfish index."""

import asyncio
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
from ...retrieval.similarity import maximal_marginal_relevance, query_similarities
from .filters import to_pilotfish_filter

AnyFilter = str | Filter | Mapping[str, Any]


class PilotfishVectorStore(VectorStore):
    """A vector store whose index encodes documents itself, so it takes no embeddings.

    Filters are Pilotfish's, such as ``year >= 2020 AND lang in (en, de)``, or mappings, see
    `filters.to_pilotfish_filter`. Methods that take vectors are not supported, since a document has one vector for each
    token, or term weights.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str | None = None,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Open the index in a folder, or create it if there is none.

        Args:
            folder: Folder of the index.
            kind: Type of a new index: ``xtr``, ``vdr``, ``hybrid``, ...
            encoder: Encoder of a new index, see `Index.create`.
            options: Options of a new index.
            settings: Search settings that override those of the index.

        Raises:
            RetrievalError: The index cannot be opened or created, or a setting is invalid.
        """
        self.index = Index.open_or_create(folder, kind, encoder, options)
        self._search_settings = settings
        self.index.settings(**settings)  # validates them

    @property
    def embeddings(self) -> Embeddings | None:
        """None, since the index encodes documents itself."""
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
        """Create a store in ``folder`` and add texts; further arguments are those of the class.

        Raises:
            RetrievalError: An embedding is given, which the index does not use.
        """
        if embedding is not None:
            raise RetrievalError("embedding: the index encodes by itself; remove it, or name an encoder")
        store = cls(folder, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; existing documents with the same ids are replaced.

        Args:
            texts: Texts of the documents.
            metadatas: Metadata of each document.
            ids: Id of each document; a missing id is generated.
            batch_size: Not used; LangChain's ``index`` passes it.
            kwargs: Refused.

        Returns:
            The ids of the documents.

        Raises:
            RetrievalError: A document is invalid, or the arguments have different lengths.
        """
        if kwargs:
            raise RetrievalError(f"add: unknown argument {next(iter(kwargs))!r}")
        all_texts = list(texts)
        names = [name or uuid.uuid4().hex for name in (ids if ids is not None else [None] * len(all_texts))]
        metadata = metadatas if metadatas is not None else [{}] * len(all_texts)
        if not len(all_texts) == len(names) == len(metadata):
            raise RetrievalError(f"add: {len(all_texts)} texts, {len(metadata)} metadata, {len(names)} ids")
        documents = zip(names, all_texts, metadata, strict=True)
        self.index.upsert([{"id": n, "text": t, "metadata": m} for n, t, m in documents])
        return names

    def delete(self, ids: list[str] | None = None, *, where: AnyFilter | None = None, **kwargs: Any) -> bool | None:
        """Delete documents by ids, or all that match a filter; without both, delete all documents."""
        if kwargs:
            raise RetrievalError(f"delete: unknown argument {next(iter(kwargs))!r}")
        everything = ids is None and where is None
        self.index.delete(ids or [], EVERYTHING if everything else to_pilotfish_filter(where))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return documents by ids; unknown ids are ignored."""
        stored = (self.index.get(name) for name in ids)
        return [Document(id=d.id, page_content=d.text, metadata=dict(d.metadata)) for d in stored if d is not None]

    def similarity_search(
        self, query: str, k: int = 4, filter: AnyFilter | None = None, **kwargs: Any
    ) -> list[Document]:
        """Return the best ``k`` documents that match a filter; further arguments are search settings."""
        return [document for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)]

    def similarity_search_with_score(  # type: ignore[override]
        self, query: str, k: int = 4, filter: AnyFilter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return the best documents and their scores. Higher is better; only scores of one search are comparable."""
        hits = self.index.search(query, k, to_pilotfish_filter(filter), **{**self._search_settings, **kwargs})
        return [(to_langchain_document(hit), hit.score) for hit in hits]

    def _similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return the best documents and their similarities to the query, from 0 to 1; see `retrieval.similarity`."""
        found = self.similarity_search(query, k, **kwargs)
        scores = query_similarities(self.index.encoder, query, [d.page_content for d in found]) if found else ()
        return sorted(zip(found, map(float, scores), strict=True), key=lambda pair: -pair[1])

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: AnyFilter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return ``k`` of the best ``fetch_k`` documents that are relevant and differ from each other.

        Args:
            query: Query text.
            k: Maximum number of documents to return.
            fetch_k: Number of documents from which they are chosen; their texts are encoded again.
            lambda_mult: Weight of the relevance, from 0 (most diverse) to 1 (most relevant).
            filter: Filter over metadata.
            kwargs: Search settings.
        """
        found = self.similarity_search(query, fetch_k, filter, **kwargs)
        texts = [document.page_content for document in found]
        chosen = maximal_marginal_relevance(self.index.encoder, query, texts, k, lambda_mult)
        return [found[i] for i in chosen]

    async def amax_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """Run `max_marginal_relevance_search` in a thread."""
        return await asyncio.to_thread(self.max_marginal_relevance_search, *args, **kwargs)


def to_langchain_document(hit: Hit) -> Document:
    """Convert a hit to a LangChain document."""
    return Document(id=hit.id, page_content=hit.text, metadata=dict(hit.metadata))
