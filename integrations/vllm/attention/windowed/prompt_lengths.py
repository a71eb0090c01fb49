"""The lengths of prompts, which vLLM's attention metadata does not contain.

A request that was preempted reads its own output again. vLLM's V2 runner reports these tokens as tokens of the prompt,
and the V1 runner those of them that share a chunk with the end of the prompt. With exact prefill, they would attend to
other tokens than before, and to blocks that were freed.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.patching import Patch

UNKNOWN = torch.iinfo(torch.int32).max  # the whole chunk counts as prompt


class _Step:
    """The step that is being prepared; a worker prepares one at a time."""

    prompts: NDArray[np.int32] | None = None  # length of the prompt of each request


def of_step(is_prefilling: torch.Tensor | None, requests: int) -> torch.Tensor:
    """Return for each request the number of tokens that count as prompt in this step.

    Args:
        is_prefilling: vLLM's flags, [at most requests] bool on the CPU; None while a CUDA graph is captured.
        requests: Number of requests, padding included.

    Returns:
        [requests] int32 on the CPU; 0 for requests that decode, and for padding.
    """
    lengths = torch.zeros(requests, dtype=torch.int32)
    if is_prefilling is not None:
        flags = is_prefilling[:requests]
        known = torch.full((len(flags),), UNKNOWN, dtype=torch.int32)
        if _Step.prompts is not None:
            prompts = torch.from_numpy(_Step.prompts[: len(flags)].astype(np.int32))
            known[: len(prompts)] = prompts
        lengths[: len(flags)] = torch.where(flags, known, 0)
    return lengths


def _v1(original: Any) -> Any:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        _Step.prompts = self.input_batch.num_prompt_tokens
        return original(self, *args, **kwargs)

    return _build_attention_metadata


def _v2(original: Any) -> Any:
    def prepare_attn(self: Any, input_batch: Any) -> Any:
        _Step.prompts = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
        return original(self, input_batch)

    return prepare_attn


PROMPTS_V1 = Patch("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._build_attention_metadata", _v1)
PROMPTS_V2 = Patch("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_attn", _v2)


def observe(vllm_config: Any) -> None:
    """Observe the prompt lengths of every step of this worker's model runner."""
    (PROMPTS_V2 if getattr(vllm_config, "use_v2_model_runner", False) else PROMPTS_V1).apply()
