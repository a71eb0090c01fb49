"""Integration with LangChain: `PilotfishVectorStore` and `PilotfishRetriever`."""

from .retriever import PilotfishRetriever
from .vectorstore import PilotfishVectorStore

__all__ = ["PilotfishRetriever", "PilotfishVectorStore"]
