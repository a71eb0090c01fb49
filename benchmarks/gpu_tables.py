"""Tables of the figures from GPUs: ``benchmarks/results/gpu``, written by ``benchmarks/gpu``."""

from typing import Any

from common import load, markdown

CARD = "gpu/h200"
ENGINES = {
    "stock_graphs": "vLLM, `FLASH_ATTN`",
    "tidal_graphs": "**TidalDecode**, `FLASH_ATTN`",
    "tidal_compiled": "**TidalDecode**, vLLM's default compilation",
    "razor_graphs": "**RazorAttention**, `TRITON_ATTN`",
}
KERNELS = {
    "dense_sdpa": "full attention, `scaled_dot_product_attention`",
    "tidal_max_page_512_choice": "TidalDecode, selection of 512 tokens",
    "tidal_max_page_512_decode": "TidalDecode, sparse attention",
    "razor_decode": "RazorAttention, decoding",
    "razor_prompt": "RazorAttention, 2,048 tokens of a prompt",
    "tree_63": "tree attention, 64 tokens per request",
}


def _values(result: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    return {(r["arm"], r["dataset"], r["metric"]): r["value"] for r in result["records"]}


def _provenance(result: dict[str, Any]) -> str:
    """Return a line with the card, the versions and the command, to be put under a table."""
    machine, versions = result["machine"], result["versions"]
    vllm = f"vLLM {versions['vllm']}, " if "vllm" in versions else ""
    packages = f"{vllm}torch {versions['torch']}, Triton {versions['triton']}"
    step = result["step"]
    return f"\n{result['date']}, {machine['name']}, driver {machine['driver_version']}, {packages}. Step `{step}`.\n"


def _place(dataset: str) -> str:
    """Return the label of a dataset like ``llama-3-8b_batch_1_context_8192``."""
    words = dataset.split("_")
    return f"{int(words[words.index('context') + 1]):,} tokens, batch {words[words.index('batch') + 1]}"


def engine() -> str:
    """Return the table of engines: time per decode step, prefill and KV cache capacity."""
    result = load(f"{CARD}/engine")
    values = _values(result)
    model = next(d for _, d, metric in values if metric == "kv_capacity")
    places = list(dict.fromkeys(d for _, d, metric in values if metric == "step_ms"))
    rows = []
    for place in places:
        stock = values.get(("stock_graphs", place, "step_ms"))
        for arm, label in ENGINES.items():
            if (ms := values.get((arm, place, "step_ms"))) is None:
                continue
            capacity = values[arm, model, "kv_capacity"]
            speed_up = f"{stock / ms:.2f}x" if stock is not None else ""
            prefill = f"{values[arm, place, 'prefill']:,.0f}"
            rows.append([_place(place), label, f"{ms:.2f}", speed_up, prefill, f"{capacity:,.0f}"])
    head = ["context", "engine", "ms per step", "speed-up", "prefill tokens/s", "KV cache, tokens"]
    return markdown(head, rows, texts=2) + _provenance(result)


def kernels() -> str:
    """Return the table of kernel times, in CUDA graphs, by context and batch."""
    result = load(f"{CARD}/kernels")
    values, before = _values(result), _values(load(f"{CARD}/before/kernels"))
    places = list(dict.fromkeys(d for _, d, metric in values if metric == "graph_us"))
    rows = []
    for arm, label in KERNELS.items():
        cells = []
        for place in places:
            now, first = values[arm, place, "graph_us"], before[arm, place, "graph_us"]
            cells.append(f"{now:,.0f}" if arm == "dense_sdpa" else f"{now:,.0f} ({first:,.0f})")
        rows.append([label, *cells])
    return markdown(["µs per layer", *map(_place, places)], rows) + _provenance(result)
