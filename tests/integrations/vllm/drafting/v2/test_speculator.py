"""Tests of what the speculator passes to vLLM's adaptive verification."""

import pytest
import torch

pytest.importorskip("vllm")

from pilotfish.integrations.vllm.drafting.v2.speculator import conditional_rates


def test_rates_multiply_to_the_scores_of_paths() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.2], [0.9, 0.0, 0.0]])
    rates = conditional_rates(scores)
    assert torch.allclose(rates, torch.tensor([[0.5, 0.5, 0.8], [0.9, 0.0, 0.0]]))
    assert torch.allclose(rates.cumprod(1), scores)
