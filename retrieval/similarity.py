"""Similarity of texts by the encoder of an index, and maximal marginal relevance.

Search scores can be compared within one search only. The similarity of two texts is between 0 and 1 and can be compared
between searches: the mean over tokens of the largest inner product (MaxSim) if the encoder has token vectors, else the
cosine of the term weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sparse_vectors import SparseVectors


def query_similarities(encoder: Any, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the similarity of a query to each text, [texts] float32; the texts are encoded."""
    encoder = _first(encoder)
    return _similarities(encoder.encode_queries([query])[0], encoder.encode_documents(texts))


def maximal_marginal_relevance(
    encoder: Any, query: str, texts: Sequence[str], k: int, lambda_mult: float = 0.5
) -> list[int]:
    """Choose texts that are similar to a query and not to each other (Carbonell and Goldstein, SIGIR 1998).

    The next text maximises ``lambda_mult * sim(query, text) - (1 - lambda_mult) * max sim(chosen, text)``.

    Args:
        encoder: Encoder of the index.
        query: Query text.
        texts: Candidates; they are encoded.
        k: Maximum number of texts to choose.
        lambda_mult: Weight of the relevance, from 0 (most diverse) to 1 (most relevant).

    Returns:
        Positions of the chosen texts, in the order of choice.
    """
    if not texts:
        return []
    encoder = _first(encoder)
    documents = encoder.encode_documents(texts)
    relevance = _similarities(encoder.encode_queries([query])[0], documents)
    chosen: list[int] = []
    nearest = np.zeros(len(texts), np.float32)  # largest similarity to a chosen text
    while len(chosen) < min(k, len(texts)):
        values = lambda_mult * relevance - (1 - lambda_mult) * nearest
        values[chosen] = -np.inf
        best = int(values.argmax())
        chosen.append(best)
        nearest = np.maximum(nearest, _similarities(documents[best], documents))
    return chosen


def _first(encoder: Any) -> Any:
    """Return the encoder itself, or of several the first with token vectors, or else the first."""
    each = list(getattr(encoder, "encoders", {"": encoder}).values())
    return next((e for e in each if hasattr(e, "words")), each[0])


def _similarities(one: Any, documents: Any) -> NDArray[np.float32]:
    """Return the similarity of an encoded text to encoded documents, [documents] float32."""
    if isinstance(documents, SparseVectors):
        norms = np.sqrt(np.bincount(documents.text_ids, documents.values**2, len(documents)))
        length = float(np.sqrt((one.values**2).sum()))
        cosines = documents.dot(one) / np.maximum(norms * length, 1e-12)
        return np.clip(cosines, 0, 1).astype(np.float32)
    vectors = one.vectors.astype(np.float32)
    if not len(vectors):
        return np.zeros(len(documents), np.float32)
    best = [
        (vectors @ part.vectors.astype(np.float32).T).max(1).mean() if len(part.vectors) else 0.0
        for part in (documents[i] for i in range(len(documents)))
    ]
    return np.clip(np.array(best, np.float32), 0, 1)
