"""Tests of the speculative settings that drafters refuse."""

from types import SimpleNamespace
from typing import Any

import pytest

from pilotfish.integrations.vllm.drafting import compatibility
from pilotfish.integrations.vllm.engine.selection import PROPOSER_CLASS
from pilotfish.plugins.config import PilotfishConfig
from pilotfish.plugins.contracts import Unsupported
from pilotfish.plugins.token_recycling import TokenRecycling


def check(**speculative: Any) -> None:
    settings = {"method": "custom_class", "model": PROPOSER_CLASS, **speculative}
    model = SimpleNamespace(model="m", enable_prompt_embeds=False, runner_type="generate")
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**settings), model_config=model, use_v2_model_runner=False
    )
    compatibility._check_speculation(TokenRecycling, TokenRecycling.Options(), PilotfishConfig(), config)


@pytest.mark.parametrize(
    "speculative",
    [
        {},
        {"rejection_sample_method": "standard"},
        {"rejection_sample_method": "block", "draft_sample_method": "greedy"},
    ],
)
def test_accepts_settings_that_keep_the_output_distribution(speculative: dict[str, str]) -> None:
    check(**speculative)


@pytest.mark.parametrize(
    ("name", "value"), [("draft_sample_method", "probabilistic"), ("rejection_sample_method", "synthetic")]
)
def test_refuses_settings_that_its_verifier_does_not_implement(name: str, value: str) -> None:
    with pytest.raises(Unsupported, match=rf"token_recycling does not support model m: {name}='{value}'.*remove it"):
        check(**{name: value})
