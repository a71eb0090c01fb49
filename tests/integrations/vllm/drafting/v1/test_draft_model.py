"""RASD over a draft model that vLLM itself runs: outputs stay, and what is retrieved saves steps."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
PROMPTS = [(list(range(1000, 1000 + k)) * 60)[:n] for k, n in ((7, 150), (5, 40), (9, 97))]


def over(draft: str, **options) -> dict:
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
    """Make an engine's configuration in a process of its own."""
    code = (
        "import json, sys; from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs(model=sys.argv[1], **json.loads(sys.argv[2])).create_engine_config()"
    )
    command = [sys.executable, "-c", code, model, json.dumps(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def other_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft model that is wrong most of the time: the same, with some noise."""
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
def test_outputs_stay_and_repeated_ones_take_few_steps(start, tiny_model: str, other_model: str) -> None:
    ask = {"do": "sample", "prompts": PROMPTS, "sampling": [GREEDY] * 3}
    stock = start(tiny_model)
    expected = stock.ask(**ask)["tokens"]
    stock.close()
    engine = start(tiny_model, **over(other_model))
    first, second = engine.ask(**ask), engine.ask(**ask)
    assert first["tokens"] == second["tokens"] == expected
    stats = engine.ask(do="state")["plugin"]
    assert 0 < stats["engine_draft_first"] < 0.9  # the model is asked, and often wrong
    assert second["request_steps"] < 0.5 * first["request_steps"]  # where it is, earlier outputs are right
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"verification": "tree"}, "the draft model's cache does not support trees; use verification=chain"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}, {}, "rasd builds on a draft model"),
    ],
)
def test_what_cannot_be_served_is_refused(tiny_model: str, change: dict, options: dict, message: str) -> None:
    config = over(tiny_model, **options) | change
    done = configure(tiny_model, config)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.long
def test_a_datastore_of_another_vocabulary_is_refused(tiny_model: str, tmp_path) -> None:
    from pilotfish.plugins.drafting import datastore

    datastore.build_datastore(tmp_path / "store", [[1, 2, 3]], "other", "0", 1000)
    config = over(tiny_model, datastore=str(tmp_path / "store"))
    done = configure(tiny_model, config)
    assert done.returncode != 0
    assert "its token ids are those of another tokenizer" in done.stderr
