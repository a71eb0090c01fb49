"""Integration with LlamaIndex: `PilotfishRetriever` and `PilotfishRerank`."""

from .rerank import PilotfishRerank
from .retriever import PilotfishRetriever

__all__ = ["PilotfishRerank", "PilotfishRetriever"]
