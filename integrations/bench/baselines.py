"""Other packages' indexes, in a process and an environment of their own: they pin other builds of torch.

`pilotfish bench retrieval --peers PYTHON` runs this file with that interpreter. It must not import Pilotfish. It reads
vectors from a folder, builds, and then answers a line for each query, with the time that the call itself took, so that
its arms can be interleaved with those of other processes.
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
    """PLAID (arXiv 2205.09707) in Rust, which PyLate uses, too."""
    from fast_plaid import search

    index = search.FastPlaid(str(folder / "fast_plaid"), device="cpu")
    index.create(documents, nbits=4)
    given = {"top_k": DEPTH, "n_full_scores": 4096, "n_ivf_probe": 8, **options}
    return lambda query: index.search(query[None], show_progress=False, n_processes=1, **given)[0]


def xtr_warp(folder: Path, documents: list[Any], options: dict[str, Any]) -> Any:
    """WARP (arXiv 2501.17788) in Rust."""
    from xtr_warp.search import XTRWarp

    index = XTRWarp(str(folder / "xtr_warp"))
    index.create(documents, device="cpu", nbits=4, show_progress=False)
    index.load("cpu")
    return lambda query: index.search(query[None], DEPTH, num_threads=1, show_progress=False, **options)[0]


def main() -> None:
    """``peers.py NAME FOLDER THREADS OPTIONS``: build, say so, then answer numbers of queries."""
    import torch

    name, folder, threads, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    said = os.fdopen(os.dup(1), "w")  # what packages print goes elsewhere
    os.dup2(2, 1)
    documents, queries = (_split(folder, what) for what in ("documents", "queries"))
    began = time.perf_counter()
    search = {"fast_plaid": fast_plaid, "xtr_warp": xtr_warp}[name](folder, documents, options)
    seconds = time.perf_counter() - began
    size = sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file())
    torch.set_num_threads(threads)
    said.write(json.dumps({"build_s": seconds, "bytes": size}) + "\n")
    said.flush()
    for line in sys.stdin:
        query = queries[int(line)]
        began = time.perf_counter()
        found = search(query)
        ms = 1e3 * (time.perf_counter() - began)
        said.write(json.dumps({"ms": ms, "documents": [int(d) for d, _ in found]}) + "\n")
        said.flush()


def _split(folder: Path, what: str) -> list[Any]:
    """Vectors of each text, [tokens, dimension] float32."""
    import torch

    vectors = torch.from_numpy(np.load(folder / f"{what}.npy").astype(np.float32))
    return list(vectors.split(np.load(folder / f"{what}-counts.npy").tolist()))


if __name__ == "__main__":
    main()
