"""Tables of KV policies that free memory: `pilotfish bench kv --policy razor_attention`."""

from common import STOCK, kv_figures, markdown, provenance, setting

QUALITY = ("kv_memory_quality", "kv_memory_controls")


def load_table() -> str:
    """Return the table of a load with many requests in little memory."""
    result, arms, table = kv_figures("kv_memory")
    rows = []
    for arm in arms:
        f = next(x for (a, d, *_), x in table.items() if (a, d) == (arm, "load"))
        rows.append(
            [
                setting(arm),
                f"{f['capacity_tokens']:,.0f} ({f['capacity_ratio']:.2f}x)",
                f"{f['concurrency']:.1f}",
                f"{f['peak_decoding']:.0f}",
                f"{f['load_steps']:.0f}",
                f"{f['preemptions']:.0f}",
                f"{f['least_free_share']:.0%}",
                f"{f['blocks_lost']:.0f}",
                f"{f['load_s']:.0f}",
                f"{f['load_speedup']:.2f}x",
            ]
        )
    head = ["tokens that fit", "longest requests that fit", "most decoding together", "steps", "preempted"]
    head += ["least free", "blocks lost", "seconds", "throughput"]
    return markdown(["", *head], rows) + provenance(result)


def steps() -> str:
    """Return the table of decode step times and KV memory, by context and batch."""
    _, arms, table = kv_figures("kv_memory")
    places = sorted({(c, b) for _, _, c, b in table if b})
    rows = []
    for context, batch in places:
        cells = [table[arm, f"context_{context}", context, batch] for arm in arms]
        row = [f"{context:,} tokens, batch {batch}", f"{cells[0]['step_ms']:.1f}"]
        row += [f"{x['step_ms']:.1f} ({x['step_speedup']:.2f}x)" for x in cells[1:]]
        row += [f"{cells[0]['kv_mib']:.0f}", *(f"{x['kv_mib']:.0f} ({x['kv_reduction']:.2f}x less)" for x in cells[1:])]
        rows.append(row)
    names = [setting(arm) for arm in arms]
    return markdown(["", *(f"{n}, ms" for n in names), *(f"{n}, MiB" for n in names)], rows)


def quality() -> str:
    """Return the table of quality: NLL and divergence on texts, needle recall, and key-value retrieval."""
    rows, head = [], []
    for name in QUALITY:
        _, arms, table = kv_figures(name)
        texts = sorted({(d, c) for arm, d, c, b in table if "nll" in table[arm, d, c, b]})
        needles = sorted({(c, d) for arm, d, c, b in table if "needle_recall" in table[arm, d, c, b]})
        keys = sorted({(c, d) for arm, d, c, b in table if "exact_match" in table[arm, d, c, b]})
        names = [f"{d}, {c:,}" for d, c in texts] + [f"needles in {c:,}" for c, _ in needles]
        head = head or [*names, *(f"{d}: exact, tokens" for _, d in keys)]
        for arm in arms if name == QUALITY[0] else arms[1:]:
            found: dict[str, str] = {}
            for d, c in texts:
                x, stock = table[arm, d, c, 0], table[STOCK, d, c, 0]
                more = f"{x['nll'] - stock['nll']:+.4f}, {x['kl']:.3f}, {x['same_top']:.0%}" if "kl" in x else ""
                found[f"{d}, {c:,}"] = more or f"{x['nll']:.4f}"
            for c, d in needles:
                found[f"needles in {c:,}"] = f"{table[arm, d, c, 0]['needle_recall']:.0%}"
            for c, d in keys:
                x = table[arm, d, c, 0]
                found[f"{d}: exact, tokens"] = f"{x['exact_match']:.0%}, {x['token_recall']:.0%}"
            label = "other heads, drawn at random" if "keep=" in arm else setting(arm)
            rows.append([label, *(found.get(h, "") for h in head)])
    return markdown(["NLL and its difference, KL, same top token", *head], rows)


def short() -> str:
    """Return the summary of memory, speed and quality; needle recall is beside that of full attention."""
    _, arms, table = kv_figures("kv_memory")
    longest = max(c for _, _, c, b in table if b)
    batch = max(b for *_, b in table)
    qualities = [kv_figures(name)[2] for name in QUALITY]
    rows = []
    for arm in arms:
        under_load = next(x for (a, d, *_), x in table.items() if (a, d) == (arm, "load"))
        one, many = (table[arm, f"context_{longest}", longest, b] for b in (1, batch))
        pairs = [(x, t[STOCK, d, c, b]) for t in qualities for (a, d, c, b), x in t.items() if a == arm]
        needles = [(x["needle_recall"], stock["needle_recall"]) for x, stock in pairs if "needle_recall" in x]
        kl = [x["kl"] for x, _ in pairs if "kl" in x]
        recall, full = (sum(values) / len(needles) for values in zip(*needles, strict=True)) if needles else (0, 0)
        rows.append(
            [
                setting(arm),
                f"{one['kv_mib']:.0f} MiB",
                *(f"{x['step_ms']:.1f} ms" if arm == STOCK else f"{x['step_speedup']:.2f}x" for x in (one, many)),
                f"{under_load['peak_decoding']:.0f}",
                f"{under_load['load_speedup']:.2f}x",
                f"{sum(kl) / len(kl):.3f}" if kl else "",
                f"{recall:.0%} of {full:.0%}" if needles and arm != STOCK else "",
            ]
        )
    head = [f"cache of {longest:,} tokens", "step, batch 1", f"batch {batch}", "decoding together under load"]
    return markdown(["", *head, "throughput", "KL", "needles found"], rows)
