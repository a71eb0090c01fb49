"""Tables of indexes: `pilotfish bench retrieval`."""

from common import figures, load, markdown, provenance

NAMES = {
    "bm25s": "BM25 of bm25s",
    "faiss_flat": "dense MiniLM, FAISS flat",
    "maxsim": "exact MaxSim, 384 dimensions",
    "sparse_encoder": "SparseEncoder of sentence-transformers",
    "fast_plaid": "fast-plaid",
    "xtr_warp": "xtr-warp-rs",
    "seismic": "Seismic",
    "bmp": "BMP",
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
    """Return the label of an arm."""
    kind, *options = arm.split("@")
    rest = ", ".join("k' = 1000 over everything" if o == "exact" else f"`{o}`" for o in options)
    if kind in NAMES:
        return f"{NAMES[kind]}, {rest}" if rest else NAMES[kind]
    shown = kind if kind in ("dense", "hybrid") else kind.upper()
    return f"{shown}, {rest}" if rest else f"**{shown}**"


TOKENS = ("bm25s", "faiss_flat", "maxsim", "xtr", "fast_plaid", "xtr_warp")
WORDS = ("bm25s", "bm25", "vdr", "sparse_encoder")
MORE = (("postings_per_document", "words a document", "{:.0f}"), ("index_mib", "MiB", "{:.1f}"))


def _table(benchmark: str, kinds: tuple[str, ...], more: tuple[tuple[str, str, str], ...] = ()) -> str:
    """Return a table of the arms of some index kinds, by collection."""
    return _arms(benchmark, kinds, (*(c for c in COLUMNS if not more or c[0] != "bytes_per_token"), *more))


def _arms(benchmark: str, kinds: tuple[str, ...], columns: tuple[tuple[str, str, str], ...], texts: int = 1) -> str:
    """Return a table of the given columns, (metric, title, format), with a row for each collection and arm."""
    result = load(benchmark)
    rows = [
        [dataset, label(arm), *(form.format(values[metric]) for metric, _, form in columns)]
        for (dataset, _, arm), values in figures(result).items()
        if "ndcg@10" in values and arm.split("@")[0] in kinds
    ]
    return markdown(["collection", "index", *(title for _, title, _ in columns)], rows, texts) + provenance(result)


def curves(*names: str) -> str:
    """Return the table of latency and recall of multi-vector indexes by search options, the fastest first."""
    results = [load(name) for name in names]
    found = [(d, arm, v) for result in results for (d, _, arm), v in figures(result).items() if "ndcg@10" in v]
    exact = {d: v for d, arm, v in found if arm == "maxsim"}
    groups = list(dict.fromkeys((d, arm.split("@")[0]) for d, arm, _ in found))
    found.sort(key=lambda one: (groups.index((one[0], one[1].split("@")[0])), one[2]["query_ms_median"]))
    rows = []
    for dataset, arm, values in found:
        quality = [f"{values[m]:.3f} ({values[m] - exact[dataset][m]:+.3f})" for m in ("ndcg@10", "recall@100")]
        latency = [f"{values[m]:.2f}" for m in ("query_ms_median", "query_ms_p95")]
        rows.append([dataset, label(arm), *latency, *quality])
    head = ["collection", "index", "ms, median", "ms, p95", "nDCG@10 (to MaxSim)", "Recall@100 (to MaxSim)"]
    return markdown(head, rows, texts=2) + "".join(map(provenance, results))


def retrieval() -> str:
    """Return the table of multi-vector indexes: XTR and other packages."""
    return _table("retrieval", TOKENS)


def sparse_baselines(kinds: tuple[str, ...]) -> str:
    """Return the table of latency and recall of sparse indexes of some kinds, beside other packages."""
    columns = (
        ("query_ms_median", "ms, median", "{:.3f}"),
        ("query_ms_p95", "ms, p95", "{:.3f}"),
        ("exact_recall@10", "recall@10 of exact", "{:.3f}"),
        ("exact_recall@100", "recall@100 of exact", "{:.3f}"),
        ("ndcg@10", "nDCG@10", "{:.3f}"),
        ("build_s", "build s", "{:.1f}"),
    )
    return _arms("sparse_baselines", kinds, columns, texts=2)


def retrieval_memory() -> str:
    """Return the table of peak memory and time to build, by arm."""
    found = {k: v for k, v in figures(load("retrieval_memory")).items() if "build_peak_mib" in v}
    rows = [
        [
            dataset,
            label(arm),
            *(f"{values[m]:.0f}" for m in ("build_peak_mib", "index_mib")),
            f"{values['build_s']:.1f}",
        ]
        for (dataset, _, arm), values in found.items()
    ]
    head = ["collection", "index", "MiB at most, while built", "MiB on disk", "build s"]
    return markdown(head, rows) + provenance(load("retrieval_memory"))


def retrieval_scifact() -> str:
    """Return the table of all indexes on scifact, with the queries of its training split."""
    return _table("retrieval_scifact", (*TOKENS, *WORDS, "dense", "hybrid"))


def retrieval_words() -> str:
    """Return the table of sparse indexes: VDR with its query and document encodings, and BM25."""
    return _table("retrieval", WORDS, MORE)


def retrieval_sparse_encoder() -> str:
    """Return the table of sparse indexes and SparseEncoder of sentence-transformers."""
    return _table("retrieval_sparse_encoder", WORDS, MORE)


def retrieval_hybrid() -> str:
    """Return the table of hybrid indexes and their members."""
    result = load("retrieval")
    plain = ("xtr", "vdr", "bm25", "dense")
    columns = (*COLUMNS[:4], ("index_mib", "MiB", "{:.1f}"))
    rows = [
        [dataset, label(arm), *(form.format(values[metric]) for metric, _, form in columns)]
        for (dataset, _, arm), values in figures(result).items()
        if arm in plain or arm.startswith("hybrid")
    ]
    return markdown(["collection", "index", *(title for _, title, _ in columns)], rows) + provenance(result)


def training() -> str:
    """Return the table of trained checkpoints and the embedded defaults."""
    result = load("training")
    names = {
        "vdr@encoder=out/vdr": "VDR trained",
        "vdr@encoder=out/vdr@query_encoding=bag_of_words": "VDR trained, `query_encoding=bag_of_words`",
        "xtr@encoder=out/xtr": "XTR trained",
    }
    rows = [
        [dataset, names.get(arm, label(arm)), *(form.format(values[metric]) for metric, _, form in COLUMNS[:3])]
        for (dataset, _, arm), values in figures(result).items()
        if "ndcg@10" in values
    ]
    return markdown(["collection", "index", *(title for _, title, _ in COLUMNS[:3])], rows) + provenance(result)


def token_scale() -> str:
    """Return the table of token indexes with millions of tokens."""
    result = load("token_scale")
    table = figures(result)
    names = (
        ("query_ms_median_8", "ms, 8 probes", "{:.1f}"),
        ("query_ms_median_16", "ms, 16 probes", "{:.1f}"),
        ("query_ms_median_32", "ms, 32 probes", "{:.1f}"),
        ("files_mib", "MiB on disk", "{:.0f}"),
        ("resident_mib", "MiB resident", "{:.0f}"),
        ("add_100_documents_s", "100 documents found after s", "{:.2f}"),
        ("build_s", "build s", "{:.0f}"),
    )
    rows = [
        [f"{int(dataset.partition('_')[2]) / 1e6:g} million", f"`{arm.partition('=')[2]}`"]
        + [form.format(values[name]) for name, _, form in names]
        for (dataset, _, arm), values in table.items()
    ]
    return markdown(["tokens", "codec", *(title for _, title, _ in names)], rows) + provenance(result)


def query_encoding() -> str:
    """Return the table of precisions of the query encoder."""
    result = load("query_encoding")
    rows = [
        [f"`{precision}`", f"{values['query_ms_median']:.1f}", f"{values['ndcg@10']:.3f}"]
        for (_, _, precision), values in figures(result).items()
    ]
    return markdown(["precision of queries", "ms a query", "nDCG@10 on cranfield"], rows) + provenance(result)


def sparse_scale() -> str:
    """Return the table of sparse indexes with millions of documents."""
    result = load("sparse_scale")
    titles = {
        "blocks": "**blocks skipped**",
        "exhaustive": "every document scored",
        "scipy_lists": "scipy, query times inverted lists",
        "scipy_rows": "scipy, documents times query",
    }
    times: dict[str, dict[str, float]] = {}
    for r in result["records"]:
        if r["metric"] == "query_ms_median":
            arm, k = r["arm"].split("@k=")
            times.setdefault(arm, {})[k] = r["value"]
    rows = [[titles[arm], *(f"{found[k]:.1f}" for k in ("10", "100"))] for arm, found in times.items()]
    size = int(result["records"][0]["dataset"].partition("_")[2])
    head = [f"{size:,} documents", "ms, the best 10", "ms, the best 100"]
    return markdown(head, rows) + provenance(result)
