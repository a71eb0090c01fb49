"""Table of TidalDecode with window layers on a model that has no shipped profile: `make bench-windows-qwen`."""

from common import LEAST_ATTENTION, STOCK, load, markdown, provenance

NAMES = {
    "budget=512": "untuned, 512 tokens",
    "": "window layers",
    "select_attention=selected": "and selection layers that read what they select",
    "select=two_pass": "and selection in two passes",
}


def table(name: str = "kv_window_layers_qwen") -> str:
    """Return the table: speed-up, share of what can be saved, and divergence of each setting."""
    result = load(name)
    figures: dict[str, dict[tuple[str, int], float]] = {}
    for r in result["records"]:
        figures.setdefault(r["arm"], {})[r["metric"], r["params"].get("batch", 0)] = r["value"]
    batches = sorted({batch for metric, batch in figures[STOCK] if metric == "step_ms"})
    rows = [["full attention", *(x for b in batches for x in (f"{figures[STOCK]['step_ms', b]:.0f} ms", "")), "", ""]]
    for arm, values in figures.items():
        if arm in (STOCK, LEAST_ATTENTION):
            continue
        speeds = (x for b in batches for x in (f"{values['step_speedup', b]:.2f}x", f"{values['bound_share', b]:.0%}"))
        measured = f"{values['kl', 0]:.3f}", f"{values['same_top', 0]:.0%}"
        rows.append([_name(arm), *speeds, *measured])
    least = figures[LEAST_ATTENTION]
    rows.append(["*bound*", *(x for b in batches for x in (f"*{least['step_speedup', b]:.2f}x*", "")), "", ""])
    head = [x for b in batches for x in (f"step, batch {b}", "share of the bound")]
    return markdown(["", *head, "KL", "same top token"], rows) + provenance(result)


def _name(arm: str) -> str:
    setting = arm.partition("@")[2]
    return NAMES[setting if setting in NAMES else setting.partition("window=256")[2].lstrip(",")]
