"""Tables of question answering from documents: `pilotfish bench rag`."""

from common import figures, load, markdown, provenance

ARMS = {
    "rasd": "RASD",
    "token_recycling": "Token Recycling",
    "tidal_decode@budget=8192": "TidalDecode, full budget",
    "tidal_decode@budget=512": "TidalDecode, budget 512",
    "streaming_llm@budget=512": "StreamingLLM, budget 512",
    "razor_attention": "RazorAttention",
    "no_prefix_caching": "*stock without prefix caching*",
}
LOSSY = ("tidal_decode", "streaming_llm", "razor_attention")


def _figures(result: dict) -> dict[tuple[str, str], dict[str, float]]:
    """Return ``(dataset, arm) -> metric -> value``."""
    return {(dataset, arm): values for (dataset, _, arm), values in figures(result).items()}


def _cell(found: dict[str, float], metric: str, form: str) -> str:
    return form.format(found[metric]) if metric in found else ""


def speed(benchmark: str = "rag") -> str:
    """Return the table of speeds of each plugin against stock on the same questions."""
    result = load(benchmark)
    found = _figures(result)
    rows = [
        [
            dataset,
            name,
            _cell(found[dataset, arm], "answer_speedup", "{:.2f}"),
            _cell(found[dataset, arm], "decode_speedup", "{:.2f}"),
            _cell(found[dataset, arm], "first_token_speedup", "{:.2f}"),
            _cell(found[dataset, arm], "answer_ms_median", "{:.0f}"),
            _cell(found[dataset, f"none|{arm}"], "answer_ms_median", "{:.0f}"),
            _cell(found[dataset, arm], "cached_share", "{:.0%}"),
            _cell(found[dataset, arm], "identical_share", "{:.0%}"),
        ]
        for arm, name in ARMS.items()
        for dataset in dict.fromkeys(d for d, a in found if a == arm)
    ]
    head = [
        "questions",
        "with",
        "whole answer",
        "decoding",
        "TTFT",
        "ms",
        "stock, ms",
        "prompt cached",
        "identical",
    ]
    return markdown(head, rows) + provenance(result)


def load_table() -> str:
    """Return the table of the load test with concurrent users."""
    result = load("rag_load")
    found = {(r["arm"], r["metric"]): r["value"] for r in result["records"]}
    params = result["records"][0]["params"]
    rows = [
        ["users, minutes", f"{params['people']}, {params['seconds'] / 60:.0f}"],
        ["answers, errors", f"{found['all', 'answers']:.0f}, {found['all', 'errors']:.0f}"],
        ["answer, median and 95 %", f"{found['all', 'answer_s_median']:.1f} s, {found['all', 'answer_s_p95']:.1f} s"],
        [
            "TTFT, median and 95 %",
            f"{found['all', 'first_token_s_median']:.1f} s, {found['all', 'first_token_s_p95']:.1f} s",
        ],
        ["documents changed meanwhile", f"{found['all', 'documents_changed']:.0f}"],
        ["a change of ten documents, median", f"{found['all', 'change_s_median']:.2f} s"],
    ]
    for name in dict.fromkeys(arm for arm, _ in found if arm != "all"):
        begin, end = (found[name, f"resident_mib_{when}"] for when in ("settled", "end"))
        rows.append([f"memory of {name}, at 40 % of the time and at its end", f"{begin:.0f} MiB, {end:.0f} MiB"])
    return markdown(["", ""], rows) + provenance(result)


def quality(benchmark: str = "rag") -> str:
    """Return the table of answer quality by dataset, of stock and of the policies that may change answers."""
    found = _figures(load(benchmark))
    datasets = [d for d, a in found if a == "retrieval"]
    arms = dict.fromkeys(arm for _, arm in found)
    stock = next(arm for arm in arms if arm.startswith("none|"))
    lossy = [arm for arm in arms if arm.partition("@")[0] in LOSSY]
    rows = []
    for dataset in datasets:
        searched = found[dataset, "retrieval"]
        recall = next(v for m, v in searched.items() if m.startswith("recall@"))
        for arm in (stock, *lossy):
            answers = found.get((dataset, arm), {})
            rows.append(
                [
                    dataset,
                    "stock" if arm == stock else ARMS[arm],
                    f"{recall:.0%}",
                    _cell(answers, "contains", "{:.0%}"),
                    _cell(answers, "exact_match", "{:.0%}"),
                    _cell(answers, "f1", "{:.2f}"),
                    _cell(answers, "citation_precision", "{:.0%}"),
                    _cell(answers, "true_abstentions", "{:.0%}"),
                    _cell(answers, "false_abstentions", "{:.0%}"),
                    f"{searched['search_ms']:.0f}",
                ]
            )
    head = ["questions", "with", "passage recall", "contains answer", "exact match", "F1", "citation precision"]
    head += ["true abstentions", "false abstentions", "search, ms"]
    return markdown(head, rows)
