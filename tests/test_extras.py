"""Tests of commands in an installation without extras, and of terminals that cannot show every character."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pilotfish._internal.extras import EXTRAS

# What a wheel without extras brings; all other packages seem to be missing.
BLOCK = """
import sys, importlib.abc
CORE = {"pilotfish", "pluggy", "numpy", "typer", "rich", "platformdirs", "click", "shellingham", "markdown_it", "mdurl",
        "pygments", "typing_extensions", "annotated_doc", "annotated_types", "pydantic", "pydantic_core",
        "typing_inspection", "sitecustomize"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in CORE and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
COMMANDS = {
    "retrieval": [
        "index build i a.txt", "index add i a.txt", "index sync i a.txt", "index delete i x", "index search i x",
        "index explain i x y", "index eval i d", "index tune i d", "index stats i", "index check i", "index compact i",
        "index export i o", "index serve i", "bench retrieval --data d",
    ],
    "rag": ["rag ask i q", "rag chat i", "rag serve i", "rag eval i q"],
    "train": ["train vdr o --text a.txt", "train xtr o --text a.txt"],
    "vllm": [
        "doctor", "serve smollm2-135m-instruct", "tune razor x", "tune tidal x", "prune a.png --out o",
        "datastore build a.txt --tokenizer x --out o",
    ],
}  # fmt: skip


@pytest.mark.slow
def test_a_command_without_its_extra_prints_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "d").mkdir()

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pilotfish", *command.split()],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip

    pairs = [(extra, command) for extra, commands in COMMANDS.items() for command in commands]
    with ThreadPoolExecutor(2) as pool:
        for (extra, command), result in zip(pairs, pool.map(run, [c for _, c in pairs]), strict=True):
            assert result.returncode == 2, (command, result.stderr)
            assert result.stderr.count("\n") == 1, (command, result.stderr)
            assert result.stderr.startswith("pilotfish: "), command
            assert f"pip install 'pilotfish[{extra}]'" in result.stderr, (command, result.stderr)
    assert run("plugins").returncode == run("--help").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["a.txt", "d", "sitecustomize.py"]


def test_every_extra_that_is_named_exists(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "encoding", ["cp1252", *(pytest.param(e, marks=pytest.mark.long) for e in ("ascii", "latin-1"))]
)
def test_output_to_a_terminal_that_is_not_utf8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("故乡 means home, İstanbul is a city 😀", encoding="utf-8")
    folder = str(tmp_path / "í故")

    # click writes UTF-8 where ASCII is all that the terminal declares.
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pilotfish", "index", *arguments],
            capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": encoding},
            encoding="utf-8" if encoding == "ascii" else encoding,
        )  # fmt: skip

    build = run("build", folder, str(tmp_path / "a.txt"), "--kind", "bm25")
    assert (build.returncode, "Traceback" in build.stderr) == (0, False), build.stderr
    for arguments in (("search", folder, "故乡"), ("search", folder, "home", "--json"), ("stats", folder)):
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert result.stdout
    wrong = run("search", folder, "x", "--where", "故 ==")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
