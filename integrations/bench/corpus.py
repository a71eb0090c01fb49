"""Judged collections, encoded once for all indexes that are compared."""

import statistics
import time
from dataclasses import dataclass

import numpy as np

from ...retrieval.evaluation import Collection
from ...retrieval.inputs import Source
from ...retrieval.tokens import Tokens


@dataclass(frozen=True)
class Corpus:
    """A collection, encoded."""

    name: str
    ids: list[str]
    texts: list[str]
    asked: list[str]  # ids of queries
    queries: list[str]
    judged: dict[str, dict[str, int]]
    tokens: Tokens
    query_tokens: list[Tokens]
    dense: np.ndarray
    dense_queries: np.ndarray
    seconds: dict[str, float]


def encoded(collection: Collection, encoder_name: str | None, at_most: int) -> Corpus:
    """Encode documents, and ``at_most`` queries."""
    from ...retrieval.encoders import MINILM, load

    encoder = load(encoder_name or MINILM)
    documents = list(Source([collection.corpus], lambda text: [text]))
    asked = list(collection.queries)[:at_most]
    queries = [collection.queries[q] for q in asked]
    started = time.perf_counter()
    tokens = encoder.encode_documents([d.text for d in documents])
    encoding = time.perf_counter() - started
    each = []
    for query in queries:
        started = time.perf_counter()
        encoder.encode_queries([query])
        each.append(1e3 * (time.perf_counter() - started))
    query_tokens = [encoder.encode_queries([q]) for q in queries]
    return Corpus(
        collection.name,
        [d.id for d in documents],
        [d.text for d in documents],
        asked,
        queries,
        collection.judged,
        tokens,
        query_tokens,
        _pooled(tokens),
        _pooled(Tokens.join(query_tokens)),
        {"encode_s": encoding, "encode_query_ms": statistics.median(each)},
    )


def _pooled(tokens: Tokens) -> np.ndarray:
    """The mean over a text's tokens, of length one: what MiniLM was trained for, up to the tokens' own lengths."""
    ends = np.cumsum(tokens.counts)
    sums = np.add.reduceat(tokens.vectors.astype(np.float32), np.concatenate([[0], ends[:-1]]), axis=0)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def union(parts: list[Corpus]) -> Corpus:
    """All collections in one; queries of all, judged on their own."""
    return Corpus(
        "union",
        [f"{p.name}:{i}" for p in parts for i in p.ids],
        [t for p in parts for t in p.texts],
        [f"{p.name}:{q}" for p in parts for q in p.asked],
        [q for p in parts for q in p.queries],
        {f"{p.name}:{q}": {f"{p.name}:{d}": g for d, g in j.items()} for p in parts for q, j in p.judged.items()},
        Tokens.join([p.tokens for p in parts]),
        [t for p in parts for t in p.query_tokens],
        np.concatenate([p.dense for p in parts]),
        np.concatenate([p.dense_queries for p in parts]),
        {"encode_s": sum(p.seconds["encode_s"] for p in parts)},
    )
