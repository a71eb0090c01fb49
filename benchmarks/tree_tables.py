"""Tables of drafters that verify chains or trees, on prompts that run twice: `pilotfish bench drafters --twice`."""

from collections import defaultdict
from typing import Any

from common import figures, load, markdown, provenance

RESULT = "drafters_trees"
NAMES = {"ngram": "vLLM `ngram`", "suffix": "`suffix` (arctic-inference)"}
DEEP_SUFFIX = "suffix@num_speculative_tokens=64@suffix_decoding_max_tree_depth=64@suffix_decoding_max_spec_factor=4.0"
NAMES[DEEP_SUFFIX] = "`suffix`, depth 64, 64 draft tokens, factor 4"


def label(arm: str) -> str:
    """Return the label of an arm."""
    name, *options = arm.split("@")
    title = {"token_recycling": "Token Recycling", "rasd": "RASD"}.get(name, name)
    kind = "tree" if "verification=tree" in options else "chain"
    rest = [f"`{o.split('=')[0] if o.startswith('datastore=') else o}`" for o in options if o != "verification=tree"]
    return NAMES.get(arm) or ", ".join([f"{title}, {kind}", *rest])


def twice() -> str:
    """Return the table of speed-up and acceptance length of the first run, the second, and both."""
    result = load(RESULT)
    table = figures(result)
    arms = list(dict.fromkeys(arm for _, _, arm in table))
    sets = [d for d, *_ in table if "/" not in d and not d.endswith(("_again", "_twice"))]
    rows = []
    for dataset in dict.fromkeys(sets):
        for arm in arms:
            first, second, both = (table[dataset + ending, 1, arm] for ending in ("", "_again", "_twice"))
            same = first["identical_share"] == second["identical_share"] == 1
            cells = [f"{x['speedup']:.2f} ({x['acceptance_length']:.2f})" for x in (first, second, both)]
            drafted, ms = f"{first['drafted_per_step']:.1f}", first.get("proposal_ms")
            rows.append([dataset, label(arm), *cells, drafted, f"{ms:.2f}" if ms else "", "yes" if same else "no"])
    head = ["prompts", "drafter", "first time", "second time", "both", "drafted per step", "proposal ms", "identical"]
    return markdown(head, rows) + provenance(result)


def twice_by_category() -> str:
    """Return the table of speed-up and acceptance length of the first run, by category."""
    table = figures(load(RESULT))
    arms = [a for a in dict.fromkeys(arm for _, _, arm in table) if a.count("@") == a.count("@verification=tree")]
    places = {d for d, *_ in table if "/" in d and not d.split("/")[0].endswith(("_again", "_twice"))}
    rows = [
        [d, *(f"{table[d, 1, a]['speedup']:.2f} ({table[d, 1, a]['acceptance_length']:.2f})" for a in arms)]
        for d in sorted(places)
    ]
    return markdown(["category", *map(label, arms)], rows)


def budget() -> str:
    """Return the table of speed-ups of trees sized by the draft budget and of trees of fixed sizes, by category."""
    result = load("drafters_budget")
    table = figures(result)
    arms = list(dict.fromkeys(arm for _, _, arm in table))
    fixed = [arm for arm in arms if "@nodes=" in arm]
    budgeted = fixed[0].rpartition("@")[0]  # the same arm without a fixed size
    rows = []
    for dataset in sorted(dict.fromkeys(d for d, *_ in table if d != "humaneval/code"), key=lambda d: ("/" in d, d)):
        speeds = {arm: table[dataset, 1, arm]["speedup"] for arm in arms}
        best = max(speeds[arm] for arm in fixed)
        rows.append([dataset, *(f"{speeds[arm]:.2f}" for arm in arms), f"{speeds[budgeted] / best:.0%}"])
    heads = [label(arm) for arm in arms]
    return markdown(["prompts", *heads, "budget / best fixed"], rows) + provenance(result)


def device_cost() -> str:
    """Return the table of the counted cost of device drafters' steps, and the measured one of a host counterpart."""
    result = load("device_drafting_cost")
    table: dict[tuple[str, int, int], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in result["records"]:
        verification, tokens = _shape(r["params"])
        table[verification, tokens, r["params"]["batch"]][r["arm"]][r["metric"]] = r["value"]
    rows = []
    for (verification, tokens, batch), arms in table.items():
        x = arms["token_recycling"]
        rows.append(
            [
                f"{'tree' if verification == 'tree' else 'chain'} of {tokens}, batch {batch}",
                f"{x['bytes'] / 1e6:.2f}",
                f"{x['operations'] / 1e6:.1f}",
                f"{x['step_ms']:.2f}",
                *(f"{arm['counted_us']:.0f}, {arm['share']:.2%}" for arm in arms.values()),
                f"{x['host_ms']:.2f}" if "host_ms" in x else "",
            ]
        )
    head = ["draft tokens", "MB", "million operations", "model's step, ms", "Token Recycling, µs", "RASD, µs"]
    return markdown([*head, "RASD with a datastore, µs", "Token Recycling on the host, ms"], rows) + provenance(result)


def device_replay() -> str:
    """Return the table of the acceptance lengths of device drafters and of their counterparts on the host."""
    result = load("device_replay")
    found = {(r["arm"], _shape(r["params"])): r["value"] for r in result["records"]}
    shapes = sorted({shape for _, shape in found})
    rows = []
    for drafter in dict.fromkeys(arm.removesuffix(", host").removesuffix(", device") for arm, _ in found):
        cells = []
        for shape in shapes:
            host, device = (found.get((f"{drafter}, {where}", shape)) for where in ("host", "device"))
            if host is None or device is None:
                alone = found.get((drafter, shape))
                cells += ["", "" if alone is None else f"{alone:.2f}", ""]
            else:
                cells += [f"{host:.2f}", f"{device:.2f}", f"{device / host - 1:+.1%}"]
        rows.append([f"`{drafter}`", *cells])
    head = ["drafter"]
    for verification, length in shapes:
        what = f"trees of {length} nodes" if verification == "tree" else f"{length} draft tokens"
        head += [f"{what}: host", "device", "difference"]
    return markdown(head, rows) + provenance(result)


def _shape(params: dict[str, Any]) -> tuple[str, int]:
    """Return the form of the drafts of a record, and their number of tokens."""
    return params.get("verification", "chain"), params["num_speculative_tokens"]


REPLAYED = {
    "suffix": "`suffix`, documented settings",
    "suffix@depth=64": NAMES[DEEP_SUFFIX],
    "token_recycling": "Token Recycling",
    "rasd": "RASD",
    "rasd@verification=tree": "RASD, tree",
    "rasd@base=none, bound=stop": "*bound: retrieval alone, nothing rejected is drafted*",
    "rasd, bound=stop": "*bound: RASD's best path, nothing rejected is drafted*",
    "rasd, bound=tree": "*bound: any path of RASD's tree of 64 nodes, nothing rejected is drafted*",
}


def trace() -> str:
    """Return the table of replayed drafters, and of bounds that know which draft tokens will be accepted."""
    result = load("drafter_trace")
    table: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in result["records"]:
        dataset, _, model = r["dataset"].partition(", ")
        table.setdefault((model, dataset, r["arm"]), {})[r["metric"]] = r["value"]
    rows = []
    for model, dataset in dict.fromkeys((m, d) for m, d, _ in table if not d.endswith("_again")):
        best = {}
        for ending in ("", "_again"):
            suffixes = [table[model, dataset + ending, arm] for arm in REPLAYED if arm.startswith("suffix")]
            best[ending] = max(x["decode_speedup"] for x in suffixes)
        for arm, title in REPLAYED.items():
            cells = []
            for ending in ("", "_again"):
                x = table[model, dataset + ending, arm]
                share = x["decode_speedup"] / best[ending]
                cells += [f"{x['acceptance_length']:.2f}", f"{x['decode_speedup']:.2f}", f"{share:.2f}"]
            rows.append([f"{model}, {dataset}", title, *cells])
    one = ("tokens per step", "decoding speed-up", "vs. best `suffix`")
    head = ["prompts", "drafter", *(f"{x}, {turn}" for turn in ("first", "second") for x in one)]
    return markdown(head, rows, texts=2) + provenance(result)


def sources() -> str:
    """Return the table of speed-up and acceptance length by source of retrieval, on documents and on a domain."""
    result = load("drafters_sources")
    table = figures(result)
    rows = []
    for (dataset, _, arm), x in table.items():
        if "/" not in dataset:
            ms, same = x.get("proposal_ms"), "yes" if x["identical_share"] == 1 else "no"
            cells = [f"{x['speedup']:.2f}", f"{x['acceptance_length']:.2f}", f"{x['drafted_per_step']:.1f}"]
            rows.append([dataset, label(arm), *cells, f"{ms:.2f}" if ms else "", same])
    head = ["prompts", "drafter", "speed-up", "tokens per step", "drafted per step", "proposal ms", "identical"]
    return markdown(head, rows) + provenance(result)


def lookups() -> str:
    """Return the table of look-up times."""
    result = load("datastore")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for r in result["records"]:
        rows.setdefault((r["arm"], r["dataset"]), {})[r["metric"]] = f"{r['value']:g}"
    names = {"datastore": "datastore", "history": "history of texts"}
    metrics = ("lookup_us_median", "lookup_us_p99", "build_s")
    lines = [
        [names[arm], f"{int(tokens.removeprefix('tokens_')):,}", *(x.get(m, "") for m in metrics)]
        for (arm, tokens), x in rows.items()
    ]
    head = ["looked up in", "tokens", "median us", "99th percentile us", "build s"]
    return markdown(head, lines) + provenance(result)
