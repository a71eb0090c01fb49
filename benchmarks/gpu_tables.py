"""Tables of the figures from GPUs: ``benchmarks/results/gpu``, written by ``benchmarks/gpu``."""

from typing import Any

from common import load, markdown

STOCK = ("stock_graphs", "stock_compiled")
ENGINES = {
    "stock_graphs": "vLLM, `FLASH_ATTN`",
    "stock_compiled": "vLLM, `FLASH_ATTN`, torch.compile",
    "tidal_graphs": "**TidalDecode**, `FLASH_ATTN`",
    "tidal_compiled": "**TidalDecode**, `FLASH_ATTN`, torch.compile",
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
    """Return ``(arm, dataset, metric) -> value``."""
    return {(r["arm"], r["dataset"], r["metric"]): r["value"] for r in result["records"]}


def _provenance(result: dict[str, Any]) -> str:
    """Return a line with date, GPU, versions and step, to be put under a table."""
    machine, versions = result["machine"], result["versions"]
    vllm = f"vLLM {versions['vllm']}, " if "vllm" in versions else ""
    packages = f"{vllm}torch {versions['torch']}, Triton {versions['triton']}"
    step = result["step"]
    return f"\n{result['date']}, {machine['name']}, driver {machine['driver_version']}, {packages}. Step `{step}`.\n"


def _point_label(dataset: str) -> str:
    """Return the label of a dataset like ``llama-3-8b_batch_1_context_8192``."""
    parts = dataset.split("_")
    return f"{int(parts[parts.index('context') + 1]):,} tokens, batch {parts[parts.index('batch') + 1]}"


def engine(card: str) -> str:
    """Return the table of engines on a card: time per decode step, prefill and KV cache capacity.

    The baseline of a speed-up is the faster of the stock engines that were measured at the same point.
    """
    result = load(f"gpu/{card}/engine")
    values = _values(result)
    model = next(d for _, d, metric in values if metric == "kv_capacity")
    points = list(dict.fromkeys(d for _, d, metric in values if metric == "step_ms"))
    rows = []
    for point in points:
        stock = [values[arm, point, "step_ms"] for arm in STOCK if (arm, point, "step_ms") in values]
        for arm, label in ENGINES.items():
            if (ms := values.get((arm, point, "step_ms"))) is None:
                continue
            capacity = values[arm, model, "kv_capacity"]
            speed_up = f"{min(stock) / ms:.2f}x" if stock else ""
            prefill = f"{values[arm, point, 'prefill']:,.0f}"
            rows.append([_point_label(point), label, f"{ms:.2f}", speed_up, prefill, f"{capacity:,.0f}"])
    head = ["context, batch size", "engine", "ms per step", "speed-up", "prefill tokens/s", "KV cache, tokens"]
    return markdown(head, rows, texts=2) + _provenance(result)


def kernels(card: str, before: bool) -> str:
    """Return the table of kernel times on a card, in CUDA graphs; in brackets the same kernels before tuning."""
    result = load(f"gpu/{card}/kernels")
    values = _values(result)
    earlier = _values(load(f"gpu/{card}/before/kernels")) if before else {}
    points = list(dict.fromkeys(d for _, d, metric in values if metric == "graph_us"))
    rows = []
    for arm, label in KERNELS.items():
        cells = []
        for point in points:
            first = earlier.get((arm, point, "graph_us"))
            bracket = "" if first is None or arm == "dense_sdpa" else f" ({first:,.0f})"
            cells.append(f"{values[arm, point, 'graph_us']:,.0f}{bracket}")
        rows.append([label, *cells])
    return markdown(["µs per layer", *map(_point_label, points)], rows) + _provenance(result)
