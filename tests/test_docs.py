"""Tests that the documentation matches the repository and the program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pilotfish.plugins.manager import HOOKS, plugins


@pytest.mark.parametrize("script", ["render.py", "package_diagram.py"])
def test_tables_and_diagrams_are_current(root: Path, script: str) -> None:
    result = subprocess.run(
        [sys.executable, str(root / "benchmarks" / script), "--check"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_plot_script_draws_every_figure(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(root / "benchmarks" / "plot.py"), str(tmp_path)], check=True, timeout=120)
    drawn = {p.name: p.read_bytes()[:8] for p in tmp_path.iterdir()}
    assert set(drawn) == {p.name for p in (root / "docs" / "figures").iterdir()}
    assert set(drawn.values()) == {b"\x89PNG\r\n\x1a\n"}


def documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "examples").rglob("*.md")]


def test_site_builds_in_strict_mode(root: Path, tmp_path: Path) -> None:
    """Test that every link and navigation page exists, and that the site loads nothing from other hosts."""
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://', home)


def test_dashboard_shows_existing_metrics(root: Path) -> None:
    dashboard = json.loads((root / "docs" / "grafana.json").read_text(encoding="utf-8"))
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"pilotfish_\w+?(?=_total|_bucket|\b)", target["expr"])
    }
    sources = "".join(
        (root / path).read_text(encoding="utf-8")
        for path in ("integrations/vllm/engine/metrics.py", "integrations/rag/server.py", "retrieval/server.py")
    )
    defined = set(re.findall(r'"(pilotfish_\w+)"', sources))
    assert shown and shown == {name for name in defined if "/" not in name}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    operating = (root / "docs" / "operating.md").read_text(encoding="utf-8")
    assert all(name in operating for name in defined)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["langchain", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama_index", "haystack"))]
)
def test_framework_examples_run(root: Path, name: str) -> None:
    example = root / "examples" / f"{name}_search.py"
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    first, *_ = result.stdout.splitlines()
    assert first.startswith("pilot "), result.stdout
    assert "bread" not in first


def test_links_between_documents_are_valid(root: Path) -> None:
    broken = []
    for path in documents(root):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_every_option_is_documented(root: Path) -> None:
    import dataclasses

    for kind in HOOKS:
        builtin = {n: c for n, c in plugins().classes(kind).items() if c.__module__.startswith("pilotfish.")}
        for name, cls in builtin.items():
            page = (root / "docs" / f"{name}.md").read_text()
            settings = dataclasses.fields(cls.Settings) if hasattr(cls, "Settings") else ()  # type: ignore[attr-defined]
            for option in (*dataclasses.fields(cls.Options), *settings):  # type: ignore[attr-defined]
                assert f"`{option.name}`" in page, f"docs/{name}.md says nothing of {option.name}"


def test_files_contain_no_machine_specific_paths(root: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![.\w])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "t" + "mp"]) + r")/")
    matches = []
    for name in tracked.stdout.split("\0"):
        path = root / name
        if name and path.is_file() and not path.is_symlink():
            matches += [f"{name}: {m}" for m in pattern.findall(path.read_text(errors="ignore"))]
    assert matches == []


@pytest.mark.slow
def test_index_example_runs(root: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(root / "examples" / "index.py")], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].split()[1] == "pilot:"
    assert "matches may" in result.stdout


@pytest.mark.slow
def test_python_code_in_index_guide_runs(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "indexes.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("a ")
