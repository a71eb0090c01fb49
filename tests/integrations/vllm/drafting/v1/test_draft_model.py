"""RASD with a draft model that vLLM runs: output is identical, and retrieved drafts save steps."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
PROMPTS = [(list(range(1000, 1000 + k)) * 60)[:n] for k, n in ((7, 150), (5, 40), (9, 97))]


def rasd_with_draft_model(draft: str, **options) -> dict:
    """Return engine arguments for RASD with the draft model ``draft``."""
    return {
        "additional_config": {"pilotfish": {"drafter": {"name": "rasd", "base": "engine", **options}}},
        "speculative_config": {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": 6,
        },
        "async_scheduling": False,
    }


def configure(model: str, config: dict) -> subprocess.CompletedProcess[str]:
    """Create an engine configuration in a separate process."""
    code = (
        "import json, sys; from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2])).create_engine_config()"
    )
    command = [sys.executable, "-c", code, model, json.dumps(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def noisy_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a draft model with a low acceptance rate: the target model with noise added to its weights."""
    import shutil

    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.shows("rasd", "a draft model")
def test_output_is_identical_and_repeated_prompts_take_fewer_steps(start, tiny_model: str, noisy_model: str) -> None:
    ask = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}
    stock = start(tiny_model)
    expected = stock.ask(**ask)["tokens"]
    stock.close()
    engine = start(tiny_model, **rasd_with_draft_model(noisy_model))
    first, second = engine.ask(**ask), engine.ask(**ask)
    assert first["tokens"] == second["tokens"] == expected
    stats = engine.ask(do="state")["plugin"]
    assert 0 < stats["engine_draft_first"] < 0.9  # drafts of the model are used, and often rejected
    assert second["request_steps"] < 0.5 * first["request_steps"]  # retrieved drafts replace the rejected ones
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"verification": "tree"}, "the draft model's cache does not support trees; use verification=chain"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}, {}, "rasd builds on a draft model"),
    ],
)
def test_refuses_unsupported_speculation(tiny_model: str, change: dict, options: dict, message: str) -> None:
    config = rasd_with_draft_model(tiny_model, **options) | change
    result = configure(tiny_model, config)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.long
def test_refuses_datastore_of_another_vocabulary(tiny_model: str, tmp_path) -> None:
    from pilotfish.plugins.drafting import datastore

    datastore.build_datastore(tmp_path / "store", [[1, 2, 3]], "other", "0", 1000)
    config = rasd_with_draft_model(tiny_model, datastore=str(tmp_path / "store"))
    result = configure(tiny_model, config)
    assert result.returncode != 0
    assert "its token ids are those of another tokenizer" in result.stderr
