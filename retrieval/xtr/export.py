"""The tokens of an index as a plain FAISS index."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pilotfish._internal import atomic_write

from ..errors import RetrievalError


def export_to_faiss(index: Any, out: Path) -> int:
    """Write an ``IndexIVFFlat`` by inner product of all live tokens, decoded; returns how many.

    A vector's number in FAISS is its line in ``OUT.documents.jsonl``, whose lines hold the ids of documents. Queries
    have to be projected as the index projects them: ``OUT.projection.npy``.

    Raises:
        RetrievalError: the index is of another kind, or empty.
        OSError: the files cannot be written.
    """
    import faiss

    snapshot, layout = index.snapshot, getattr(index.kind, "layout", None)
    if layout is None or not snapshot.segments:
        raise RetrievalError("only an XTR index that holds documents can be exported")
    centroids = np.ascontiguousarray(snapshot.shared["centroids"], np.float32)
    lists, d = centroids.shape
    coarse = faiss.IndexFlatIP(d)
    coarse.add(centroids)
    made = faiss.IndexIVFFlat(coarse, d, lists, faiss.METRIC_INNER_PRODUCT)
    made.is_trained = True
    numbers: list[np.ndarray] = []
    total = 0
    for segment in snapshot.segments:
        s = segment.arrays
        for i in np.flatnonzero(np.diff(s["starts"])):
            part = slice(int(s["starts"][i]), int(s["starts"][i + 1]))
            kept = snapshot.live[s["documents"][part]]
            if not kept.any():
                continue
            vectors = centroids[i] + layout.coder.decode(snapshot.shared, s["codes"][part][kept])
            ids = np.arange(total, total + len(vectors), dtype=np.int64)
            made.invlists.add_entries(
                int(i),
                len(ids),
                faiss.swig_ptr(ids),
                faiss.swig_ptr(np.ascontiguousarray(vectors, np.float32).view(np.uint8)),
            )
            numbers.append(s["documents"][part][kept])
            total += len(ids)
    made.ntotal = total
    partial = out.with_name(f".{out.name}.partial")
    try:
        faiss.write_index(made, str(partial))
        partial.replace(out)
    except RuntimeError as error:
        raise OSError(None, str(error).splitlines()[-1], str(out)) from None
    finally:
        partial.unlink(missing_ok=True)
    rows = np.concatenate(numbers).tolist()
    names = {n: d.id for n, d in index.documents(sorted(set(rows))).items()}
    text = "".join(json.dumps(names[n], ensure_ascii=False) + "\n" for n in rows)
    atomic_write.write_bytes(out.with_name(f"{out.name}.documents.jsonl"), text.encode())
    atomic_write.write_array(out.with_name(f"{out.name}.projection.npy"), snapshot.shared["projection"])
    return total
