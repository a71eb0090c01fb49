"""Export of the token vectors of an index to FAISS."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pilotfish._internal import atomic_write

from ..errors import RetrievalError


def export_to_faiss(index: Any, out: Path) -> int:
    """Write the decoded vectors of all live tokens as an inner-product ``IndexIVFFlat``; return their number.

    The id of a vector in FAISS is a line number, from 0 on, of ``OUT.documents.jsonl``; the line contains the id of its
    document. Query vectors have to be multiplied with ``OUT.projection.npy`` and normalised.

    Raises:
        RetrievalError: The index is not an XTR index, or is empty.
        OSError: The files cannot be written.
    """
    import faiss

    snapshot, layout = index.snapshot, getattr(index.kind, "layout", None)
    if layout is None or not snapshot.segments:
        raise RetrievalError("only an XTR index that holds documents can be exported")
    centroids = np.ascontiguousarray(snapshot.shared["centroids"], np.float32)
    lists, d = centroids.shape
    coarse = faiss.IndexFlatIP(d)
    coarse.add(centroids)
    faiss_index = faiss.IndexIVFFlat(coarse, d, lists, faiss.METRIC_INNER_PRODUCT)
    faiss_index.is_trained = True
    numbers: list[np.ndarray] = []
    total = 0
    for segment in snapshot.segments:
        s = segment.arrays
        for i in np.flatnonzero(np.diff(s["starts"])):
            part = slice(int(s["starts"][i]), int(s["starts"][i + 1]))
            mask = snapshot.live[s["documents"][part]]
            if not mask.any():
                continue
            vectors = centroids[i] + layout.coder.decode(snapshot.shared, s["codes"][part][mask])
            ids = np.arange(total, total + len(vectors), dtype=np.int64)
            faiss_index.invlists.add_entries(
                int(i),
                len(ids),
                faiss.swig_ptr(ids),
                faiss.swig_ptr(np.ascontiguousarray(vectors, np.float32).view(np.uint8)),
            )
            numbers.append(s["documents"][part][mask])
            total += len(ids)
    faiss_index.ntotal = total
    # The index comes last: where it exists, the files that explain it do too.
    rows = np.concatenate(numbers).tolist()
    names = {n: d.id for n, d in index.documents(sorted(set(rows))).items()}
    text = "".join(json.dumps(names[n], ensure_ascii=False) + "\n" for n in rows)
    atomic_write.write_bytes(out.with_name(f"{out.name}.documents.jsonl"), text.encode())
    atomic_write.write_array(out.with_name(f"{out.name}.projection.npy"), snapshot.shared["projection"])
    partial = out.with_name(f".{out.name}.partial")
    try:
        faiss.write_index(faiss_index, str(partial))
        partial.replace(out)
    except RuntimeError as error:
        raise OSError(None, str(error).splitlines()[-1], str(out)) from None
    finally:
        partial.unlink(missing_ok=True)
    return total
