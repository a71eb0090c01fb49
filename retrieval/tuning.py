"""How well an index does on judged queries, and which settings are fast at little loss."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import evaluation
from .errors import RetrievalError
from .evaluation import Collection
from .index import Index

DEPTH = 100  # hits of a query
NPROBES = (4, 8, 16, 32)
T_PRIMES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


@dataclass(frozen=True)
class Trial:
    """What settings gave: nDCG@10, and milliseconds of a search whose query was encoded before."""

    nprobe: int
    t_prime: int
    ndcg: float
    ms: float


def evaluate_index(index: Index, collection: Collection, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics and times on a collection; queries are encoded before the clock runs.

    Raises:
        RetrievalError: none of the judged documents is in the index.
    """
    judged = {d for documents in collection.judged.values() for d in documents}
    if not index.has(sorted(judged)):
        raise RetrievalError(f"{collection.name}: none of its judged documents is in the index")
    rankings, taken = {}, []
    index.encoder.encode_queries(list(collection.queries.values()))
    for name, text in collection.queries.items():
        started = time.perf_counter()
        numbers, _ = index.search_numbers([text], DEPTH, **settings)[0]
        taken.append(1e3 * (time.perf_counter() - started))
        rankings[name] = evaluation.ranked_ids(index.names(numbers.tolist()))
    found: dict[str, Any] = dict(evaluation.compute_metrics(collection.judged, rankings))
    found["queries"] = len(taken)
    found["query_ms_median"] = statistics.median(taken)
    found["query_ms_p95"] = statistics.quantiles(taken, n=20)[-1] if len(taken) > 1 else taken[0]
    return found


def tune_settings(index: Index, collection: Collection) -> list[Trial]:
    """Every number of lists with every number of tokens behind which the imputed centroid stands.

    Raises:
        RetrievalError: the index has no lists of tokens.
    """
    if not hasattr(index.kind.Settings, "nprobe"):
        raise RetrievalError(f"{index.kind.name}: only an XTR index has something to tune")
    tokens = index.stats()["postings"]
    trials = []
    for nprobe in NPROBES:
        for t_prime in (u for u in T_PRIMES if u <= max(tokens // 4, T_PRIMES[0])):
            found = evaluate_index(index, collection, {"nprobe": nprobe, "t_prime": t_prime})
            trials.append(Trial(nprobe, t_prime, found["ndcg@10"], found["query_ms_median"]))
    return trials


def fastest_trial(trials: list[Trial], loss: float) -> Trial:
    """The fewest lists that lose at most ``loss`` against the best; among equals the best."""
    best = max(t.ndcg for t in trials)
    fine = [t for t in trials if t.ndcg >= best - loss]
    fewest = min(t.nprobe for t in fine)
    return max((t for t in fine if t.nprobe == fewest), key=lambda t: t.ndcg)
