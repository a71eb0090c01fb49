"""Evaluation of an index on queries with qrels, and tuning of its search settings."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import evaluation
from .errors import RetrievalError
from .evaluation import Collection
from .index import Index

DEPTH = 100  # hits per query
NPROBES = (4, 8, 16, 32)
T_PRIMES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


@dataclass(frozen=True)
class Trial:
    """Result of one pair of settings: nDCG@10, and the median time of a search in ms, without encoding."""

    nprobe: int
    t_prime: int
    ndcg: float
    ms: float


def evaluate_index(index: Index, collection: Collection, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure metrics and search times on a collection. The times do not include the encoding of queries.

    Raises:
        RetrievalError: None of the documents in the qrels is in the index.
    """
    qrels = {d for documents in collection.qrels.values() for d in documents}
    if not index.has(sorted(qrels)):
        raise RetrievalError(f"{collection.name}: none of the documents in its qrels is in the index")
    rankings, times = {}, []
    index.encoder.encode_queries(list(collection.queries.values()))
    for name, text in collection.queries.items():
        started = time.perf_counter()
        numbers, _ = index.search_numbers([text], DEPTH, **settings)[0]
        times.append(1e3 * (time.perf_counter() - started))
        rankings[name] = evaluation.ranked_ids(index.names(numbers.tolist()))
    metrics: dict[str, Any] = dict(evaluation.compute_metrics(collection.qrels, rankings))
    metrics["queries"] = len(times)
    metrics["query_ms_median"] = statistics.median(times)
    metrics["query_ms_p95"] = statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]
    return metrics


def tune_settings(index: Index, collection: Collection) -> list[Trial]:
    """Evaluate every combination of `NPROBES` and `T_PRIMES`.

    Raises:
        RetrievalError: The index has no inverted lists of tokens.
    """
    if not hasattr(index.kind.Settings, "nprobe"):
        raise RetrievalError(f"{index.kind.name}: only an XTR index can be tuned")
    tokens = index.stats()["postings"]
    trials = []
    for nprobe in NPROBES:
        for t_prime in (u for u in T_PRIMES if u <= max(tokens // 4, T_PRIMES[0])):
            metrics = evaluate_index(index, collection, {"nprobe": nprobe, "t_prime": t_prime})
            trials.append(Trial(nprobe, t_prime, metrics["ndcg@10"], metrics["query_ms_median"]))
    return trials


def fastest_trial(trials: list[Trial], loss: float) -> Trial:
    """Return the best trial with the smallest nprobe whose nDCG@10 is at most ``loss`` below the best."""
    best = max(t.ndcg for t in trials)
    acceptable = [t for t in trials if t.ndcg >= best - loss]
    fewest = min(t.nprobe for t in acceptable)
    return max((t for t in acceptable if t.nprobe == fewest), key=lambda t: t.ndcg)
