"""Echo and induction scores of heads measured in vLLM, against attention matrices of transformers, by model family."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.integrations.vllm.bench.engine import ENVIRONMENT
from pilotfish.kvcache import retrieval_heads

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS, HEADS, PERIOD = 2, 4, 50


def build(family: str, folder: Path) -> Any:
    """Create a randomly initialised model, and save it to ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
        sliding_window=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, weights in model.named_parameters():  # biases and norms with an effect
        if weights.ndim == 1:
            torch.nn.init.normal_(weights, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


def reference_scores(weights: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return echo and induction scores of a layer's heads, from its attention weights [heads, n, n]."""
    n = weights.shape[-1]
    echo, induction = torch.zeros(2, HEADS)
    for i in range(1 + PERIOD, n):
        earlier = [j for j in range(1, i) if (i - j) % PERIOD == 0]
        echo += weights[:, i, earlier].sum(-1)
        induction += weights[:, i, [j + 1 for j in earlier]].sum(-1)
    return (echo / (n - 1 - PERIOD)).tolist(), (induction / (n - 1 - PERIOD)).tolist()


SCRIPT = """
import json, sys
from pilotfish.integrations.vllm.bench.heads_worker import HeadsWorker
if __name__ == '__main__':
    config, folders, asked = map(json.loads, sys.argv[1:])
    for folder in folders:
        print('ANSWER', json.dumps(HeadsWorker({**config, 'model': folder}).scores(**asked)), flush=True)
"""


@pytest.mark.long
def test_scores_match_transformers(tmp_path: Path) -> None:
    tokens, period = retrieval_heads.repeated_random_tokens(512, 1 + 4 * PERIOD, seed=0)
    assert period == PERIOD
    config = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    models = {family: build(family, tmp_path / family) for family in ("llama", "qwen2", "qwen3", "mistral")}
    folders = [str(tmp_path / family) for family in models]
    arguments = [json.dumps(x) for x in (config, folders, {"tokens": tokens, "period": period})]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**ENVIRONMENT, **os.environ},
    )
    answers = [json.loads(x.removeprefix("ANSWER ")) for x in result.stdout.splitlines() if x.startswith("ANSWER")]
    assert len(answers) == len(models), result.stderr[-2000:]
    for (family, model), scores in zip(models.items(), answers, strict=True):
        with torch.no_grad():
            attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            echo, induction = reference_scores(weights[0])
            assert max(induction) > 0.01, "the scores must not be zero"
            assert scores["echo"][layer] == pytest.approx(echo, abs=2e-4), family
            assert scores["induction"][layer] == pytest.approx(induction, abs=2e-4), family
