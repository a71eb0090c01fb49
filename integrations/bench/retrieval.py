"""Benchmark of indexes on queries with qrels.

Documents and queries are encoded once for all indexes (arms); encoding times are reported separately, and are not part
of build and search times. Every query runs on all indexes before the next one, so that a drift of the machine's speed
affects all of them.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ...plugins.terminal import format_number, make_table, print_plain
from ...retrieval import evaluation
from . import corpus, indexes, record
from .corpus import Corpus
from .record import Record


@dataclass(frozen=True)
class RetrievalBenchmark:
    """Settings of the benchmark; see `pilotfish bench retrieval --help`."""

    data: tuple[Path, ...]
    arms: tuple[str, ...]
    queries: int
    union: bool
    threads: int
    repeats: int
    encoder: str | None
    out: Path
    peers: Path | None = None  # Python interpreter that has the other packages


def run_retrieval_benchmark(plan: RetrievalBenchmark) -> list[Record]:
    """Run the benchmark, write the JSON, and print a table."""
    record.check_output_path(plan.out)
    collections = [evaluation.read_collection(folder) for folder in plan.data]
    for arm in plan.arms:
        indexes.parse_arm(arm)
    records: list[Record] = []
    raw: dict[str, Any] = {}
    parts = []
    for collection in collections:
        parts.append(corpus.encode_collection(collection, plan.encoder, plan.queries))
        records += _measured(parts[-1], plan, raw)
        record.write_records(plan.out, records, raw)
    if plan.union and len(parts) > 1:
        # The union is for timings; these arms are slow, and are known from the single collections.
        quick = tuple(arm for arm in plan.arms if not arm.startswith(("maxsim", "sparse_encoder", "fast_plaid")))
        records += _measured(corpus.union_of_collections(parts), replace(plan, arms=quick), raw)
        record.write_records(plan.out, records, raw)
    print_retrieval_table(records)
    return records


def _measured(c: Corpus, plan: RetrievalBenchmark, raw: dict[str, Any]) -> list[Record]:
    """Measure all arms on one collection."""
    arms = [indexes.make_arm(name, c, plan.threads, plan.peers) for name in plan.arms]
    rankings: dict[str, dict[str, dict[str, float]]] = {a.name: {} for a in arms}
    taken: dict[str, list[float]] = {a.name: [] for a in arms}
    with limited_threads(plan.threads):
        for number, query in enumerate(c.asked):
            times: dict[str, list[float]] = {a.name: [] for a in arms}
            for turn in range(plan.repeats):
                begin = (number + turn) % len(arms)
                for arm in arms[begin:] + arms[:begin]:
                    ms, results = arm.search(number)
                    times[arm.name].append(ms)
                    rankings[arm.name][query] = evaluation.ranked_ids([c.ids[d] for d in results])
            for name, values in times.items():
                taken[name].append(statistics.median(values))
    qrels = {q: c.qrels[q] for q in c.asked}
    records = []
    count = len(c.tokens.token_ids)
    for arm in arms:
        times_of = taken[arm.name]
        figures: list[tuple[str, float, str]] = [
            *((m, v, "") for m, v in evaluation.compute_metrics(qrels, rankings[arm.name]).items()),
            ("query_ms_median", statistics.median(times_of), "ms"),
            ("query_ms_p95", float(np.percentile(times_of, 95)), "ms"),
            ("build_s", arm.build_seconds, "s"),
            ("bytes_per_token", arm.bytes / count, "bytes"),
            ("index_mib", arm.bytes / 2**20, "MiB"),
            ("postings_per_document", arm.postings, ""),
            *([("build_peak_mib", arm.peak_mib, "MiB")] if arm.peak_mib is not None else []),
        ]
        size = {"documents": len(c.ids), "tokens": count, "queries": len(c.asked), "threads": plan.threads}
        records += [Record("retrieval", c.name, arm.name, m, round(v, 4), u, [], size) for m, v, u in figures]
        raw.setdefault(c.name, {})[arm.name] = {"query_ms": [round(t, 4) for t in times_of]}
    for name, value in c.seconds.items():
        records.append(Record("retrieval", c.name, "encoder", name, round(value, 3), name.rpartition("_")[2]))
    return records


class limited_threads:  # noqa: N801 -- used as a function
    """Context manager that limits the threads of NumPy, FAISS and torch."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> None:
        import faiss
        import torch
        from threadpoolctl import threadpool_limits

        faiss.omp_set_num_threads(self._count)
        torch.set_num_threads(self._count)
        self._limits = threadpool_limits(self._count)

    def __exit__(self, *_: object) -> None:
        self._limits.restore_original_limits()


SHOWN = {
    "ndcg@10": "nDCG@10",
    "recall@100": "R@100",
    "query_ms_median": "median ms",
    "query_ms_p95": "p95 ms",
    "build_s": "build s",
    "index_mib": "index MiB",
}


def print_retrieval_table(records: Sequence[Record]) -> None:
    """Print the main metrics, one table per collection."""
    tables: dict[str, Table] = {}
    for (dataset, arm), values in record.figures_by_arm(records).items():
        if "ndcg@10" not in values:
            continue
        if dataset not in tables:
            tables[dataset] = make_table("index", *SHOWN.values(), numbers=SHOWN.values(), title=dataset)
        tables[dataset].add_row(arm, *(f"{values[m]:.4f}" if "@" in m else format_number(values[m]) for m in SHOWN))
    print_plain(*tables.values())
