"""Tests of what `pilotfish doctor` says of vLLM's model runners."""

import pytest

from pilotfish.integrations.vllm.engine import vllm_api
from pilotfish.integrations.vllm.serving import doctor


@pytest.mark.parametrize(
    ("gpu", "setting", "notes"),
    [
        (True, "", ["token_recycling runs on the V2 model runner", "rasd runs on the V2 model runner"]),
        (False, "", ["drafters run on the V1 model runner, vLLM's default in its CPU build"]),
        (True, "0", ["VLLM_USE_V2_MODEL_RUNNER selects the V1 model runner"]),
        (True, "1", ["VLLM_USE_V2_MODEL_RUNNER selects the V2 model runner"]),
    ],
)
def test_the_model_runner_of_drafters_is_stated(monkeypatch, gpu: bool, setting: str, notes: list[str]) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", setting)
    monkeypatch.setattr(vllm_api, "is_gpu_build", lambda: gpu)
    found = "\n".join(doctor.examine().notes)
    for note in notes:
        assert note in found
