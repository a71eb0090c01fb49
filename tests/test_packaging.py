"""The wheel holds the real folders: a wrong include list would lose packages silently."""

import subprocess
import sys
import zipfile
from pathlib import Path

FOLDERS = ("plugins", "kvcache", "retrieval", "integrations")


def test_sdist_then_wheel_holds_every_module(root: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(root)], check=True, capture_output=True, timeout=300)  # sdist, and the wheel from it
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"pilotfish/{path.relative_to(root).as_posix()}"
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"pilotfish/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    assert packed == expected


def test_links_lead_to_the_root_folders(root: Path) -> None:
    for folder in FOLDERS:
        link = root / "src" / "pilotfish" / folder
        assert link.is_symlink()
        assert link.resolve() == root / folder


def test_core_dependencies_stay_few(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {d.partition(">")[0] for d in project["dependencies"]}
    assert names == {"pluggy", "numpy", "typer", "rich"}


def test_only_the_vllm_integration_imports_vllm(root: Path) -> None:
    import ast

    offenders = []
    for folder in FOLDERS:
        for path in (root / folder).rglob("*.py"):
            if path.is_relative_to(root / "integrations" / "vllm"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                offenders += [f"{path.name}: {n}" for n in names if n.split(".")[0] == "vllm"]
    assert offenders == []
