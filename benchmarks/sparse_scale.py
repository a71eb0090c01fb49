"""Benchmark of the sparse index with a million documents: `python benchmarks/sparse_scale.py`.

Documents are synthetic: 100 terms each, sampled by Zipf's law, with weights that grow with the rarity of a term, like
learned weights. Each query runs on all arms before the next one. All arms have to return the same scores.
"""

import argparse
import statistics
import time

import numpy as np
from common import RESULTS
from scipy import sparse

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.record import Record
from pilotfish.retrieval import sparse_index
from pilotfish.retrieval.sparse_vectors import SparseVectors

VOCABULARY, WORDS, ASKED, QUERIES, EXPONENT = 30_000, 100, 20, 40, 0.8


def main() -> None:
    """Build the index, run the queries, compare the scores, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=1_000_000)
    count = parser.parse_args().documents
    rng = np.random.default_rng(0)
    odds = 1 / np.arange(1, VOCABULARY + 1) ** EXPONENT
    odds /= odds.sum()
    rarity = np.log1p(1 / odds).astype(np.float32) / 10
    words = drawn(rng, count, odds, rarity)
    started = time.perf_counter()
    shared = sparse_index.train_impacts(words.values, 8)
    arrays = sparse_index.build_sparse_segment(words, np.arange(count), shared, 8)
    build = time.perf_counter() - started
    searcher = sparse_index.InvertedIndexSearcher(shared, [arrays], count)
    step = shared["step"][0]
    kept = np.minimum(np.rint(words.values / step), 255).astype(np.float32) * step
    rows = sparse.csr_matrix((kept, words.indices, np.append(0, np.cumsum(words.counts))), (count, VOCABULARY))
    lists = rows.T.tocsr()
    records = [
        Record("sparse_scale", f"documents_{count}", "blocks", "build_s", round(build, 2), "s"),
        Record(
            "sparse_scale",
            f"documents_{count}",
            "blocks",
            "bytes_per_posting",
            round(sum(a.nbytes for a in arrays.values()) / len(words.indices), 2),
            "bytes",
        ),
    ]
    for k in (10, 100):
        taken = asked(rng, k, odds, rarity, searcher, rows, lists)
        for arm, values in taken.items():
            size = {"documents": count, "k": k, "queries": QUERIES}
            records.append(
                Record(
                    "sparse_scale",
                    f"documents_{count}",
                    f"{arm}@k={k}",
                    "query_ms_median",
                    round(statistics.median(values), 3),
                    "ms",
                    [round(v, 3) for v in values],
                    size,
                )
            )
    record.write_records(RESULTS / "sparse_scale.json", records)


def drawn(rng: np.random.Generator, count: int, odds: np.ndarray, rarity: np.ndarray) -> SparseVectors:
    """Sample random documents."""
    ids = np.sort(rng.choice(VOCABULARY, (count, WORDS), p=odds), axis=1)
    first = np.ones(ids.shape, np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    weights = (rng.gamma(2.0, 0.5, ids.shape).astype(np.float32) + 0.05) * rarity[ids]
    return SparseVectors(ids[first].astype(np.int32), weights[first], np.ones(int(first.sum()), np.bool_), first.sum(1))


def asked(
    rng: np.random.Generator,
    k: int,
    odds: np.ndarray,
    rarity: np.ndarray,
    searcher: sparse_index.InvertedIndexSearcher,
    rows: sparse.csr_matrix,
    lists: sparse.csr_matrix,
) -> dict[str, list[float]]:
    """Return the milliseconds of each arm for each query.

    Raises:
        AssertionError: The scores of two arms differ.
    """
    taken: dict[str, list[float]] = {"blocks": [], "exhaustive": [], "scipy_lists": [], "scipy_rows": []}
    for number in range(QUERIES + 1):
        ids = np.unique(rng.choice(VOCABULARY, ASKED, p=odds)).astype(np.int32)
        weights = (rng.gamma(2.0, 0.5, len(ids)) * rarity[ids]).astype(np.float32)
        query = SparseVectors(ids, weights, np.ones(len(ids), np.bool_), np.array([len(ids)]))
        row = sparse.csr_matrix((weights, ids, [0, len(ids)]), (1, VOCABULARY))
        dense = np.zeros(VOCABULARY, np.float32)
        dense[ids] = weights
        arms = {
            "blocks": lambda q=query: searcher.search(q, k)[1],
            "exhaustive": lambda q=query: searcher.search(q, k, exhaustive=True)[1],
            "scipy_lists": lambda r=row: largest(np.asarray((r @ lists).data), k),
            "scipy_rows": lambda d=dense: largest(rows @ d, k),
        }
        scores = {}
        for name, arm in arms.items():
            started = time.perf_counter()
            scores[name] = arm()
            if number:  # the first one compiles
                taken[name].append(1e3 * (time.perf_counter() - started))
        assert np.array_equal(scores["blocks"], scores["exhaustive"])
        for other in ("scipy_rows", "scipy_lists"):
            np.testing.assert_allclose(scores["blocks"], scores[other], rtol=1e-4)
    return taken


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest scores in descending order."""
    return np.sort(np.partition(scores, -k)[-k:])[::-1]


if __name__ == "__main__":
    main()
