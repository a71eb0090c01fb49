"""What our drafter sees of vLLM's model runner: the logits of a step, the rows they belong to, the life of requests.

vLLM hands a custom drafter its configuration only. The runner that makes it is found on the call stack, and three of
its methods are wrapped on that one instance; classes stay as they are.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .....plugins.contracts import ROOT, Candidates, DraftTree, Int32
from ..top_k import top_k

CONTEXT = 16  # tokens before the first verified row that a drafter is shown


@dataclass
class Verified:
    """What one step did for one request."""

    request: str
    tokens: Int32  # sampled or accepted, [a]; none while a prompt is still processed
    candidates: Candidates
    text: Int32  # the whole text so far, [t]


def find_runner() -> Any:
    """The model runner that is being constructed, or None when somebody else made the drafter."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and hasattr(owner, "propose_draft_token_ids") and hasattr(owner, "vllm_config"):
            return owner
        frame = frame.f_back
    return None


class RunnerBinding:
    """Our hold on one model runner."""

    def __init__(self, runner: Any, k: int) -> None:
        self._runner, self._k = runner, k
        self._top: tuple[torch.Tensor, torch.Tensor] | None = None
        self._metadata: Any = None
        self.seconds = 0.0  # spent on choosing candidates

    def attach(self, finished: Callable[[str], None], closing: Callable[[], None]) -> None:
        """Start to listen: to logits, to requests that end, and to the shutdown of the worker."""
        runner = self._runner
        sample, removed, shutdown = runner._sample, runner._on_request_state_removed, runner.shutdown

        def _sample(logits: Any, spec_decode_metadata: Any) -> Any:
            # Before sampling, which may change logits in place; after the grammar's mask.
            started = time.perf_counter()
            # Within num_speculative_tokens of max_model_len vLLM would drop the drafts of the whole batch, and verify
            # zeros in their place. We clip for each request instead (`room`), so the limit can lie behind the end.
            # Set at each step, since fitting the context to memory resets it.
            # A draft model of vLLM's has to keep its limit.
            if not runner.speculative_config.uses_draft_model():
                runner.effective_drafter_max_model_len = runner.max_model_len + runner.num_spec_tokens + 2
            self._metadata = spec_decode_metadata
            self._top = None if logits is None else top_k(logits, self._k)
            self.seconds += time.perf_counter() - started
            return sample(logits, spec_decode_metadata)

        def _on_request_state_removed(req_id: str, req_state: Any) -> None:
            finished(req_id)
            removed(req_id, req_state)

        def _shutdown() -> None:
            closing()
            shutdown()

        runner._sample = _sample
        runner._on_request_state_removed = _on_request_state_removed
        runner.shutdown = _shutdown

    def prompt(self, index: int) -> Int32:
        """Token ids of the prompt at a batch index, [t]."""
        batch = self._runner.input_batch
        return batch.token_ids_cpu[index, : int(batch.num_prompt_tokens[index])]

    def sampling_params(self, request: str) -> Any:
        """The request's sampling parameters."""
        return self._runner.requests[request].sampling_params

    def free_slots(self, request: str, index: int, length: int) -> int:
        """How many drafted tokens the request can still take: neither its own limit nor the model's is passed."""
        batch, params = self._runner.input_batch, self.sampling_params(request)
        left = self._runner.max_model_len - length
        if params is not None and params.max_tokens is not None:
            left = min(left, params.max_tokens - (length - int(batch.num_prompt_tokens[index])))
        return left - 1  # the step yields one more token than it accepts

    def step(
        self,
        sampled: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        tree_of: Callable[[int], DraftTree | None] | None = None,
    ) -> list[Verified]:
        """The rows of the step that was just sampled, by request, in the order of the batch.

        Args:
            sampled: Accepted and sampled tokens of each request.
            num_tokens: [b] length of each text, those tokens included.
            token_ids: [b, max_model_len] the texts.
            tree_of: The tree that was verified for a request, by its index; None for a chain.
        """
        if self._top is None:
            return []
        batch, metadata = self._runner.input_batch, self._metadata
        values, indices = self._top
        probs = torch.softmax(values, -1).cpu().numpy()
        ids = torch.where(values.isneginf(), -1, indices).to(torch.int32).cpu().numpy()
        drafted = [0] * len(sampled) if metadata is None else metadata.num_draft_tokens
        drafts = np.empty(0, np.int32) if metadata is None else metadata.draft_token_ids.cpu().numpy()
        scheduled = np.diff(self._runner.query_start_loc.np[: len(sampled) + 1])
        rows, row, draft = [], 0, 0
        for i, tokens in enumerate(sampled):
            d = drafted[i]
            at = int(batch.num_computed_tokens_cpu[i]) + int(scheduled[i]) - 1 - d  # position of row 0
            inputs = np.empty(d + 1, np.int32)
            inputs[0] = token_ids[i, at]
            inputs[1:] = drafts[draft : draft + d]
            parents = np.arange(ROOT, d, dtype=np.int32)
            if tree_of is not None and (tree := tree_of(i)) is not None:
                parents[1:] = tree.parents + 1
            candidates = Candidates(
                context=token_ids[i, max(0, at - CONTEXT) : at],
                inputs=inputs,
                parents=parents,
                ids=ids[row : row + d + 1],
                probs=probs[row : row + d + 1],
            )
            text = token_ids[i, : int(num_tokens[i])]
            rows.append(Verified(batch.req_ids[i], np.array(tokens, np.int32), candidates, text))
            row, draft = row + d + 1, draft + d
        self._top = None
        return rows

    def is_decode_only(self, rows: int) -> bool:
        """Whether the step processed nothing but the ``rows`` that it verified."""
        requests = self._runner.input_batch.num_reqs
        return int(self._runner.query_start_loc.np[requests]) == rows
