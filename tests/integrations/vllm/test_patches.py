"""Errors of plain `vllm serve`, patches that can be undone, tensor-parallel ranks, and the state file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pilotfish.integrations.vllm.engine.selection import PROPOSER_CLASS
from pilotfish.integrations.vllm.serving.command import vllm_serve

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
TEXTS = [[5, 6, 7, 8, 9], [100, 200, 300], [1000] * 20]


class TestRestartAndRanks:
    @pytest.fixture(scope="class")
    def texts(self, tmp_path_factory, tiny_model) -> list[list[int]]:
        return tokens_of(tmp_path_factory, tiny_model)

    @pytest.mark.long
    @pytest.mark.shows("token_recycling", "tables kept over restarts")
    def test_state_survives_a_restart(self, tmp_path_factory, tiny_model, drafting_args, texts, tmp_path) -> None:
        path = tmp_path / "state.npz"
        steps = []
        for _ in range(2):
            with engine(tmp_path_factory, tiny_model, **drafting_args(state_path=str(path))) as drafted:
                answer = drafted.ask(do="sample", prompts=TEXTS, sampling=[GREEDY] * 3)
                assert answer["tokens"] == texts
                steps.append(answer["request_steps"])
                drafted.ask(do="shut_down")
        assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]
        assert steps[1] < steps[0], "the second engine starts with a warm cache"

    @pytest.mark.long
    @pytest.mark.shows("token_recycling", "two tensor-parallel ranks")
    def test_two_ranks_give_the_same_text(self, two_ranks, tiny_model, drafting_args, texts) -> None:
        answer = two_ranks(tiny_model, TEXTS, **drafting_args(20, verification="tree", nodes=20))
        assert answer["tokens"] == texts
        assert answer["accepted"] > 0


def engine(factory: pytest.TempPathFactory, model: str, **config):
    """Start an engine with the test worker."""
    from forked_engine import ForkedEngineProcess

    worker = Path(__file__).parent / "worker.py"
    common = {
        "model": model,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "seed": 0,
    }
    return ForkedEngineProcess({**common, **config}, factory.mktemp("engine") / "log", worker=(str(worker),))


def tokens_of(factory: pytest.TempPathFactory, model: str) -> list[list[int]]:
    """Return the output of stock vLLM for ``TEXTS``."""
    with engine(factory, model) as stock:
        return stock.ask(do="sample", prompts=TEXTS, sampling=[GREEDY] * 3)["tokens"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--additional-config", '{"pilotfish": {"drafter": "nope"}}'], ["pilotfish.drafter.name: 'nope': unknown"]),
        pytest.param(
            ["--additional-config", '{"pilotfish": {"drafter": "token_recycling"}}'],
            ["add --speculative-config"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            [
                "--speculative-config",
                json.dumps({"method": "custom_class", "model": PROPOSER_CLASS, "num_speculative_tokens": 3}),
            ],
            ["pilotfish.drafter: missing"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["unknown plugin", "drafter without speculation", "speculation without drafter"],
)
def test_vllm_serve_refuses_bad_config_in_one_line(tiny_model, arguments: list[str], parts: list[str]) -> None:
    """Test that plain `vllm serve`, too, prints our error line and exits with status 2 before an engine starts."""
    result = subprocess.run(
        [*vllm_serve(tiny_model), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert result.returncode == 2, result.stderr[-2000:]
    error_lines = [line for line in result.stderr.splitlines() if line.startswith("pilotfish: ")]
    assert len(error_lines) == 1
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in error_lines[0]


def test_patches_can_be_undone() -> None:
    code = (
        "from pilotfish.integrations.vllm import patches\n"
        "import importlib\n"
        "ALL = patches.all_patches()\n"
        "[p.undo() for p in ALL]\n"  # importing its module applies one patch
        "before = [getattr(*p._owner()) for p in ALL]\n"
        "[p.apply() for p in ALL]; [p.apply() for p in ALL]\n"
        "assert all(p.applied for p in ALL)\n"
        "[p.undo() for p in ALL]; [p.undo() for p in ALL]\n"
        "assert [getattr(*p._owner()) for p in ALL] == before\n"
        "assert not any(p.applied for p in ALL)\n"
    )
    # Disable the entry point, which applies the first patch.
    env = {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=env)
