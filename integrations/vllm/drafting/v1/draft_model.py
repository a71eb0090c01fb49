"""A drafter of ours over a draft model that vLLM itself runs: the model drafts, we look at it and say what is verified.

vLLM constructs no custom proposer then, so ours is made as soon as the draft model is loaded, and stands behind the
runner's ``propose_draft_token_ids``, one instance of it. The draft model's own cache needs no care: it reads again all
tokens that a step accepted, whoever drafted them. It drafts before vLLM has written down what was accepted, so we do.
"""

from typing import Any

import numpy as np
import torch

from .model_runner import find_runner
from .proposer import PilotfishProposer


def attach_to_draft_model(proposer: Any) -> None:
    """Put the selected drafter behind ``proposer``, vLLM's, whose model was just loaded."""
    runner = find_runner()
    drafter = PilotfishProposer(proposer.vllm_config)
    drafter.load_model(None)
    proposer.pilotfish = drafter  # where reports look for it
    draft = runner.propose_draft_token_ids

    def propose_draft_token_ids(scheduler_output: Any, sampled_token_ids: torch.Tensor, *args: Any) -> Any:
        drafted = draft(scheduler_output, sampled_token_ids, *args)
        if drafter.plugin is None:  # a rank whose drafts nobody asks for
            return drafted
        # Without probabilities a draft is verified as one that was certain, which is right for any draft.
        runner._draft_probs = runner._draft_prob_req_ids = None
        came = accepted_tokens(runner, sampled_token_ids)
        lengths = append_accepted_tokens(runner.input_batch, came)
        return drafter.propose(came, lengths, runner.input_batch.token_ids_cpu, drafted=drafted.tolist())

    runner.propose_draft_token_ids = propose_draft_token_ids


def accepted_tokens(runner: Any, sampled: torch.Tensor) -> list[list[int]]:
    """Tokens that a step gave each request; none while its prompt is still processed.

    Args:
        runner: vLLM's.
        sampled: [b, tokens] padded with what is no token.
    """
    size, read = runner.input_batch.vocab_size, ~runner.discard_request_mask.np[: len(sampled)]
    return [
        [t for t in row if 0 <= t < size] if whole else [] for row, whole in zip(sampled.tolist(), read, strict=True)
    ]


def append_accepted_tokens(batch: Any, came: list[list[int]]) -> np.ndarray:
    """Write tokens behind their texts, as vLLM will again in a moment; returns the lengths, [b]."""
    lengths = np.array(batch.num_tokens_no_spec[: len(came)])
    for i, tokens in enumerate(came):
        batch.token_ids_cpu[i, lengths[i] : lengths[i] + len(tokens)] = tokens
        lengths[i] += len(tokens)
    return lengths
