"""Tables of visual pruners: `pilotfish bench vision`."""

from common import figures, load, markdown, provenance

CASES = {"single": "one image", "two_images": "two in a prompt", "batch_4": "four requests"}
COST = (
    ("prompt_tokens", "tokens", "{:.0f}"),
    ("kv_blocks", "blocks", "{:.0f}"),
    ("gflops", "GFLOP", "{:.0f}"),
    ("language_cpu_s", "language model, CPU s", "{:.2f}"),
    ("prefill_speedup", "speed-up", "{:.1f}x"),
    ("tower_s", "tower s", "{:.2f}"),
    ("selection_s", "of which selection, ms", "{:.0f}"),
    ("ttft_s", "first token s", "{:.2f}"),
)
QUALITY = ("needle_recall", "coverage", "saliency_kept")


def label(arm: str) -> str:
    """Return the label of an arm."""
    name, *options = arm.split("@")
    return ", ".join([f"`{name}`" if name != "stock" else "stock", *(f"`{o}`" for o in options)])


def cost() -> str:
    """Return the table of the cost of prompts with images."""
    result = load("vision")
    rows = []
    for (case, _, arm), values in figures(result).items():
        if case not in CASES:
            continue
        values["selection_s"] = 1000 * values["selection_s"]
        rows.append([CASES[case], label(arm), *(form.format(values[m]) if m in values else "" for m, _, form in COST)])
    return markdown(["", "pruner", *(title for _, title, _ in COST)], rows) + provenance(result)


def quality() -> str:
    """Return the table of the quality of the kept tokens."""
    result = load("vision")
    table: dict[str, dict[str, dict]] = {}
    for r in result["records"]:
        if r["metric"] in QUALITY:
            table.setdefault(r["arm"], {})[r["metric"]] = r
    rows = []
    for arm, metrics in table.items():
        name, _, retain = arm.rpartition("@retain=")
        cells = [f"{metrics[m]['value']:.2f} ± {metrics[m]['params']['standard_error']:.2f}" for m in QUALITY]
        rows.append([f"{float(retain):.0%}", label(name), *cells])
    head = ["kept", "by", "needle", "coverage", "saliency"]
    images = max(r["params"].get("images", 0) for r in result["records"])
    return markdown(head, rows) + f"\n\n{images} images.\n"
