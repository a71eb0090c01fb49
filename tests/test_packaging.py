"""The wheel holds the real folders: a wrong include list would lose packages silently."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("plugins", "kvcache", "retrieval", "integrations")
INTERNAL = "src/pilotfish/_internal"


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
    expected |= {f"pilotfish/_internal/{path.name}" for path in (root / INTERNAL).glob("*.py")}
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
    assert names == {"pluggy", "numpy", "typer", "rich", "platformdirs"}


def test_import_contracts_hold(root: Path) -> None:
    """The layers in pyproject.toml: who may import whom, and no cycles."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", ["hookimpl", "Drafter", "KVPolicy", "VisualPruner", "IndexKind", "Encoder"])
def test_authors_import_from_the_top(name: str) -> None:
    code = f"import sys; from pilotfish import {name}; assert not {{'torch', 'vllm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
