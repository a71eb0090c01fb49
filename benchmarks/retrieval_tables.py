"""Tables of indexes: `pilotfish bench retrieval`."""

from common import figures, load, markdown, provenance

NAMES = {
    "bm25s": "BM25 of bm25s",
    "faiss_flat": "dense MiniLM, FAISS flat",
    "maxsim": "exact MaxSim, 384 dimensions",
    "sparse_encoder": "SparseEncoder of sentence-transformers",
    "fast_plaid": "fast-plaid",
    "xtr_warp": "xtr-warp-rs",
}
COLUMNS = (
    ("ndcg@10", "nDCG@10", "{:.3f}"),
    ("recall@100", "Recall@100", "{:.3f}"),
    ("query_ms_median", "ms, median", "{:.2f}"),
    ("query_ms_p95", "ms, p95", "{:.2f}"),
    ("build_s", "build s", "{:.1f}"),
    ("bytes_per_token", "bytes a token", "{:.0f}"),
)


def label(arm: str) -> str:
    """An arm as readers know it."""
    kind, *options = arm.split("@")
    rest = ", ".join("k' = 1000 over everything" if o == "exact" else f"`{o}`" for o in options)
    if kind in NAMES:
        return f"{NAMES[kind]}, {rest}" if rest else NAMES[kind]
    shown = kind if kind in ("dense", "hybrid") else kind.upper()
    return f"{shown}, {rest}" if rest else f"**{shown}**"


def retrieval() -> str:
    """Quality, time and memory of all arms, by collection."""
    result = load("retrieval")
    rows = [
        [dataset, label(arm), *(form.format(values[metric]) for metric, _, form in COLUMNS)]
        for (dataset, _, arm), values in figures(result).items()
        if "ndcg@10" in values
    ]
    return markdown(["collection", "index", *(title for _, title, _ in COLUMNS)], rows) + provenance(result)
