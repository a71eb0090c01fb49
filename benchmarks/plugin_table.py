"""The table of the README: what each plugin does, its gain and its quality."""

from common import markdown, read_records

from pilotfish.integrations.bench import gains
from pilotfish.integrations.bench.plots import DISPLAY

WHAT = {
    "token_recycling": "drafts from the top-k tokens of earlier steps; no draft model, no training",
    "rasd": "drafts what followed in the prompt, in earlier outputs or in a corpus",
    "tidal_decode": "top-k token selection in a few layers, sparse attention in the others",
    "razor_attention": "full KV cache for retrieval heads only; frees the blocks of the other heads",
    "globalcom2": "keeps a quarter of the visual tokens of each image",
    "aim": "merges similar visual tokens",
    "xtr": "multi-vector index on FAISS: scores documents by retrieved tokens",
    "vdr": "sparse index of term weights that can be read and edited",
}


def table() -> str:
    """Return the table of plugins with their default settings."""
    records = read_records()
    measured = {gain.plugin: gain for gain in gains.gains(records)}
    rows = []
    for plugin, what in WHAT.items():
        gain = measured[plugin]
        quality = "not measured" if gain.kept is None else f"{gain.kept:.0%} {gain.quality}"
        divergence = gains.mean(gains.select(records, "kl", plugin))
        if divergence is not None:
            quality += f", KL {divergence:.3f}"
        page = f"[{DISPLAY[plugin]}](docs/{plugin}.md)"
        rows.append([page, what, f"{gain.gain:.1f}x vs. {gain.baseline}", quality])
    return markdown(["plugin", "what it does", "speed", "quality relative to the baseline"], rows, texts=4)
