"""Exact MaxSim by brute force on the GPU, beside the project's XTR index on the CPU, over the same made-up tokens.

python gpu_retrieval.py [--documents 20000] [--device cpu]

Tokens scatter about the mean of a vocabulary entry; a query is a noisy part of a document. FAISS is not needed: k-means
is done here, by torch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_common import Clock, Step

from pilotfish.plugins.xtr import XTR, XTROptions, XTRSettings
from pilotfish.retrieval.token_embeddings import TokenEmbeddings
from pilotfish.retrieval.xtr import clustering

LENGTH, SIZE, WORDS, QUERY, QUERIES, BEST = 100, 128, 5000, 32, 64, 10


def without_faiss(device: str) -> None:
    """Give the index a k-means of torch's."""

    def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        c = torch.from_numpy(np.ascontiguousarray(centroids, np.float32)).to(device)
        half, found = 0.5 * (c * c).sum(1), []
        for part in torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).split(1 << 15):
            found.append((part.to(device) @ c.T - half).argmax(1).cpu())
        return torch.cat(found).numpy().astype(np.int32)

    def kmeans(vectors: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
        k = min(k, len(vectors))
        chosen = np.random.default_rng(seed).permutation(len(vectors))[: max(k, min(len(vectors), 64 * k))]
        v = torch.from_numpy(np.ascontiguousarray(vectors[chosen], np.float32)).to(device)
        centroids = v[:k].clone()
        for _ in range(4 if k > 1 else 1):
            owner = (v @ centroids.T - 0.5 * (centroids * centroids).sum(1)).argmax(1)
            count = torch.bincount(owner, minlength=k)
            sums = torch.zeros_like(centroids).index_add_(0, owner, v)
            centroids = torch.where((count > 0)[:, None], sums / count.clamp_min(1)[:, None], centroids)
        return centroids.cpu().numpy()

    clustering.nearest_centroids, clustering.kmeans = nearest, kmeans


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Of each call, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken[1:]


def work(step: Step) -> None:
    """Build, search both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
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
    held, asked = vectors.to(device, dtype), queries.to(device, dtype)

    def maxsim(few: torch.Tensor) -> torch.Tensor:
        """The best documents of each query [queries, tokens, size]."""
        scores = [(q @ held.T).view(len(q), documents, LENGTH).amax(-1).float().mean(0) for q in few]
        return torch.stack(scores).topk(BEST).indices

    exact = maxsim(asked).cpu().numpy()
    clock = Clock(device, 20)
    one = 1e-3 * statistics.median(clock.times(lambda: maxsim(asked[:1])))
    step.add(dataset, "maxsim_torch", "query_ms", one, "ms", batch=1, device=device)
    many = 1e-3 * statistics.median(clock.times(lambda: maxsim(asked[:16]))) / 16
    step.add(dataset, "maxsim_torch", "query_ms", many, "ms", batch=16, device=device)
    step.add(dataset, "maxsim_torch", "source_first", float((exact[:, 0] == sources.numpy()).mean()), "")

    without_faiss(device)
    started, kind = time.perf_counter(), XTR(XTROptions())
    texts = TokenEmbeddings(vectors.numpy(), ids.numpy().astype(np.int32), np.full(documents, LENGTH))
    shared = kind.train(texts, documents)
    _, arrays = kind.segment(texts, np.arange(documents), shared)
    step.add(dataset, "xtr_cpu", "build_s", time.perf_counter() - started, "s")
    searcher = kind.searcher(shared, [arrays], documents)
    tokens = [TokenEmbeddings(q, np.zeros(QUERY, np.int32), np.array([QUERY])) for q in queries.numpy()]
    for nprobe in (8, 16, 32):
        settings = XTRSettings(nprobe=nprobe)
        found = [kind.search(searcher, q, BEST, settings, None)[0] for q in tokens]
        taken = [1e3 * t for q in tokens for t in seconds(partial(kind.search, searcher, q, BEST, settings, None), 1)]
        overlap = float(np.mean([len({*f.tolist()} & {*e.tolist()}) / BEST for f, e in zip(found, exact, strict=True)]))
        first = float(np.mean([len(f) and f[0] == s for f, s in zip(found, sources.tolist(), strict=True)]))
        step.add(dataset, "xtr_cpu", "query_ms", statistics.median(taken), "ms", nprobe=nprobe)
        step.add(dataset, "xtr_cpu", "overlap_with_exact_10", overlap, "", nprobe=nprobe)
        step.add(dataset, "xtr_cpu", "source_first", first, "", nprobe=nprobe)
    if first < 0.9:
        step.fail(f"XTR finds the source of {first:.0%} of the queries only")


if __name__ == "__main__":
    Step("retrieval").run(work)
