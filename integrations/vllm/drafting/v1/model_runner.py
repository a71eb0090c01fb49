"""Access of a drafter to vLLM's model runner: logits of a step, their query tokens, and the end of requests.

vLLM passes only its configuration to a custom proposer. The model runner that constructs the proposer is found on the
call stack, and three of its methods are wrapped on that instance; vLLM's classes remain unchanged.
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

CONTEXT = 16  # number of tokens before the first verified one that a drafter receives


@dataclass
class Verified:
    """Result of one step for one request.

    Attributes:
        request: Id of the request.
        tokens: [a] accepted and sampled tokens; empty while the prompt is processed.
        candidates: Top-k candidates of the model at each verified token.
        text: [t] token ids of the whole text so far.
    """

    request: str
    tokens: Int32
    candidates: Candidates
    text: Int32


def find_runner() -> Any:
    """Return the model runner whose code constructs the proposer, or None if it was constructed elsewhere."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and hasattr(owner, "propose_draft_token_ids") and hasattr(owner, "vllm_config"):
            return owner
        frame = frame.f_back
    return None


class RunnerBinding:
    """Access to one model runner.

    Args:
        runner: vLLM's model runner.
        k: Number of candidates per query token.

    Attributes:
        seconds: Time spent on top-k of logits.
    """

    def __init__(self, runner: Any, k: int) -> None:
        self._runner, self._k = runner, k
        self._top: tuple[torch.Tensor, torch.Tensor] | None = None
        self._metadata: Any = None
        self.seconds = 0.0

    def attach(self, finished: Callable[[str], None], closing: Callable[[], None]) -> None:
        """Wrap the runner's methods to receive logits, the end of requests and the shutdown of the worker.

        Args:
            finished: Callback that receives the id of a request that ends.
            closing: Callback at shutdown.
        """
        runner = self._runner
        sample, removed, shutdown = runner._sample, runner._on_request_state_removed, runner.shutdown

        def _sample(logits: Any, spec_decode_metadata: Any) -> Any:
            # Before sampling, which may change logits in place, and after the grammar bitmask is applied.
            started = time.perf_counter()
            # If a text is within num_speculative_tokens of max_model_len, vLLM drops the drafts of the whole batch and
            # verifies zeros instead. We clip drafts per request (`free_slots`), so the limit can exceed max_model_len.
            # It is set at each step, since fitting the context length to memory resets it.
            # A draft model that vLLM runs has to keep its limit.
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
        """Return the token ids of the prompt at a batch index, [t]."""
        batch = self._runner.input_batch
        return batch.token_ids_cpu[index, : int(batch.num_prompt_tokens[index])]

    def sampling_params(self, request: str) -> Any:
        """Return the sampling parameters of a request."""
        return self._runner.requests[request].sampling_params

    def free_slots(self, request: str, index: int, length: int) -> int:
        """Return how many draft tokens a request can take within ``max_tokens`` and the model's context length.

        Args:
            request: Id of the request.
            index: Index of the request in the batch.
            length: Number of tokens of its text so far.
        """
        batch, params = self._runner.input_batch, self.sampling_params(request)
        left = self._runner.max_model_len - length
        if params is not None and params.max_tokens is not None:
            left = min(left, params.max_tokens - (length - int(batch.num_prompt_tokens[index])))
        return left - 1  # a step yields one token more than it accepts

    def step(
        self,
        sampled: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        tree_of: Callable[[int], DraftTree | None] | None = None,
    ) -> list[Verified]:
        """Return the results of the step that was just sampled, one per request, in batch order.

        Args:
            sampled: Accepted and sampled tokens of each request.
            num_tokens: [b] length of each text, including those tokens.
            token_ids: [b, max_model_len] token ids of the texts.
            tree_of: Function from a batch index to the tree that was verified for the request, or None for a chain.
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
        results, row, draft = [], 0, 0
        for i, tokens in enumerate(sampled):
            d = drafted[i]
            at = int(batch.num_computed_tokens_cpu[i]) + int(scheduled[i]) - 1 - d  # position of the first query token
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
            results.append(Verified(batch.req_ids[i], np.array(tokens, np.int32), candidates, text))
            row, draft = row + d + 1, draft + d
        self._top = None
        return results

    def is_decode_only(self, rows: int) -> bool:
        """Return whether the step processed only the query tokens that it verified, ``rows`` in number."""
        requests = self._runner.input_batch.num_reqs
        return int(self._runner.query_start_loc.np[requests]) == rows
