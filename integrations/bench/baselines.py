"""Indexes of other packages, in a separate process and environment because they pin other builds of torch.

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
NAMES = ("fast_plaid", "xtr_warp")


def fast_plaid(folder: Path, documents: list[Any], options: dict[str, Any]) -> Any:
    """Build a PLAID index (arXiv 2205.09707) in Rust, which PyLate also uses, and return its search function."""
    from fast_plaid import search

    index = search.FastPlaid(str(folder / "fast_plaid"), device="cpu")
    index.create(documents, nbits=4)
    settings = {"top_k": DEPTH, "n_full_scores": 4096, "n_ivf_probe": 8, **options}
    return lambda query: index.search(query[None], show_progress=False, n_processes=1, **settings)[0]


def xtr_warp(folder: Path, documents: list[Any], options: dict[str, Any]) -> Any:
    """Build a WARP index (arXiv 2501.17788) in Rust, and return its search function."""
    from xtr_warp.search import XTRWarp

    index = XTRWarp(str(folder / "xtr_warp"))
    index.create(documents, device="cpu", nbits=4, show_progress=False)
    index.load("cpu")
    return lambda query: index.search(query[None], DEPTH, num_threads=1, show_progress=False, **options)[0]


def main() -> None:
    """Run ``baselines.py NAME FOLDER THREADS OPTIONS``: build, report it, then answer query numbers line by line."""
    import torch

    name, folder, threads, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w")  # output of packages goes to standard error
    os.dup2(2, 1)
    documents, queries = (_split(folder, what) for what in ("documents", "queries"))
    began = time.perf_counter()
    search = {"fast_plaid": fast_plaid, "xtr_warp": xtr_warp}[name](folder, documents, options)
    seconds = time.perf_counter() - began
    size = sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
    torch.set_num_threads(threads)
    answers.write(json.dumps({"build_s": seconds, "bytes": size}) + "\n")
    answers.flush()
    for line in sys.stdin:
        query = queries[int(line)]
        began = time.perf_counter()
        results = search(query)
        ms = 1e3 * (time.perf_counter() - began)
        answers.write(json.dumps({"ms": ms, "documents": [int(d) for d, _ in results]}) + "\n")
        answers.flush()


def _split(folder: Path, what: str) -> list[Any]:
    """Load the vectors of each text, [tokens, dimension] float32."""
    import torch

    vectors = torch.from_numpy(np.load(folder / f"{what}.npy").astype(np.float32))
    return list(vectors.split(np.load(folder / f"{what}-counts.npy").tolist()))


if __name__ == "__main__":
    main()
