"""Draw the diagrams of docs/architecture.md: the packages by their imports, and how a token, an image and a query flow.

    python benchmarks/package_diagram.py            write them to docs/images
    python benchmarks/package_diagram.py --check    exit code 1 when one is not current

Boxes and arrows of the package diagram come from the import graph. Arrows that follow from others are left out.
"""

import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from html import escape

import grimp
from common import ROOT

INTEGRATIONS = "pilotfish.integrations"
ENGINE_PARTS = ("engine", "models", "attention", "vision", "drafting", "serving", "bench", "tuning", "cli")
# One box each, the most specific name first.
PACKAGES = (
    *(f"{INTEGRATIONS}.vllm.{part}" for part in (*ENGINE_PARTS, "admission", "patches", "plugin")),
    *(f"{INTEGRATIONS}.{name}" for name in ("bench", "rag", "langchain", "llama_index", "haystack")),
    "pilotfish.retrieval.cli",
    "pilotfish.retrieval",
    "pilotfish.kvcache",
    "pilotfish.plugins",
    "pilotfish._internal",
)

# Steps of each flow: what happens, and the module that does it.
FLOWS: dict[str, tuple[tuple[str, str], ...]] = {
    "A token (speculative decoding)": (
        ("the top-k of the logits is taken before sampling", "integrations.vllm.drafting.top_k"),
        ("the plugin drafts the next tokens", "integrations.vllm.drafting.v1.proposer"),
        ("chain or tree is verified in one step", "integrations.vllm.drafting.v1.tree_verification"),
        ("accepted tokens update the plugin", "plugins.token_recycling"),
        ("acceptance is counted in metrics", "integrations.vllm.engine.metrics"),
    ),
    "A token (KV policy)": (
        ("the policy is selected at start", "integrations.vllm.engine.selection"),
        ("unsupported engines are refused", "integrations.vllm.attention.compatibility"),
        ("the attention backend is replaced", "integrations.vllm.attention.backends"),
        ("tokens are selected, as in the plugin", "integrations.vllm.attention.sparse.cpu"),
        ("a kernel attends to what remains", "kvcache.kernels.paged_decode"),
    ),
    "An image": (
        ("the pruner of the request is resolved", "integrations.vllm.vision.request_pruner"),
        ("placeholders get the number of kept tokens", "integrations.vllm.vision.processing"),
        ("the vision tower encodes the views", "integrations.vllm.vision.models"),
        ("patches are scored", "integrations.vllm.vision.patch_scores"),
        ("the plugin selects or merges tokens", "plugins.globalcom2"),
    ),
    "A query": (
        ("the index opens its last commit", "retrieval.store.store"),
        ("an encoder encodes the query", "retrieval.encoders.multi_vector"),
        ("candidates come from inverted lists", "retrieval.xtr.index"),
        ("the plugin scores documents", "plugins.xtr"),
        ("hits become a prompt with citations", "integrations.rag.prompt"),
    ),
}

BOX_HEIGHT, GAP, WIDTH = 34, 30, 860
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #1b2733 } .title { font-weight: 600 }
.small { font-size: 10px; fill: #51606d } rect { fill: #eef3f7; stroke: #5d7183 }
line { stroke: #8795a1; marker-end: url(#arrow) } .background { fill: #fff; stroke: none }
</style><defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#8795a1"/></marker></defs>
"""


def package_of(module: str) -> str | None:
    """Return the box that a module belongs to; None for modules of no box."""
    return next((p for p in PACKAGES if module == p or module.startswith(p + ".")), None)


def package_imports() -> dict[str, set[str]]:
    """Return for each package the packages that it imports, without the documented exceptions of the contracts."""
    graph = grimp.build_graph("pilotfish", exclude_type_checking_imports=True)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    ignored = [tuple(line.split(" -> ")) for c in contracts for line in c.get("ignore_imports", ())]
    imports: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for module in graph.modules:
        source = package_of(module)
        for imported in graph.find_modules_directly_imported_by(module):
            target = package_of(imported)
            exempt = source != "pilotfish.retrieval.cli" and any(
                fnmatch(module, a) and fnmatch(imported, b) for a, b in ignored
            )
            if source and target and source != target and not exempt:
                imports[source].add(target)
    # The index commands are a package inside `retrieval`, which registers them; nothing else there imports them.
    imports["pilotfish.retrieval"].discard("pilotfish.retrieval.cli")
    return imports


def depth(package: str, imports: Mapping[str, set[str]]) -> int:
    """Return the length of the longest chain of imports below a package."""
    return max((1 + depth(target, imports) for target in imports[package]), default=0)


def direct(package: str, imports: Mapping[str, set[str]]) -> set[str]:
    """Return the imported packages that no other imported package imports too (the transitive reduction)."""

    def below(p: str) -> set[str]:
        return imports[p].union(*(below(q) for q in imports[p]))

    return imports[package] - set().union(*(below(q) for q in imports[package]))


def draw_packages(imports: Mapping[str, set[str]]) -> str:
    """Return an SVG image of packages; every arrow points down, from a package to one that it imports."""
    rows: dict[int, list[str]] = {}
    for package in PACKAGES:
        rows.setdefault(depth(package, imports), []).append(package)
    top = max(rows)
    places: dict[str, tuple[float, float, float]] = {}
    for level, packages in rows.items():
        names = [p.removeprefix("pilotfish.") for p in packages]
        widths = [18 + 7 * len(name) for name in names]
        x = (WIDTH - sum(widths) - 14 * (len(names) - 1)) / 2
        for package, width in zip(packages, widths, strict=True):
            places[package] = (x, 12 + (top - level) * (BOX_HEIGHT + GAP), width)
            x += width + 14
    lines, boxes = [], []
    for package, (x, y, width) in places.items():
        for target in sorted(direct(package, imports)):
            to_x, to_y, to_width = places[target]
            begin, end = x + width / 2, to_x + to_width / 2
            lines.append(f'<line x1="{begin:.0f}" y1="{y + BOX_HEIGHT:.0f}" x2="{end:.0f}" y2="{to_y:.0f}"/>')
        name = escape(package.removeprefix("pilotfish."))
        boxes.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="4"/>'
            f'<text x="{x + width / 2:.0f}" y="{y + 21:.0f}" text-anchor="middle">{name}</text>'
        )
    return svg(WIDTH, 24 + (top + 1) * (BOX_HEIGHT + GAP) - GAP, lines + boxes)


def draw_flows() -> str:
    """Return an SVG image with one row of steps for each flow.

    Raises:
        FileNotFoundError: A module of a flow does not exist.
    """
    parts, y, width = [], 12, 158
    for title, steps in FLOWS.items():
        parts.append(f'<text class="title" x="12" y="{y + 12}">{escape(title)}</text>')
        for i, (what, module) in enumerate(steps):
            path = ROOT / module.replace(".", "/")
            if not (path.with_suffix(".py").is_file() or path.is_dir() or path.with_suffix(".cpp").is_file()):
                raise FileNotFoundError(f"flow {title!r}: there is no module {module}")
            x = 12 + i * (width + 14)
            if i:
                parts.append(f'<line x1="{x - 14}" y1="{y + 56}" x2="{x}" y2="{y + 56}"/>')
            parts.append(f'<rect x="{x}" y="{y + 20}" width="{width}" height="74" rx="4"/>')
            shown = [("", line) for line in wrap(what, 21)] + [("small", s) for s in wrap(module, 27, ".")]
            for n, (kind, line) in enumerate(shown):
                parts.append(f'<text class="{kind}" x="{x + 8}" y="{y + 37 + 15 * n}">{escape(line)}</text>')
        y += 112
    return svg(WIDTH + 16, y, parts)


def wrap(text: str, width: int, separator: str = " ") -> list[str]:
    """Split a text at a separator into lines of at most ``width`` characters."""
    lines = [""]
    for i, part in enumerate(text.split(separator)):
        piece = part if not i else separator + part
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append(piece.lstrip(" "))
        else:
            lines[-1] += piece
    return lines


def svg(width: float, height: float, parts: list[str]) -> str:
    """Return an SVG image on a white background."""
    frame = f'<rect class="background" width="{width:.0f}" height="{height:.0f}"/>'
    body = "\n".join([frame, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">\n'
        f"{STYLE}{body}\n</svg>\n"
    )


def main() -> int:
    """Write or check the diagrams; return the exit code."""
    stale = 0
    for name, text in (("packages.svg", draw_packages(package_imports())), ("flows.svg", draw_flows())):
        path = ROOT / "docs" / "images" / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'not current' if '--check' in sys.argv else 'written'}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
