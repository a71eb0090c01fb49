"""A plugin from another package: installed, listed, chosen, and refused when it is broken."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the example package installed in it, to be put on PYTHONPATH."""
    target = tmp_path_factory.mktemp("site")
    source = str(root / "examples" / "third_party")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*command, source], check=True, capture_output=True, timeout=200)
    return str(target)


def test_it_is_listed_with_its_options(cli: Callable, installed: str) -> None:
    listed = json.loads(cli("plugins", "--json", PYTHONPATH=installed).stdout)
    (plugin,) = [p for p in listed["plugins"] if p["name"] == "repeat_last"]
    assert plugin["origin"] == "repeat_last"
    assert plugin["options"] == [
        {
            "name": "confidence",
            "type": "float",
            "default": 0.6,
            "help": "Estimated probability that a copied token is right.",
        }
    ]
    assert "repeat_last" not in {p["name"] for p in json.loads(cli("plugins", "--json").stdout)["plugins"]}


def test_it_can_be_chosen_and_its_options_are_checked(cli: Callable, installed: str) -> None:
    chosen = cli("serve", MODEL, "--drafter", "repeat_last,confidence=0.5", "--print", PYTHONPATH=installed)
    assert '"name": "repeat_last", "confidence": 0.5' in chosen.stdout
    bad = cli("serve", MODEL, "--drafter", "repeat_last,confidence=2", "--print", PYTHONPATH=installed)
    assert bad.returncode == 2
    assert "pilotfish.drafter.confidence: expected between 0 and 1, got 2.0" in bad.stderr


def test_a_broken_plugin_stops_only_those_who_choose_it(cli: Callable, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pilotfish]\nbroken = broken_module\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('out of order')\n")
    here = {"PYTHONPATH": str(tmp_path)}
    assert cli("serve", MODEL, "--drafter", "token_recycling", "--print", **here).returncode == 0
    chosen = cli("serve", MODEL, "--drafter", "broken", "--print", **here)
    assert chosen.returncode == 2
    assert "broken (RuntimeError: out of order)" in chosen.stderr
    doctor = cli("doctor", **here)
    assert doctor.returncode == 1
    assert "plugin broken failed to load: RuntimeError: out of order" in doctor.stdout


def test_it_copies(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)
    import repeat_last

    from pilotfish.plugins.contracts import DraftBudget, DraftRequest, Engine

    drafter = repeat_last.RepeatLast(repeat_last.RepeatLastOptions(), Engine("m", 10, 100, 1))
    text = np.array([1, 2, 3, 4, 1, 2], np.int32)
    (tree,) = drafter.propose([DraftRequest("r", text, 3)], DraftBudget(8, 8))
    assert tree.tokens.tolist() == [3, 4, 1]
    assert len(drafter.propose([DraftRequest("r", text[:2], 3)], DraftBudget(8, 8))[0]) == 0
