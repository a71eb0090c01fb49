"""Indexes side by side on judged queries.

Documents and queries are encoded once for all arms, and neither encoding is part of a time: it is the same for all, and
told by itself. Every query goes through all arms before the next one, so that a machine whose speed drifts slows all.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...plugins.config import ConfigError, Selection, build_options, parse_assignments
from ...plugins.manager import plugins
from ...retrieval import evaluation
from ...retrieval.evaluation import Collection
from ...retrieval.inputs import Source
from ...retrieval.tokens import Tokens
from . import record
from .record import Record

DEPTH = 100
EXACT = {"probes": 1 << 20, "impute": "kprime", "kprime": 1000}
Search = Callable[[int], Sequence[int]]  # number of a query -> numbers of documents, best first


@dataclass(frozen=True)
class Plan:
    """What to measure; see `pilotfish bench retrieval --help`."""

    data: tuple[Path, ...]
    arms: tuple[str, ...]
    queries: int
    union: bool
    threads: int
    repeats: int
    encoder: str | None
    out: Path


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


@dataclass(frozen=True)
class Arm:
    """Something that answers queries."""

    name: str
    search: Search
    build_seconds: float
    bytes: int


def run(plan: Plan) -> list[Record]:
    """Measure, write the JSON, print a table."""
    record.check(plan.out)
    collections = [evaluation.read(folder) for folder in plan.data]
    for arm in plan.arms:
        _parsed(arm)
    records: list[Record] = []
    raw: dict[str, Any] = {}
    parts = []
    for collection in collections:
        parts.append(_encoded(collection, plan))
        records += _measured(parts[-1], plan, raw)
        record.write(plan.out, records, raw)
    if plan.union and len(parts) > 1:
        # For times: exact MaxSim over everything would take most of them, and its quality is known from the parts.
        quick = tuple(arm for arm in plan.arms if arm != "maxsim")
        records += _measured(_union(parts), replace(plan, arms=quick), raw)
        record.write(plan.out, records, raw)
    _show(records)
    return records


def _encoded(collection: Collection, plan: Plan) -> Corpus:
    from ...retrieval.encoders import MINILM, load

    encoder = load(plan.encoder or MINILM)
    documents = list(Source([collection.corpus], lambda text: [text]))
    asked = list(collection.queries)[: plan.queries]
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


def _union(parts: list[Corpus]) -> Corpus:
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


def _measured(corpus: Corpus, plan: Plan, raw: dict[str, Any]) -> list[Record]:
    """All arms on one collection."""
    arms = [made for name in plan.arms if (made := _arm(name, corpus, plan)) is not None]
    rankings: dict[str, dict[str, dict[str, float]]] = {a.name: {} for a in arms}
    taken: dict[str, list[float]] = {a.name: [] for a in arms}
    with _threads(plan.threads):
        for number, query in enumerate(corpus.asked):
            times: dict[str, list[float]] = {a.name: [] for a in arms}
            for turn in range(plan.repeats):
                begin = (number + turn) % len(arms)
                for arm in arms[begin:] + arms[:begin]:
                    started = time.perf_counter()
                    found = arm.search(number)
                    times[arm.name].append(1e3 * (time.perf_counter() - started))
                    rankings[arm.name][query] = evaluation.ranking([corpus.ids[d] for d in found])
            for name, values in times.items():
                taken[name].append(statistics.median(values))
    judged = {q: corpus.judged[q] for q in corpus.asked}
    records = []
    count = len(corpus.tokens.ids)
    for arm in arms:
        times_of = taken[arm.name]
        figures: list[tuple[str, float, str]] = [
            *((m, v, "") for m, v in evaluation.measure(judged, rankings[arm.name]).items()),
            ("query_ms_median", statistics.median(times_of), "ms"),
            ("query_ms_p95", statistics.quantiles(times_of, n=20)[-1], "ms"),
            ("build_s", arm.build_seconds, "s"),
            ("bytes_per_token", arm.bytes / count, "bytes"),
        ]
        size = {"documents": len(corpus.ids), "tokens": count, "queries": len(corpus.asked), "threads": plan.threads}
        records += [Record("retrieval", corpus.name, arm.name, m, round(v, 4), u, [], size) for m, v, u in figures]
        raw.setdefault(corpus.name, {})[arm.name] = {"query_ms": [round(t, 4) for t in times_of]}
    for name, value in corpus.seconds.items():
        records.append(Record("retrieval", corpus.name, "encoder", name, round(value, 3), name.rpartition("_")[2]))
    return records


class _threads:  # noqa: N801 -- used as a function
    """So many threads for numpy, FAISS and torch."""

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


# --------------------------------------------------------------------------------------------------------------- arms


def _parsed(arm: str) -> Selection:
    """An arm's name and options.

    Raises:
        ConfigError: there is no such arm.
    """
    chosen = parse_assignments(arm.replace("@exact", "").replace("@", ","))
    if chosen.name not in ("bm25", "dense", "maxsim"):
        cls: Any = plugins().get("index", chosen.name, "arm")
        _split(cls, chosen.options)
    return chosen


def _split(cls: Any, options: Any) -> tuple[Any, dict[str, Any]]:
    """Options of making an index, and those of searching it."""
    making = {k: v for k, v in options.items() if k in cls.Options.__dataclass_fields__}
    searching = {k: v for k, v in options.items() if k not in making}
    return build_options(cls.Options, making, cls.name), asdict(build_options(cls.Settings, searching, cls.name))


def _arm(name: str, corpus: Corpus, plan: Plan) -> Arm | None:
    chosen = _parsed(name)
    started = time.perf_counter()
    if chosen.name == "bm25":
        if find_spec("bm25s") is None:
            raise ConfigError("arm bm25 needs bm25s and PyStemmer; pip install pilotfish[bench]")
        search, size = _bm25(corpus)
    elif chosen.name == "dense":
        search, size = _dense(corpus)
    elif chosen.name == "maxsim":
        search, size = _maxsim(corpus)
    else:
        return _index(name, chosen, corpus)
    return Arm(name, search, time.perf_counter() - started, size)


def _bm25(corpus: Corpus) -> tuple[Search, int]:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    made = bm25s.BM25(k1=0.9, b=0.4)
    made.index(bm25s.tokenize(corpus.texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)

    def search(number: int) -> Sequence[int]:
        words = bm25s.tokenize([corpus.queries[number]], stopwords="en", stemmer=stemmer, show_progress=False)
        depth = min(DEPTH, len(corpus.ids))
        return made.retrieve(words, k=depth, show_progress=False, n_threads=1)[0][0].tolist()

    return search, sum(np.asarray(v).nbytes for v in made.scores.values())


def _dense(corpus: Corpus) -> tuple[Search, int]:
    import faiss

    made = faiss.IndexFlatIP(corpus.dense.shape[1])
    made.add(np.ascontiguousarray(corpus.dense, np.float32))
    return (
        lambda number: made.search(np.ascontiguousarray(corpus.dense_queries[number : number + 1]), DEPTH)[1][
            0
        ].tolist(),
        corpus.dense.nbytes,
    )


def _maxsim(corpus: Corpus) -> tuple[Search, int]:
    """Every token of every document, in whole precision."""
    vectors = corpus.tokens.vectors.astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(corpus.tokens.counts)[:-1]])

    def search(number: int) -> Sequence[int]:
        products = corpus.query_tokens[number].vectors.astype(np.float32) @ vectors.T
        return np.argsort(-np.maximum.reduceat(products, starts, axis=1).sum(0), kind="stable")[:DEPTH].tolist()

    return search, vectors.nbytes


def _index(name: str, chosen: Selection, corpus: Corpus) -> Arm:
    """An index of ours, in its store, opened as readers open it."""
    from ...retrieval.store import Change, Store
    from ...retrieval.store.documents import Document

    cls: Any = plugins().get("index", chosen.name, "arm")
    options, settings = _split(cls, chosen.options)
    if name.endswith("@exact"):
        settings |= EXACT
    kind = cls(options)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "index", chosen.name, asdict(options), {"name": "", "fingerprint": ""})
        documents = [Document(i, t, {}) for i, t in zip(corpus.ids, corpus.texts, strict=True)]
        started = time.perf_counter()
        shared = kind.train(corpus.tokens, len(corpus.ids))
        rows, arrays = kind.segment(corpus.tokens, np.arange(len(corpus.ids)), shared)
        with store.writer() as writer:
            writer.commit(Change(documents, segments=[(len(corpus.ids), rows, arrays)], shared=shared))
        seconds = time.perf_counter() - started
        snapshot = store.snapshot
        store.close()
        size = sum(f.bytes for f in snapshot.manifest.files().values())
        # The files go with the folder; what is mapped stays.
        searcher = kind.searcher(snapshot.shared, [s.arrays for s in snapshot.segments], len(corpus.ids))
    chosen_settings = cls.Settings(**settings)

    def search(number: int) -> Sequence[int]:
        return kind.search(searcher, corpus.query_tokens[number], DEPTH, chosen_settings, None)[0].tolist()

    return Arm(name, search, seconds, size)


def _show(records: Sequence[Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = ("ndcg@10", "recall@100", "query_ms_median", "query_ms_p95", "build_s", "bytes_per_token")
    table = Table("collection", "arm", *metrics)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        found.setdefault((r.dataset, r.arm), {})[r.metric] = r.value
    for (dataset, arm), values in found.items():
        if "ndcg@10" in values:
            table.add_row(dataset, arm, *(f"{values[m]:.4g}" for m in metrics))
    Console().print(table)
