"""Tests of the sdist and the wheel: a wrong include list would drop packages silently."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("plugins", "kvcache", "retrieval", "integrations")
INTERNAL = "src/pilotfish/_internal"


def test_sdist_then_wheel_holds_every_module(root: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(root)], check=True, capture_output=True, timeout=300)  # builds the wheel from the sdist
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


def test_symlinks_point_to_the_root_folders(root: Path) -> None:
    for folder in FOLDERS:
        link = root / "src" / "pilotfish" / folder
        assert link.is_symlink()
        assert link.resolve() == root / folder


def test_core_dependencies(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {d.partition(">")[0] for d in project["dependencies"]}
    assert names == {"pluggy", "numpy", "typer", "rich", "platformdirs"}


def test_import_contracts_hold(root: Path) -> None:
    """Test that imports follow the layers in pyproject.toml and have no cycles."""
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("name", ["hookimpl", "Drafter", "KVPolicy", "VisualPruner", "IndexKind", "Encoder"])
def test_public_names_import_without_torch_or_vllm(name: str) -> None:
    code = f"import sys; from pilotfish import {name}; assert not {{'torch', 'vllm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
