"""Tests of the scripts in ``benchmarks/gpu``, as far as a machine without a GPU can run them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = (
    "smoke",
    "kernels",
    "tests",
    "install",
    "vllm_kernels",
    "engine",
    "drafters",
    "retrieval",
    "launch",
    "real_model",
)


@pytest.fixture
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = root / "benchmarks" / "gpu"
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize("step", STEPS)
def test_every_step_can_be_imported(scripts: Path, step: str) -> None:
    spec = importlib.util.spec_from_file_location(f"gpu_step_{step}", scripts / f"gpu_{step}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.work)


def test_driver_script_knows_every_step(scripts: Path) -> None:
    text = (scripts / "on_device.sh").read_text()
    assert all(f"[{step}]=" in text for step in STEPS)
    assert {p.stem.removeprefix("gpu_") for p in scripts.glob("gpu_*.py")} == {*STEPS, "common", "arms"}
    refused = subprocess.run(["bash", scripts / "on_device.sh", "no-step"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "no step 'no-step'" in refused.stderr


@pytest.mark.parametrize("script", ["prepare.sh", "on_device.sh"])
def test_shell_scripts_parse(scripts: Path, script: str) -> None:
    subprocess.run(["bash", "-n", scripts / script], check=True, timeout=60)


@pytest.mark.parametrize("module", ["vllm.attention.sparse.flash_attn", "vllm.drafting.v1.proposer"])
def test_modules_that_the_install_step_imports_exist(scripts: Path, root: Path, module: str) -> None:
    assert f"pilotfish.integrations.{module}" in (scripts / "gpu_install.py").read_text()
    assert (root / "integrations" / Path(*module.split("."))).with_suffix(".py").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_kernel_step_passes_in_triton_interpreter(scripts: Path, tmp_path: Path) -> None:
    """Test that all checks of the step `kernels` pass with tiny shapes on a CPU."""
    process = subprocess.run(
        [sys.executable, str(scripts / "gpu_kernels.py"), "--device", "cpu", "--tiny"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert process.returncode == 0, (result["failures"], process.stderr[-2000:])
    assert result["ok"] and not result["failures"]
    checked = {r["arm"] for r in result["records"] if r["metric"] == "relative_error"}
    assert {"razor_decode", "razor_prompt", "tree_8"} < checked
    assert any(arm.startswith("tidal_") for arm in checked)


def test_real_model_step_names_missing_parts(scripts: Path, tmp_path: Path) -> None:
    from gpu_real_model import join_model  # type: ignore[import-not-found]

    with pytest.raises(FileNotFoundError, match="0 of several parts"):
        join_model(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "part-0-of-3").touch()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 parts of the model: copy \.gpu-model"):
        join_model(tmp_path)


def test_unpack_script_keeps_model_parts(scripts: Path, root: Path, tmp_path: Path) -> None:
    checkout, folder = tmp_path / "checkout", tmp_path / "site"
    (checkout / "src" / "pilotfish").mkdir(parents=True)
    (checkout / "src" / "pilotfish" / "__init__.py").touch()
    (checkout / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    (checkout / ".gpu-model").mkdir()
    for number in range(2):  # the second copy replaces the first part
        part = checkout / ".gpu-model" / f"part-{number}-of-2"
        part.write_text(str(number))
        subprocess.run([sys.executable, scripts / "unpack.py", folder], cwd=checkout, check=True, timeout=60)
        part.unlink()
    assert [p.read_text() for p in sorted((folder / "model").iterdir())] == ["0", "1"]


def test_unpack_script_writes_entry_points(scripts: Path, root: Path, tmp_path: Path) -> None:
    """Test that `unpack.py` writes the entry points through which plugins are loaded."""
    subprocess.run([sys.executable, scripts / "unpack.py", tmp_path], cwd=root, check=True, timeout=60)
    (info,) = tmp_path.glob("pilotfish-*.dist-info")
    points = (info / "entry_points.txt").read_text()
    assert "[vllm.general_plugins]" in points and "tidal_decode = pilotfish.plugins.tidal_decode" in points
