"""LoRA adapters of steps with draft tokens on vLLM's V2 model runner.

The runner tells the adapters' layers which adapter belongs to each sampled row, but it counts one row for each request,
while a request with draft tokens has several (vLLM 0.32 and 0.33; the V1 model runner counts all rows).
"""

from typing import Any

import numpy as np


def map_adapters_to_rows(runner: Any) -> None:
    """Map adapters to all sampled rows of a step, those of draft tokens included.

    Args:
        runner: vLLM's model runner; its ``prepare_inputs`` and ``lora_state.make_lora_inputs`` are wrapped.
    """
    prepare_inputs, make_lora_inputs = runner.prepare_inputs, runner.lora_state.make_lora_inputs
    cu_num_logits = np.zeros(1, np.int32)

    def prepare_and_remember(*args: Any, **kwargs: Any) -> Any:
        nonlocal cu_num_logits
        batch = prepare_inputs(*args, **kwargs)
        cu_num_logits = batch.cu_num_logits_np
        return batch

    def map_rows(req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray) -> Any:
        of_requests, of_tokens, active = make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        of_rows = np.repeat(np.asarray(of_requests), np.diff(cu_num_logits))
        return tuple(of_rows), of_tokens, active

    runner.prepare_inputs, runner.lora_state.make_lora_inputs = prepare_and_remember, map_rows
