"""Benchmark of a token index with millions of tokens: `python benchmarks/token_scale.py DATA --tokens 10000000`.

DATA holds vaswani and cranfield. Documents are sampled from both with replacement, and noise is added to their tokens,
so that inverted lists are as uneven as real ones. Reported are search times on one thread, the memory of the process
that searches, and the time until 100 new documents are found.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS

from pilotfish.integrations.bench import record
from pilotfish.integrations.bench.memory import status
from pilotfish.integrations.bench.record import Record

CODECS = ("sq4", "rabitq")
NOISE, PART, QUERIES = 0.02, 500_000, 60


def main() -> None:
    """Build one index per codec, and search each in a separate process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--search", type=Path, help="Search this index; used by the script itself.")
    arguments = parser.parse_args()
    if arguments.search is not None:
        sys.stdout.write(json.dumps(search(arguments.search)) + "\n")
        return
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        queries = prepare(arguments.data, Path(folder))
        for codec in CODECS:
            place = Path(folder) / codec
            seconds = build(place, codec, Path(folder), arguments.tokens)
            np.save(place / "queries.npy", queries)
            command = [sys.executable, __file__, str(arguments.data), "--search", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results = {**json.loads(done.stdout.splitlines()[-1]), "build_s": seconds}
            rows += [
                Record(
                    "token_scale", f"tokens_{arguments.tokens}", f"xtr@codec={codec}", name, round(value, 3), unit(name)
                )
                for name, value in results.items()
            ]
    record.write_records(RESULTS / "token_scale.json", rows)


def unit(metric: str) -> str:
    """Return the unit of a metric."""
    return "ms" if "_ms" in metric else "MiB" if metric.endswith("mib") else "s"


def prepare(data: Path, folder: Path) -> np.ndarray:
    """Encode documents into files, and return encoded queries, [60, 16, width]."""
    from pilotfish.retrieval import evaluation
    from pilotfish.retrieval.encoders import load_multi_vector_encoder
    from pilotfish.retrieval.loaders import DocumentSource
    from pilotfish.retrieval.token_embeddings import TokenEmbeddings

    encoder, parts, asked = load_multi_vector_encoder(), [], []
    for name in ("vaswani", "cranfield"):
        collection = evaluation.read_collection(data / "retrieval" / name)
        parts.append(
            encoder.encode_documents([d.text for d in DocumentSource([collection.corpus], lambda text: [text])])
        )
        asked += list(collection.queries.values())[: QUERIES // 2]
    tokens = TokenEmbeddings.concatenate(parts)
    np.savez(folder / "tokens.npz", vectors=tokens.vectors, ids=tokens.token_ids, counts=tokens.counts)
    encoded = [encoder.encode_queries([q]).vectors for q in asked]
    return np.stack([np.resize(q, (16, q.shape[1])) for q in encoded])


def build(place: Path, codec: str, folder: Path, count: int) -> float:
    """Write an index of ``count`` tokens; return the seconds without those of sampling."""
    from pilotfish.plugins.xtr import XTR, XTROptions
    from pilotfish.retrieval.store import Change, Store
    from pilotfish.retrieval.store.documents import Document
    from pilotfish.retrieval.token_embeddings import TokenEmbeddings

    loaded = np.load(folder / "tokens.npz")
    vectors, ids, counts = loaded["vectors"], loaded["ids"], loaded["counts"]
    starts, rng = np.concatenate([[0], np.cumsum(counts)]), np.random.default_rng(0)
    kind, total, seconds = XTR(XTROptions(codec=codec)), 0, 0.0
    store = Store.create(place, "xtr", {"codec": codec}, {"name": "minilm", "fingerprint": ""})
    while total < count:
        sampled = rng.integers(0, len(counts), PART // int(counts.mean()))
        rows = np.concatenate([np.arange(int(starts[d]), int(starts[d + 1])) for d in sampled])
        noisy = vectors[rows].astype(np.float32)
        noisy += rng.normal(0, NOISE, noisy.shape).astype(np.float32)
        tokens = TokenEmbeddings(noisy, ids[rows], counts[sampled])
        started = time.perf_counter()
        first = store.snapshot.manifest.next_document
        shared = store.snapshot.shared or kind.train(tokens, round(len(sampled) * count / len(rows)))
        n, arrays = kind.segment(tokens, np.arange(first, first + len(sampled)), shared)
        with store.writer() as writer:
            documents = [Document(str(first + i), "", {}) for i in range(len(sampled))]
            new = shared if not store.snapshot.shared else None
            writer.commit(Change(documents, segments=[(len(sampled), n, arrays)], shared=new))
        seconds += time.perf_counter() - started
        total += n
    started = time.perf_counter()
    segments = store.snapshot.segments
    n, arrays = kind.merge([s.arrays for s in segments], store.snapshot.live)
    with store.writer() as writer:
        writer.commit(
            Change(segments=[(len(store.snapshot.live), n, arrays)], replaces=[s.about.number for s in segments])
        )
    return seconds + time.perf_counter() - started


def search(place: Path) -> dict[str, float]:
    """Measure times and memory of searches, in a process that does nothing else."""
    from threadpoolctl import threadpool_limits

    from pilotfish.plugins.xtr import XTR, XTROptions, XTRSettings
    from pilotfish.retrieval.store import Change, Store
    from pilotfish.retrieval.store.documents import Document
    from pilotfish.retrieval.token_embeddings import TokenEmbeddings

    queries = np.load(place / "queries.npy")
    before = _memory()
    store = Store(place)
    snapshot = store.snapshot
    kind = XTR(XTROptions(**snapshot.manifest.options))
    searcher = kind.searcher(snapshot.shared, [s.arrays for s in snapshot.segments], len(snapshot.live))
    results: dict[str, float] = {}
    with threadpool_limits(1):
        for probes in (8, 16, 32):
            taken = []
            for turn in range(3):
                for query in queries:
                    tokens = TokenEmbeddings(query, np.zeros(len(query), np.int32), np.array([len(query)]))
                    started = time.perf_counter()
                    kind.search(searcher, tokens, 100, XTRSettings(nprobe=probes), None)
                    if turn:
                        taken.append(1e3 * (time.perf_counter() - started))
            results[f"query_ms_median_{probes}"] = statistics.median(taken)
        results["resident_mib"] = _memory() - before
        results["peak_mib"] = _memory("VmHWM")
        new = TokenEmbeddings(
            np.tile(queries.reshape(-1, queries.shape[-1]), (7, 1))[:6000],
            np.arange(6000, dtype=np.int32) % 900,
            np.full(100, 60),
        )
        started = time.perf_counter()
        first = snapshot.manifest.next_document
        n, arrays = kind.segment(new, np.arange(first, first + 100), snapshot.shared)
        with store.writer() as writer:
            writer.commit(Change([Document(f"n{i}", "", {}) for i in range(100)], segments=[(100, n, arrays)]))
        snapshot = store.refresh()
        searcher = kind.searcher(snapshot.shared, [s.arrays for s in snapshot.segments], len(snapshot.live))
        kind.search(
            searcher, TokenEmbeddings(queries[0], np.zeros(16, np.int32), np.array([16])), 10, XTRSettings(), None
        )
        results["add_100_documents_s"] = time.perf_counter() - started
    results["files_mib"] = sum(p.stat().st_size for p in place.glob("s*-*.npy")) / 2**20
    return results


def _memory(what: str = "VmRSS") -> float:
    """Return the resident memory of this process in MiB, or its peak for ``VmHWM``."""
    mib = status(what)
    if mib is None:
        raise RuntimeError(f"{what} is not available on this system")
    return mib


if __name__ == "__main__":
    main()
