import subprocess
import sys
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.engine import vllm_api
from pilotfish.integrations.vllm.engine.vllm_api import VllmApi

SOURCE = """
class Runner:
    declared: int

    def __init__(self):
        self.assigned = 1

    @property
    def computed(self): ...

    def step(self, a, b, *rest): ...


def free(x, y=1): ...
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Write a source tree with one module."""
    (tmp_path / "module.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize(
    ("api", "fault"),
    [
        (VllmApi("module.py", "Runner.declared"), None),
        (VllmApi("module.py", "Runner.assigned"), None),
        (VllmApi("module.py", "Runner.computed"), None),
        (VllmApi("module.py", "Runner.step", ("self", "a")), None),
        (VllmApi("module.py", "free", ("x", "y")), None),
        (VllmApi("module.py", "Runner.gone"), "no such attribute"),
        (VllmApi("module.py", "Runner.gone", ("self",)), "no such function"),
        (VllmApi("module.py", "Walker.step", ("self",)), "no class Walker"),
        (VllmApi("gone.py", "free", ()), "no file gone.py"),
        (VllmApi("module.py", "free", ("z",)), "takes (x, y), expected (z, ...)"),
    ],
)
def test_missing_apis(tree: Path, api: VllmApi, fault: str | None) -> None:
    assert vllm_api.missing_apis(tree, (api,)) == ([] if fault is None else [(api, fault)])


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.32.0", True), ("0.32.1.post1", True), ("0.33.0", True), ("0.31.9", False), ("0.34.0", False)],
)
def test_version_is_supported(version: str, supported: bool) -> None:
    assert vllm_api.version_is_supported(version) is supported


def test_the_installed_vllm_has_all_required_apis() -> None:
    assert vllm_api.installed_root() is not None, "tests need an installed vLLM"
    assert vllm_api.version_problem() is None


def test_untested_version_needs_allow_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_api, "installed_version", lambda: "0.99.0")
    problem = vllm_api.version_problem()
    assert problem is not None
    assert "0.99.0 is outside the tested range" in problem[0]
    assert vllm_api.version_problem(allow_untested=True) is None


def test_missing_api_is_named_in_the_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_api, "installed_root", lambda: tree)
    problem = vllm_api.version_problem()
    assert problem is not None
    assert "GPUModelRunner._sample (no file v1/worker/gpu_model_runner.py)" in problem[0]


def test_command_checks_an_unpacked_wheel(tree: Path) -> None:
    command = [sys.executable, "-m", "pilotfish.integrations.vllm.engine.vllm_api"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    broken = subprocess.run([*command, str(tree)], capture_output=True, text=True, timeout=60)
    assert broken.returncode == 1
    assert "MISSING" in broken.stdout
    assert subprocess.run([*command, str(tree / "no")], capture_output=True, timeout=60).returncode == 2
