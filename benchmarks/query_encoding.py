"""Benchmark of query encoding: time and quality of each precision. `python benchmarks/query_encoding.py DATA`.

DATA holds cranfield. Documents are encoded once in float32; only the precision of queries changes. Each query runs in
all precisions before the next one, on one thread; encoded queries are not cached.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from common import RESULTS

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.record import Record
from pilotfish.plugins.xtr import XTR, XTROptions, XTRSettings
from pilotfish.retrieval import evaluation
from pilotfish.retrieval.encoders import load_multi_vector_encoder
from pilotfish.retrieval.loaders import DocumentSource

PRECISIONS = ("float32", "bfloat16", "int8")


def main() -> None:
    """Encode and search with each precision, and write the JSON."""
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    collection = evaluation.read_collection(parser.parse_args().data / "retrieval" / "cranfield")
    documents = list(DocumentSource([str(collection.corpus)], lambda text: [text]))
    tokens = load_multi_vector_encoder().encode_documents([d.text for d in documents])
    kind = XTR(XTROptions())
    shared = kind.train(tokens, len(documents))
    _, arrays = kind.segment(tokens, np.arange(len(documents)), shared)
    searcher = kind.searcher(shared, [arrays], len(documents))
    encoders = {p: load_multi_vector_encoder(query_precision=p) for p in PRECISIONS}
    taken: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    rankings: dict[str, dict[str, dict[str, float]]] = {p: {} for p in PRECISIONS}
    torch.set_num_threads(1)
    for encoder in encoders.values():
        encoder.encode_queries(["a query that is not counted"])
    for name, text in collection.queries.items():
        for precision, encoder in encoders.items():
            started = time.perf_counter()
            query = encoder.encode_queries([text])
            taken[precision].append(1e3 * (time.perf_counter() - started))
            results, _ = kind.search(searcher, query, 100, XTRSettings(), None)
            rankings[precision][name] = evaluation.ranked_ids([documents[d].id for d in results.tolist()])
    records = []
    for precision in PRECISIONS:
        quality = evaluation.compute_metrics(collection.qrels, rankings[precision])
        for metric, value, unit in (
            ("query_ms_median", statistics.median(taken[precision]), "ms"),
            ("ndcg@10", quality["ndcg@10"], ""),
        ):
            runs = [round(v, 3) for v in taken[precision]] if unit else []
            records.append(Record("query_encoding", "cranfield", precision, metric, round(value, 4), unit, runs))
    record.write_records(RESULTS / "query_encoding.json", records)


if __name__ == "__main__":
    main()
