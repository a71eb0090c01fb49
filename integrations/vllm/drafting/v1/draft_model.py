"""Drafters that use a draft model run by vLLM: the draft model proposes, our drafter decides which tokens to verify.

vLLM constructs no custom proposer in this case. Ours is created when the draft model is loaded, and called by a wrapper
of ``propose_draft_token_ids`` on the model runner instance. The draft model's KV cache needs no handling, since it
processes all tokens that a step accepted, whichever drafter proposed them. vLLM calls the draft model before it appends
the accepted tokens to the batch, so we append them first.
"""

from typing import Any

import numpy as np
import torch

from .model_runner import find_runner
from .proposer import PilotfishProposer


def attach_to_draft_model(proposer: Any) -> None:
    """Create the selected drafter and let it process the drafts of a draft model.

    Args:
        proposer: vLLM's proposer, whose draft model has just been loaded.
    """
    runner = find_runner()
    drafter = PilotfishProposer(proposer.vllm_config)
    drafter.load_model(None)
    proposer.pilotfish = drafter  # benchmark reports read it
    draft = runner.propose_draft_token_ids

    def propose_draft_token_ids(scheduler_output: Any, sampled_token_ids: torch.Tensor, *args: Any) -> Any:
        drafted = draft(scheduler_output, sampled_token_ids, *args)
        if drafter.plugin is None:  # only drafts of the first rank are used
            return drafted
        # Without draft probabilities, draft tokens count as deterministic, which is correct for any draft.
        runner._draft_probs = runner._draft_prob_req_ids = None
        accepted = accepted_tokens(runner, sampled_token_ids)
        lengths = append_accepted_tokens(runner.input_batch, accepted)
        return drafter.propose(accepted, lengths, runner.input_batch.token_ids_cpu, drafted=drafted.tolist())

    runner.propose_draft_token_ids = propose_draft_token_ids


def accepted_tokens(runner: Any, sampled: torch.Tensor) -> list[list[int]]:
    """Return the tokens that a step accepted or sampled for each request; none while its prompt is processed.

    Args:
        runner: vLLM's model runner.
        sampled: [b, tokens] token ids, padded with values that are no token id.
    """
    vocab_size, decoding = runner.input_batch.vocab_size, ~runner.discard_request_mask.np[: len(sampled)]
    return [
        [t for t in row if 0 <= t < vocab_size] if keep else []
        for row, keep in zip(sampled.tolist(), decoding, strict=True)
    ]


def append_accepted_tokens(batch: Any, accepted: list[list[int]]) -> np.ndarray:
    """Append tokens to the texts of a batch, as vLLM does again later in the step.

    Args:
        batch: vLLM's input batch.
        accepted: Accepted and sampled tokens of each request.

    Returns:
        [b] new lengths of the texts.
    """
    lengths = np.array(batch.num_tokens_no_spec[: len(accepted)])
    for i, tokens in enumerate(accepted):
        batch.token_ids_cpu[i, lengths[i] : lengths[i] + len(tokens)] = tokens
        lengths[i] += len(tokens)
    return lengths
