"""Workarounds for vLLM defects that affect steps with draft tokens."""

from typing import Any

from ..engine.patching import Patch


def _expand(original: Any) -> Any:
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        import torch

        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1, dtype=torch.long))
        expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
        if replace_from != replace_to:
            expanded = expanded.masked_fill(expanded == replace_from, replace_to)
        return expanded

    return expand_batch_to_tokens


def _constraints(original: Any) -> Any:
    def apply_sampling_constraints(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return original(logits, *args, **kwargs) if logits.shape[0] else logits

    return apply_sampling_constraints


EXPAND_BATCH = Patch("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", _expand)


SAMPLING_CONSTRAINTS = Patch("vllm.v1.sample.rejection_sampler", "apply_sampling_constraints", _constraints)


def draft_sampling_is_broken() -> bool:
    """Return whether vLLM fails to pass a request's temperature, top-p and top-k to its draft tokens.

    In the CPU build of vLLM 0.32, ``_expand_kernel_impl`` converts its output tensor to int64 if it has another type,
    writes into that copy and discards it. All speculative methods, including vLLM's, then sample with uninitialised
    memory.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    x = torch.tensor([0.5, 2.0, 0.25])
    ends = torch.tensor([1, 3, 4], dtype=torch.int32)
    try:
        return rejection_sampler.expand_batch_to_tokens(x, ends, 4).tolist() != [0.5, 2.0, 2.0, 0.25]
    except Exception:  # a kernel that cannot run has to be replaced too
        return True


def empty_steps_fail(device: str) -> bool:
    """Return whether vLLM fails on a step in which no request has draft tokens but one uses top-k.

    The CPU build of vLLM 0.32 computes the maximum of an empty tensor in such a step, which stops the engine. This
    affects every speculative method that may propose no tokens.

    Args:
        device: Device of the logits.
    """
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits, k = torch.empty(0, 8, device=device), torch.empty(0, dtype=torch.int32, device=device)
    try:
        apply_top_k_top_p(logits, k, None)
    except (RuntimeError, IndexError):
        return True
    return False
