"""Prompt lengths of a step, which vLLM's attention metadata lacks.

When a preempted request resumes, its output tokens are prefilled again. ``is_prefilling`` covers them: on the V2 runner
all of them (``prefill_len`` > ``prompt_len``), on the V1 runner those in the same chunk as the end of the prompt. With
exact prefill they would attend to evicted tokens, whose blocks were freed.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.patching import Patch

UNKNOWN = torch.iinfo(torch.int32).max  # the whole chunk counts as prompt


class _Step:
    """The step that is being prepared; a worker prepares one at a time."""

    prompt_lens: NDArray[np.int32] | None = None  # [num_reqs] (V2) or [max_num_reqs] (V1), in batch order


def prompt_lens_of_step(is_prefilling: torch.Tensor | None, requests: int) -> torch.Tensor:
    """Return for each request the number of tokens that count as prompt in this step.

    Args:
        is_prefilling: `CommonAttentionMetadata.is_prefilling`, [at most requests] bool on the CPU; None if the
            caller did not set it.
        requests: Number of requests, padding included.

    Returns:
        [requests] int32 on the CPU; 0 for requests that decode, and for padding.
    """
    lengths = torch.zeros(requests, dtype=torch.int32)
    if is_prefilling is not None:
        flags = is_prefilling[:requests]
        known = torch.full((len(flags),), UNKNOWN, dtype=torch.int32)
        if _Step.prompt_lens is not None:
            prompts = torch.from_numpy(_Step.prompt_lens[: len(flags)].astype(np.int32))
            known[: len(prompts)] = prompts
        lengths[: len(flags)] = torch.where(flags, known, 0)
    return lengths


def _record_v1(original: Any) -> Any:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        _Step.prompt_lens = self.input_batch.num_prompt_tokens
        return original(self, *args, **kwargs)

    return _build_attention_metadata


def _record_v2(original: Any) -> Any:
    def prepare_attn(self: Any, input_batch: Any) -> Any:
        _Step.prompt_lens = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
        return original(self, input_batch)

    return prepare_attn


PROMPT_LENS_V1 = Patch("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._build_attention_metadata", _record_v1)
PROMPT_LENS_V2 = Patch("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_attn", _record_v2)


def apply_patch(vllm_config: Any) -> None:
    """Patch the model runner in use, so that it records the prompt lengths of each step for `prompt_lens_of_step`."""
    (PROMPT_LENS_V2 if getattr(vllm_config, "use_v2_model_runner", False) else PROMPT_LENS_V1).apply()
