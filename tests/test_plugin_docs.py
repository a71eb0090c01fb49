"""Tests that the guides for plugin authors and contributors name only existing code."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pilotfish
from pilotfish.plugins import contracts, hookspecs

GUIDES = ("docs/plugins.md", "CONTRIBUTING.md")
PACKAGES = ("plugins", "kvcache", "retrieval", "integrations")
FOLDERS = (*PACKAGES, "tests", "docs", "examples", "benchmarks", "src")
FOREIGN = {"Makefile", "Settings", "Options"}  # neither classes nor methods; the latter two are attributes of contracts


def code_spans(path: Path) -> list[str]:
    """Return the texts in backquotes, without code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))


@functools.cache
def defined_names(root: Path) -> tuple[dict[str, set[str]], set[str], set[str]]:
    """Return the members of each class by class name, all functions and methods, and all constants."""
    classes: dict[str, set[str]] = {}
    functions: set[str] = set()
    constants: set[str] = set()
    for path in (p for folder in PACKAGES for p in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper():
                constants.add(node.id)
            elif isinstance(node, ast.ClassDef):
                members = classes.setdefault(node.name, set())
                members |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                members |= {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
    return classes, functions, constants


def exists(name: str) -> bool:
    """Return whether a dotted name is a module or an attribute of a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("guide", GUIDES)
def test_dotted_names_exist(root: Path, guide: str) -> None:
    text = (root / guide).read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w./\[])pilotfish(?:\.\w+)+", text))
    assert names
    assert sorted(n for n in names if not exists(n)) == []
    for line in re.findall(r"from pilotfish import ([\w, ]+)$", text, re.MULTILINE):
        assert [n for n in line.split(", ") if n not in pilotfish.__all__] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_classes_and_methods_exist(root: Path, guide: str) -> None:
    classes, functions, constants = defined_names(root)
    # The plugin guide names contracts; other classes appear by their dotted names, such as `pilotfish.retrieval.Index`.
    known = {*pilotfish.__all__, *contracts.__all__} if guide == "docs/plugins.md" else set(classes)

    def is_wrong(span: str) -> bool:
        if match := re.fullmatch(r"([A-Z][a-z]\w*|KVPolicy)(?:\.(\w+))?(?:\(\))?", span):
            cls, member = match.groups()
            return cls not in FOREIGN and (cls not in known or (member is not None and member not in classes[cls]))
        if match := re.fullmatch(r"(\w+)\(\)", span):
            return match[1] not in functions
        return re.fullmatch(r"[A-Z][A-Z_]+", span) is not None and span not in constants

    assert [span for span in code_spans(root / guide) if is_wrong(span)] == []


def test_guide_names_every_contract_and_hook(root: Path) -> None:
    spans = {span.removesuffix("()") for span in code_spans(root / "docs/plugins.md")}
    bases = {n for n in contracts.__all__ if isinstance(getattr(contracts, n), type)}
    plugin_types = {n for n in bases if issubclass(getattr(contracts, n), contracts.Plugin)} - {"Plugin"}
    assert plugin_types <= spans
    assert {n for n in vars(hookspecs) if n.startswith("register_")} <= spans
    for name in plugin_types:
        required = getattr(contracts, name).__abstractmethods__ - {"__init__"}
        assert {f"`{m}`" for m in required} - {f"`{s}`" for s in spans} == set(), name


def test_guide_names_every_public_name(root: Path) -> None:
    spans = set(code_spans(root / "docs/plugins.md"))
    assert {n for n in pilotfish.__all__ if n != "__version__"} <= spans
    assert {n for n in contracts.__all__ if n[0].isupper() and n not in pilotfish.__all__} == {
        "ROOT", "Arrays", "Float32", "Int32", "Plugin", "Region",
    }  # fmt: skip


@pytest.mark.parametrize("guide", GUIDES)
def test_files_and_targets_exist(root: Path, guide: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for span in code_spans(root / guide):
        if span.startswith("make "):
            missing += [] if span.removeprefix("make ") in targets else [span]
        for path in re.findall(rf"(?<![\w./])(?:\./)?((?:{'|'.join(FOLDERS)})/[\w./]*\w)(?![\w<])", span):
            missing += [] if (root / path).exists() else [span]
    assert missing == []


@pytest.mark.parametrize("name", [n for n in pilotfish.__all__ if n != "__version__"])
def test_public_names_are_those_of_the_contracts(name: str) -> None:
    value = getattr(pilotfish, name)
    assert name in dir(pilotfish)
    assert getattr(value, "__name__", name) == name
    if hasattr(contracts, name):
        assert value is getattr(contracts, name)


def test_star_import_loads_neither_torch_nor_vllm() -> None:
    code = "import sys; from pilotfish import *; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
