"""Exact MaxSim by brute force on the GPU, and the project's XTR index on the CPU, over the same synthetic tokens.

python gpu_retrieval.py [--documents 20000] [--device cpu]

A token embedding is the mean of its vocabulary entry with added noise. A query is a sample of the tokens of one
document, with further noise. FAISS is not needed: k-means runs in torch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_common import Step

from pilotfish.integrations.vllm.bench.device_clock import Clock
from pilotfish.plugins.xtr import XTR, XTROptions, XTRSettings
from pilotfish.retrieval.token_embeddings import TokenEmbeddings
from pilotfish.retrieval.xtr import clustering

LENGTH, SIZE, WORDS, QUERY, QUERIES, BEST = 100, 128, 5000, 32, 64, 10  # WORDS: vocabulary entries


def use_torch_kmeans(device: str) -> None:
    """Replace the index's two functions that need FAISS by functions that use torch."""

    def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        c = torch.from_numpy(np.ascontiguousarray(centroids, np.float32)).to(device)
        half, nearest_ids = 0.5 * (c * c).sum(1), []
        for part in torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).split(1 << 15):
            nearest_ids.append((part.to(device) @ c.T - half).argmax(1).cpu())
        return torch.cat(nearest_ids).numpy().astype(np.int32)

    def kmeans(vectors: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
        k = min(k, len(vectors))
        sample = np.random.default_rng(seed).permutation(len(vectors))[: max(k, min(len(vectors), 64 * k))]
        v = torch.from_numpy(np.ascontiguousarray(vectors[sample], np.float32)).to(device)
        centroids = v[:k].clone()
        for _ in range(4 if k > 1 else 1):
            owner = (v @ centroids.T - 0.5 * (centroids * centroids).sum(1)).argmax(1)
            count = torch.bincount(owner, minlength=k)
            sums = torch.zeros_like(centroids).index_add_(0, owner, v)
            centroids = torch.where((count > 0)[:, None], sums / count.clamp_min(1)[:, None], centroids)
        return centroids.cpu().numpy()

    clustering.nearest_centroids, clustering.kmeans = nearest, kmeans


def time_calls(call: Callable[[], Any], repeats: int) -> list[float]:
    """Return the duration of each of ``repeats`` calls in seconds, measured after one warm-up call."""
    durations = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return durations[1:]


def work(step: Step) -> None:
    """Search by brute force, build and search the XTR index, and compare the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000, help="number of documents (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="device of MaxSim and k-means")
    arguments = parser.parse_args()
    documents, device = arguments.documents, arguments.device
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(WORDS, SIZE, generator=rng)
    ids = torch.randint(WORDS, (documents * LENGTH,), generator=rng)
    vectors = torch.nn.functional.normalize(means[ids] + 0.5 * torch.randn(len(ids), SIZE, generator=rng), dim=1)
    sources = torch.randint(documents, (QUERIES,), generator=rng)
    picks = torch.stack([torch.randperm(LENGTH, generator=rng)[:QUERY] for _ in range(QUERIES)])
    queries = vectors.view(documents, LENGTH, SIZE)[sources[:, None], picks]
    queries = torch.nn.functional.normalize(queries + 0.08 * torch.randn(queries.shape, generator=rng), dim=-1)
    dataset = f"tokens_{len(ids)}"

    dtype = torch.float16 if device == "cuda" else torch.float32
    device_vectors, device_queries = vectors.to(device, dtype), queries.to(device, dtype)

    def maxsim(batch: torch.Tensor) -> torch.Tensor:
        """Return the top documents of each query, [num_queries, BEST], for queries [num_queries, QUERY, SIZE]."""
        scores = [(q @ device_vectors.T).view(len(q), documents, LENGTH).amax(-1).float().mean(0) for q in batch]
        return torch.stack(scores).topk(BEST).indices

    exact = maxsim(device_queries).cpu().numpy()
    clock = Clock(device, 20)
    one = 1e-3 * statistics.median(clock.times(lambda: maxsim(device_queries[:1])))
    step.add(dataset, "maxsim_torch", "query_ms", one, "ms", batch=1, device=device)
    many = 1e-3 * statistics.median(clock.times(lambda: maxsim(device_queries[:16]))) / 16
    step.add(dataset, "maxsim_torch", "query_ms", many, "ms", batch=16, device=device)
    step.add(dataset, "maxsim_torch", "source_first", float((exact[:, 0] == sources.numpy()).mean()), "")

    use_torch_kmeans(device)
    started, index_type = time.perf_counter(), XTR(XTROptions())
    texts = TokenEmbeddings(vectors.numpy(), ids.numpy().astype(np.int32), np.full(documents, LENGTH))
    shared = index_type.train(texts, documents)
    _, arrays = index_type.segment(texts, np.arange(documents), shared)
    step.add(dataset, "xtr_cpu", "build_s", time.perf_counter() - started, "s")
    searcher = index_type.searcher(shared, [arrays], documents)
    tokens = [TokenEmbeddings(q, np.zeros(QUERY, np.int32), np.array([QUERY])) for q in queries.numpy()]
    for nprobe in (8, 16, 32):
        settings = XTRSettings(nprobe=nprobe)
        results = [index_type.search(searcher, q, BEST, settings, None)[0] for q in tokens]
        times = [
            1e3 * t
            for q in tokens
            for t in time_calls(partial(index_type.search, searcher, q, BEST, settings, None), 1)
        ]
        overlap = float(
            np.mean([len({*r.tolist()} & {*e.tolist()}) / BEST for r, e in zip(results, exact, strict=True)])
        )
        first = float(np.mean([len(r) and r[0] == s for r, s in zip(results, sources.tolist(), strict=True)]))
        step.add(dataset, "xtr_cpu", "query_ms", statistics.median(times), "ms", nprobe=nprobe)
        step.add(dataset, "xtr_cpu", "overlap_with_exact_10", overlap, "", nprobe=nprobe)
        step.add(dataset, "xtr_cpu", "source_first", first, "", nprobe=nprobe)
    if first < 0.9:
        step.fail(f"XTR ranks the source document first for {first:.0%} of the queries at nprobe {nprobe}, not for 90%")


if __name__ == "__main__":
    Step("retrieval").run(work)
