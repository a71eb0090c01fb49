"""`pilotfish bench kernels`, in a process of its own, with the kernels interpreted unless the machine has a GPU."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu import HAS_GPU
from refusals import refused

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SMALL = ("--batches", "2", "--context", "256", "--vocab-size", "300", "--num-speculative-tokens", "2")


@pytest.mark.parametrize("shape", [(), pytest.param(("--trees",), marks=pytest.mark.long)])
def test_measures_every_part_of_a_step(cli: Callable, tmp_path: Path, shape: tuple[str, ...]) -> None:
    out = tmp_path / "kernels.json"
    device = "cuda" if HAS_GPU else "cpu"
    arms = "token_recycling,rasd@outputs=64"
    result = cli("bench", "kernels", "--device", device, "--arms", arms, *shape, *SMALL, "--out", str(out))
    assert result.returncode == 0, result.stderr
    records = json.loads(out.read_text())["records"]
    values = {(r["arm"], r["metric"]): r["value"] for r in records}
    for arm in (name + "@verification=tree" * bool(shape) for name in arms.split(",")):
        for part in ("top_k", "observe", "propose"):
            assert values[arm, f"{part}_time_us"] > 0
            assert ((arm, f"{part}_graph_us") in values) == HAS_GPU
        assert values[arm, "device_memory_bytes"] > 0
    assert {r["dataset"] for r in records} == {"batch_2"}
    assert all(arm in result.stdout for arm in arms.split(","))


def test_refuses_bad_input(preloaded_cli: Callable, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "kernels.json"))
    unknown = preloaded_cli("bench", "kernels", "--device", "cpu", "--arms", "token_recyclin", *SMALL, *out)
    refused(unknown, "token_recyclin", "did you mean 'token_recycling'?")
    option = preloaded_cli("bench", "kernels", "--device", "cpu", "--arms", "rasd@outputz=1", *SMALL, *out)
    refused(option, "outputz", "did you mean 'outputs'?")
    refused(preloaded_cli("bench", "kernels", "--device", "tpu", *out), "--device: expected cuda or cpu, got 'tpu'")
    refused(preloaded_cli("bench", "kernels", "--device", "cpu", "--batches", "0", *out), "--batches")
    many = "token_recycling,rasd@max_occurrences=100"
    refused(preloaded_cli("bench", "kernels", "--device", "cpu", "--arms", many, *SMALL, *out), "rasd", "64")
    if not HAS_GPU:
        refused(preloaded_cli("bench", "kernels", *out), "torch finds no CUDA device")
    assert not list(tmp_path.iterdir())
