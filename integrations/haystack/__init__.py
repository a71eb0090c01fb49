"""Integration with Haystack: `PilotfishDocumentStore` and `PilotfishRetriever`."""

from .document_store import PilotfishDocumentStore
from .retriever import PilotfishRetriever

__all__ = ["PilotfishDocumentStore", "PilotfishRetriever"]
