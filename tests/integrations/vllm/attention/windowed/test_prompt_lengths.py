"""Tests of the lengths of prompts in a step."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from pilotfish.integrations.vllm.attention.windowed import prompt_lengths


@pytest.fixture(autouse=True)
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lengths._Step, "prompt_lens", np.array([300, 20, 500, 9]))


def test_requests_that_decode_and_padding_have_no_prompt() -> None:
    flags = torch.tensor([True, False, True])
    assert prompt_lengths.prompt_lens_of_step(flags, 5).tolist() == [300, 0, 500, 0, 0]


def test_no_flags_mean_no_prompt() -> None:
    assert prompt_lengths.prompt_lens_of_step(None, 3).tolist() == [0, 0, 0]


def test_whole_chunk_is_prompt_if_lengths_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lengths._Step, "prompt_lens", None)
    assert prompt_lengths.prompt_lens_of_step(torch.tensor([False, True]), 2).tolist() == [0, prompt_lengths.UNKNOWN]


@pytest.mark.parametrize("v2", [False, True])
def test_lengths_are_those_of_the_requests_of_a_batch(v2: bool) -> None:
    """Test that both runners' lengths arrive: V1 keeps them in the order of the batch, V2 by request."""

    class Runner:
        class input_batch:  # noqa: N801
            num_prompt_tokens = np.array([7, 8])

        class req_states:  # noqa: N801
            class prompt_len:  # noqa: N801
                np = np.array([1, 2, 3, 4])

    class Batch:
        idx_mapping_np = np.array([2, 0])

    wrap, expected = (prompt_lengths._record_v2, [3, 1]) if v2 else (prompt_lengths._record_v1, [7, 8])
    assert wrap(lambda self, batch: "result")(Runner(), Batch()) == "result"
    assert prompt_lengths.prompt_lens_of_step(torch.tensor([True, True]), 2).tolist() == expected
