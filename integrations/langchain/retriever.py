"""A LangChain retriever over a Pilotfish index."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, PrivateAttr

from ...retrieval.index import Index
from .filters import to_pilotfish_filter
from .vectorstore import to_langchain_document


class PilotfishRetriever(BaseRetriever):
    """A retriever that searches the index in a folder.

    Attributes:
        folder: Folder of the index.
        k: Largest number of documents to return.
        filter: Filter over metadata, see `filters.to_pilotfish_filter`; can be overridden in each call.
        settings: Search settings that override those of the index.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    folder: str | Path
    k: int = 4
    filter: str | Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = {}
    _index: Index = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the index.

        Raises:
            RetrievalError: The index cannot be opened, or a setting is invalid.
        """
        super().model_post_init(context)
        self._index = Index.open(self.folder)
        self._index.settings(**self.settings)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        """Return the best documents; ``k`` and ``filter`` override the attributes, further arguments are settings."""
        k, where = kwargs.pop("k", self.k), kwargs.pop("filter", self.filter)
        hits = self._index.search(query, k, to_pilotfish_filter(where), **{**self.settings, **kwargs})
        return [to_langchain_document(hit) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        """Run `_get_relevant_documents` in a thread."""
        return await asyncio.to_thread(
            self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **kwargs
        )
