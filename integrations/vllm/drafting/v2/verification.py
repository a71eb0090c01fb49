"""Verification of drafts by sampling at every position; a seeded request gets the text of stock vLLM.

vLLM's rejection sampler draws a uniform number per draft token, so that a request with a seed gives other text with
speculation than without. Here a token is sampled at every position, with the noise that vLLM draws for that position
without speculation, and draft tokens are accepted as long as they equal the sampled ones. That is exact too: the
draft distribution is one-hot, so both ways accept a draft token with its probability under the target model.
"""

from collections.abc import Callable
from typing import Any

import torch

Accept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def replace_verification(rejection_sampler: Any, accept: Accept) -> None:
    """Replace the method of a rejection sampler of vLLM that samples and accepts tokens.

    Args:
        rejection_sampler: vLLM's rejection sampler.
        accept: Function of the token sampled at each row [rows] int64, the token of each row [rows] int32, the
            first row of each request [requests + 1] int32, and the index of each request [requests] int32. It
            returns the accepted tokens and their numbers, as `accept_chains`.
    """
    sampler = rejection_sampler.sampler

    def verify(
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: Any,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        del draft_logits
        sampled, processed_logits = sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs=True,
        )
        return processed_logits, *accept(sampled, verify_draft_sampled, cu_num_logits, idx_mapping)

    rejection_sampler._verify = verify


def accept_chains(
    sampled: torch.Tensor, drafted: torch.Tensor, cu_num_logits: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept the draft tokens of each request up to the first that differs from the sampled one.

    Args:
        sampled: [n] int64 token sampled at each row, that is after the row's token.
        drafted: [n] token of each row: first the last accepted one, then draft tokens; -1 for an invalid one.
        cu_num_logits: [requests + 1] int32 first row of each request.
        width: Largest number of rows of a request.

    Returns:
        Tokens, [requests, width] int64, and how many of them each request gets, [requests] int32.
    """
    column = torch.arange(width, device=sampled.device)
    rows = cu_num_logits[:-1, None] + column
    inside = rows < cu_num_logits[1:, None]
    rows = rows.clamp(max=len(sampled) - 1)
    tokens = sampled[rows]
    right = (tokens[:, :-1] == drafted[rows][:, 1:]) & inside[:, 1:]
    return tokens, 1 + right.cumprod(1).sum(1).int()
