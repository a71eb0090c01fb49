"""The number of draft tokens of a step on the V2 model runner, by measured step times and acceptance.

vLLM looks it up by the number of requests in ``dynamic_sd_lookup``, a table of the scheduler. With our default schedule
this table is replaced by one that learns (see `BatchDraftLength`); a schedule that a user wrote remains as it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .....plugins.drafting.batch_draft_length import BatchDraftLength
from .....plugins.drafting.draft_length import StepCostModel
from ...engine import log
from ..compatibility import MEMORY_BOUND_TOKENS, device_speculation

MAX_TOKENS = 512  # of a step with draft tokens: vLLM's memory profile has logits for one token of each request


@dataclass(frozen=True)
class DecodeStep:
    """A step that processes no prompt.

    Attributes:
        num_requests: Number of requests with draft tokens; of all, if none has any.
        length: Largest number of draft tokens of a request.
        accepted: Number of accepted draft tokens of all requests together.
        uniform: Whether all requests have the same number of draft tokens.
    """

    num_requests: int
    length: int
    accepted: int
    uniform: bool


def install_measured_schedule(
    scheduler: Any, drafter: type, verification: str, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Replace a scheduler's table of the number of draft tokens, if its schedule is our default.

    Args:
        scheduler: vLLM's scheduler.
        drafter: Class of the drafter.
        verification: ``chain`` or ``tree``.
        clock: Function that returns the time in seconds.
    """
    table = scheduler.dynamic_sd_lookup
    given = scheduler.vllm_config.speculative_config.num_speculative_tokens_per_batch_size
    default = device_speculation(drafter, verification)["num_speculative_tokens_per_batch_size"]
    if table is None or [list(entry) for entry in given] != default:
        return
    most = min(MAX_TOKENS, scheduler.max_num_scheduled_tokens)
    lengths = scheduler.dynamic_sd_lookup = BatchDraftLength(table, StepCostModel(), MEMORY_BOUND_TOKENS, most)
    update, ended, last = scheduler.update_from_output, None, -1

    def update_and_observe(scheduler_output: Any, model_runner_output: Any) -> Any:
        nonlocal ended, last
        now, step = clock(), decode_step(scheduler_output, model_runner_output)
        if step is not None:
            # In the first step of another length, kernels may be compiled.
            seconds = now - ended if ended is not None and step.uniform and step.length == last else None
            lengths.observe(step.num_requests, step.length, step.accepted, seconds)
        outputs = update(scheduler_output, model_runner_output)
        last = -1 if step is None else step.length
        ended = now if step is not None and scheduler.has_unfinished_requests() else None
        return outputs

    scheduler.update_from_output = update_and_observe
    choices = ", ".join(map(str, lengths.choices))
    log.logger.info("pilotfish: the number of draft tokens per request follows measured step times: %s", choices)


def decode_step(scheduler_output: Any, model_runner_output: Any) -> DecodeStep | None:
    """Return the facts of a step; None if it processes prompts, or nothing.

    Args:
        scheduler_output: vLLM's description of the step.
        model_runner_output: vLLM's output of the step.
    """
    requests, drafts = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens
    counts = {request: len(drafts.get(request, ())) for request in requests}
    if not counts or scheduler_output.total_num_scheduled_tokens != len(counts) + sum(counts.values()):
        return None
    sampled = dict(zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=False))
    accepted = sum(max(len(sampled.get(r, ())) - 1, 0) for r, drafted in counts.items() if drafted)
    with_drafts = sum(1 for drafted in counts.values() if drafted)
    return DecodeStep(with_drafts or len(counts), max(counts.values()), accepted, len(set(counts.values())) == 1)
