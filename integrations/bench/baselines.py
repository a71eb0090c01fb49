"""Indexes of other packages, in a separate process and environment because their dependencies conflict with ours.

The environment needs torch.

`pilotfish bench retrieval --peers PYTHON` runs this file with that interpreter, so it must not import Pilotfish. It
reads vectors from a folder, builds an index, and answers each query with a line that holds the time of the call itself,
so that its queries can be interleaved with those of other processes.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DEPTH = 100
BUILD_OPTIONS: dict[str, tuple[str, ...]] = {  # all other options belong to the search
    "fast_plaid": (),
    "xtr_warp": (),
    "seismic": (
        "n_postings",
        "centroid_fraction",
        "min_cluster_size",
        "summary_energy",
        "max_fraction",
        "doc_cut",
        "nknn",
        "knn_path",
        "batched_indexing",
    ),
    "bmp": ("bsize",),
}
SPARSE = ("seismic", "bmp")
NAMES = tuple(BUILD_OPTIONS)


def fast_plaid(folder: Path, documents: list[Any], queries: list[Any]) -> Any:
    """Build a PLAID index (arXiv 2205.09707) in Rust, which PyLate also uses, and return its search function."""
    from fast_plaid import search

    index = search.FastPlaid(str(folder / "fast_plaid"), device="cpu")
    index.create(documents, nbits=4)
    defaults = {"top_k": DEPTH, "n_full_scores": 4096, "n_ivf_probe": 8, "show_progress": False, "n_processes": 1}
    return lambda number, **options: index.search(queries[number][None], **{**defaults, **options})[0]


def xtr_warp(folder: Path, documents: list[Any], queries: list[Any]) -> Any:
    """Build a WARP index (arXiv 2501.17788) in Rust, and return its search function."""
    from xtr_warp.search import XTRWarp

    index = XTRWarp(str(folder / "xtr_warp"))
    index.create(documents, device="cpu", nbits=4, show_progress=False)
    index.load("cpu")
    defaults = {"num_threads": 1, "show_progress": False}
    return lambda number, **options: index.search(queries[number][None], DEPTH, **{**defaults, **options})[0]


def seismic(folder: Path, documents: list[Any], queries: list[Any], **options: Any) -> Any:
    """Build a Seismic index (arXiv 2404.18812) in Rust, and return its search function; approximate."""
    import seismic as package

    text = package.get_seismic_string()
    dataset = package.SeismicDataset()
    for number, (terms, weights) in enumerate(documents):
        dataset.add_document(str(number), terms.astype(str).astype(text), weights)
    index = package.SeismicIndex.build_from_dataset(dataset, num_threads=0, **options)
    (folder / "seismic").mkdir()
    index.save(str(folder / "seismic" / "index"))
    named = [(terms.astype(str).astype(text), weights) for terms, weights in queries]

    def search(number: int, query_cut: int = 10, heap_factor: float = 0.8, **more: Any) -> list[tuple[str, float]]:
        options = {"k": DEPTH, "query_cut": query_cut, "heap_factor": heap_factor, **more}
        return [(d, score) for _, score, d in index.search("", *named[number], **options)]

    return search


def bmp(folder: Path, documents: list[Any], queries: list[Any], bsize: int = 8) -> Any:
    """Build an index of Block-Max Pruning (arXiv 2405.01117) in Rust, and return its search function.

    Impacts have 8 bits and query weights are rounded to 0..255. With ``alpha`` and ``beta`` of 1, the default, the
    search is exact over these values.
    """
    import bmp as package

    (folder / "bmp").mkdir()
    path = str(folder / "bmp" / "index")
    indexer = package.Indexer(path, bsize, True)
    step = max(float(weights.max(initial=0)) for _, weights in documents) / 255
    for number, (terms, weights) in enumerate(documents):
        impacts = np.rint(weights / step).astype(int)
        pairs = zip(terms.tolist(), impacts.tolist(), strict=True)
        indexer.add_document(str(number), {str(t): w for t, w in pairs if w > 0})
    indexer.finish()
    index = package.Searcher(path)
    scale = 255 / max(float(weights.max(initial=0)) for _, weights in queries)
    named = [
        {str(t): float(round(w * scale)) for t, w in zip(terms.tolist(), weights.tolist(), strict=True)}
        for terms, weights in queries
    ]

    def search(number: int, alpha: float = 1.0, beta: float = 1.0) -> list[tuple[str, float]]:
        found, scores = index.search(named[number], DEPTH, alpha, beta)
        return list(zip(found, scores, strict=True))

    return search


def main() -> None:
    """Run ``baselines.py NAME FOLDER THREADS OPTIONS``: build, report it, then answer queries line by line.

    A line holds the number of a query and the search options. So one index serves all search options.
    """
    import torch

    name, folder, threads, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w")  # output of packages goes to standard error
    os.dup2(2, 1)
    read = _sparse_rows if name in SPARSE else _split
    documents, queries = (read(folder, what) for what in ("documents", "queries"))
    builders = {"fast_plaid": fast_plaid, "xtr_warp": xtr_warp, "seismic": seismic, "bmp": bmp}
    began = time.perf_counter()
    search = builders[name](folder, documents, queries, **options)
    seconds = time.perf_counter() - began
    size = sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
    torch.set_num_threads(threads)
    answers.write(json.dumps({"build_s": seconds, "bytes": size}) + "\n")
    answers.flush()
    for line in sys.stdin:
        number, searching = json.loads(line)
        began = time.perf_counter()
        results = search(number, **searching)
        ms = 1e3 * (time.perf_counter() - began)
        answers.write(json.dumps({"ms": ms, "documents": [int(d) for d, _ in results]}) + "\n")
        answers.flush()


def _split(folder: Path, what: str) -> list[Any]:
    """Load the vectors of each text, [tokens, dimension] float32."""
    import torch

    vectors = torch.from_numpy(np.load(folder / f"{what}.npy").astype(np.float32))
    return list(vectors.split(np.load(folder / f"{what}-counts.npy").tolist()))


def _sparse_rows(folder: Path, what: str) -> list[Any]:
    """Load the term weights of each text: term ids and float32 weights."""
    arrays = np.load(folder / f"{what}.npz")
    ends = np.cumsum(arrays["counts"])[:-1]
    return list(zip(np.split(arrays["indices"], ends), np.split(arrays["values"], ends), strict=True))


if __name__ == "__main__":
    main()
