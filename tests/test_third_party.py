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
            "help": "Estimated probability that a draft token is accepted.",
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


@pytest.fixture(scope="session")
def pruner_installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the example of a pruner installed in it."""
    target = str(tmp_path_factory.mktemp("site"))
    options = ("-q", "--no-deps", "--no-build-isolation", "--target", target)
    command = [sys.executable, "-m", "pip", "install", *options, str(root / "examples" / "token_correlation")]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return target


def test_a_pruner_of_another_package_is_used(cli: Callable, pruner_installed: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((400, 300), 60).convert("RGB").save(tmp_path / "noise.png")
    arguments = ("prune", str(tmp_path / "noise.png"), "--pruner", "token_correlation,retain=0.5")
    answer = cli(*arguments, "--out", str(tmp_path / "out"), PYTHONPATH=pruner_installed)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out" / "noise-token-correlation-retain-0-5.png").exists()
    assert cli(*arguments).returncode == 2, "it is not there without its package"
    chosen = ("serve", MODEL, "--pruner", "token_correlation,similar=0.9", "--print")
    assert '"similar": 0.9' in cli(*chosen, PYTHONPATH=pruner_installed).stdout


def test_dense_crops_keep_more(pruner_installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pruner_installed)
    import token_correlation as example
    import torch

    from pilotfish.plugins.contracts import ImageFeatures, ImageLayout

    layout = ImageLayout(6, (1, 2), (0, 6, 0, 12), (6, 12), row_newlines=True)
    tokens = torch.randn(layout.num_tokens, 16, generator=torch.Generator().manual_seed(0))
    grid = tokens[36:].view(6, 13, 16)
    grid[:, :6] = 1.0  # the first crop shows one thing over and over
    pruner = example.TokenCorrelation(example.TokenCorrelationOptions(0.25))
    plan = pruner.plan(layout)
    kept = pruner.select(
        layout, plan, ImageFeatures(tokens, torch.rand(3, 36, generator=torch.Generator().manual_seed(1)))
    )
    assert len(kept) == plan.num_tokens
    columns = [int(i - 36) % 13 for i in kept if i >= 36]
    assert sum(c < 6 for c in columns) == 0
    assert sum(6 <= c < 12 for c in columns) == 18
