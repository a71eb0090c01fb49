#!/usr/bin/env python3
"""Latency and recall of sparse indexes: BM25 vs. bm25s, VDR vs. Seismic and Block-Max Pruning (BMP).

usage: python benchmarks/sparse_baselines.py BASELINES_PYTHON COLLECTION...

BASELINES_PYTHON is the interpreter of an environment with `pyseismic-lsr`, `bmp` and torch. Queries are encoded before
the timing starts. Latencies are those of one thread. Recall is measured against the first arm, which searches exactly
over quantised impacts. Each index runs all queries three times, in turn with the others; the shortest time of a query
counts.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

from pilotfish.integrations.bench import corpus, indexes, record
from pilotfish.integrations.bench.record import Record
from pilotfish.integrations.bench.retrieval import limited_threads
from pilotfish.retrieval import evaluation

QUERIES, REPEATS = 250, 3
BM25_ARMS = ("bm25", "bm25s", "bm25s@backend=numba")
LEARNED_SPARSE_ARMS = (
    "vdr",
    "vdr@exhaustive=true",
    "bmp",
    "bmp@alpha=0.85",
    "bmp@alpha=0.7",
    "seismic@query_cut=5@heap_factor=0.9",
    "seismic@query_cut=10@heap_factor=0.8",
    "seismic@query_cut=20@heap_factor=0.9",
    "seismic@query_cut=64@heap_factor=1.0",
    "seismic@n_postings=100000@max_fraction=100@query_cut=64@heap_factor=1.0",
)
OUT = Path("benchmarks/results/sparse_baselines.json")


def measure(collection: corpus.Corpus, arms: tuple[str, ...], baselines_python: Path) -> list[Record]:
    """Measure arms, of which the first one is exact, on one collection."""
    made = [indexes.make_arm(name, collection, 1, baselines_python) for name in arms]
    times: dict[str, list[list[float]]] = {a.name: [] for a in made}
    found: dict[str, list[list[int]]] = {}
    with limited_threads(1):
        # All queries of an arm run in a row: after a switch to another process, caches are cold.
        for turn in range(REPEATS):
            for arm in made[turn % len(made) :] + made[: turn % len(made)]:
                answers = [arm.search(number) for number in range(len(collection.queries))]
                found[arm.name] = [list(results) for _, results in answers]
                times[arm.name].append([ms for ms, _ in answers])
    taken = {name: np.min(rounds, axis=0) for name, rounds in times.items()}
    qrels = {q: collection.qrels[q] for q in collection.asked}
    records = []
    size = {"documents": len(collection.ids), "queries": len(collection.asked), "threads": 1}
    for arm in made:
        ranked = {
            q: evaluation.ranked_ids([collection.ids[d] for d in results])
            for q, results in zip(collection.asked, found[arm.name], strict=True)
        }
        figures = {
            "query_ms_median": (float(np.median(taken[arm.name])), "ms"),
            "query_ms_p95": (float(np.percentile(taken[arm.name], 95)), "ms"),
            "exact_recall@10": (overlap(found[made[0].name], found[arm.name], 10), ""),
            "exact_recall@100": (overlap(found[made[0].name], found[arm.name], 100), ""),
            "ndcg@10": (evaluation.compute_metrics(qrels, ranked)["ndcg@10"], ""),
            "build_s": (arm.build_seconds, "s"),
            "index_mib": (arm.bytes / 2**20, "MiB"),
        }
        records += [
            Record("sparse_baselines", collection.name, arm.name, metric, round(value, 4), unit, [], size)
            for metric, (value, unit) in figures.items()
        ]
    return records


def overlap(exact: list[list[int]], found: list[list[int]], k: int) -> float:
    """Return the mean share of the exact results among the results found, at rank ``k``."""
    shares = [len(set(e[:k]) & set(f[:k])) / len(e[:k]) for e, f in zip(exact, found, strict=True) if e]
    return statistics.fmean(shares)


def main() -> None:
    """Measure the collections named on the command line."""
    baselines_python, folders = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
    sys.argv[1] = "BASELINES_PYTHON"  # the records hold the command, but no path of a machine
    records: list[Record] = []
    parts = [corpus.encode_collection(evaluation.read_collection(folder), None, QUERIES) for folder in folders]
    for collection in [*parts, *([corpus.union_of_collections(parts)] if len(parts) > 1 else [])]:
        for arms in (BM25_ARMS, LEARNED_SPARSE_ARMS):
            records += measure(collection, arms, baselines_python)
            record.write_records(OUT, records, {})


if __name__ == "__main__":
    main()
