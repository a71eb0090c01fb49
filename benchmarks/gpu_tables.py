"""Tables of the figures from GPUs: ``benchmarks/results/gpu``, written by ``benchmarks/gpu``."""

from typing import Any

from common import load, markdown

RESULTS_FOLDER = "gpu/h200"
ENGINES = {
    "stock_graphs": "vLLM, `FLASH_ATTN`",
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


def engine() -> str:
    """Return the table of engines: time per decode step, prefill and KV cache capacity."""
    result = load(f"{RESULTS_FOLDER}/engine")
    values = _values(result)
    model = next(d for _, d, metric in values if metric == "kv_capacity")
    points = list(dict.fromkeys(d for _, d, metric in values if metric == "step_ms"))
    rows = []
    for point in points:
        stock = values.get(("stock_graphs", point, "step_ms"))
        for arm, label in ENGINES.items():
            if (ms := values.get((arm, point, "step_ms"))) is None:
                continue
            capacity = values[arm, model, "kv_capacity"]
            # The baseline is not compiled.
            speed_up = f"{stock / ms:.2f}x" if stock is not None and arm != "tidal_compiled" else ""
            prefill = f"{values[arm, point, 'prefill']:,.0f}"
            rows.append([_point_label(point), label, f"{ms:.2f}", speed_up, prefill, f"{capacity:,.0f}"])
    head = ["context, batch size", "engine", "ms per step", "speed-up", "prefill tokens/s", "KV cache, tokens"]
    return markdown(head, rows, texts=2) + _provenance(result)


def kernels() -> str:
    """Return the table of kernel times, in CUDA graphs; in brackets the same kernel before tuning."""
    result = load(f"{RESULTS_FOLDER}/kernels")
    values, before = _values(result), _values(load(f"{RESULTS_FOLDER}/before/kernels"))
    points = list(dict.fromkeys(d for _, d, metric in values if metric == "graph_us"))
    rows = []
    for arm, label in KERNELS.items():
        cells = []
        for point in points:
            now, first = values[arm, point, "graph_us"], before[arm, point, "graph_us"]
            cells.append(f"{now:,.0f}" if arm == "dense_sdpa" else f"{now:,.0f} ({first:,.0f})")
        rows.append([label, *cells])
    return markdown(["µs per layer", *map(_point_label, points)], rows) + _provenance(result)
