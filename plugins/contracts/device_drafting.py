"""The contract of drafters whose state and drafts stay on the device, for vLLM's V2 model runner.

With asynchronous scheduling the host prepares the next step before the device has finished the last one. So a device
drafter never waits for the device: no ``.item()``, ``.tolist()``, ``.cpu()``, ``.numpy()``, and no boolean of a tensor
in `DeviceDrafter.start`, `DeviceDrafter.observe` and `DeviceDrafter.propose`.

In each step the engine calls, in this order, `DeviceDrafter.start` for requests whose first step it is,
`DeviceDrafter.observe`, and `DeviceDrafter.propose`, unless the next step verifies no draft tokens. It calls
`DeviceDrafter.finish` when a request has ended.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class DeviceBatch:
    """One step of the engine. All tensors are on the device; they are valid until the end of the step.

    The names are those of vLLM's V2 model runner. A step has logits at n positions: for each request, at its last token
    before the step and at each of its draft tokens, in their order.

    Attributes:
        num_requests: Number b of requests in the batch.
        max_num_logits: Upper bound of the number of these positions of a request.
        idx_mapping: [b] int64 index ``req_idx`` of each request in the next two tensors.
        all_token_ids: [max_num_reqs, max_model_len] int32 token ids of the texts.
        total_len: [max_num_reqs] int32 number of tokens of each text, with those that the step sampled or accepted.
        num_sampled: [b] int32 number of tokens that the step sampled or accepted; 0 while the prompt is processed in
            chunks.
        cu_num_logits: [b + 1] int32 first of each request's positions among all of the step.
        input_ids: [n] int32 token at each position.
        positions: [n] int64 position in its text.
        candidate_ids: [n, k] int64 most probable next tokens, best first.
        candidate_probs: [n, k] float32 probabilities of these tokens, normalised over the k candidates.
        parents: [n] int32 where draft tokens form trees: index, among the request's positions, of the one before each
            in the tree; -1 for the first. Position i + 1 is draft token i. None where they form chains.
        accepted: [n] bool whether each position was accepted, where draft tokens form trees; else None.
        chain_only: [max_num_reqs] bool, where draft tokens form trees: whether those of a request must form a chain,
            because its sampling parameters depend on the tokens before. Else None.
    """

    num_requests: int
    max_num_logits: int
    idx_mapping: "Tensor"
    all_token_ids: "Tensor"
    total_len: "Tensor"
    num_sampled: "Tensor"
    cu_num_logits: "Tensor"
    input_ids: "Tensor"
    positions: "Tensor"
    candidate_ids: "Tensor"
    candidate_probs: "Tensor"
    parents: "Tensor | None" = None
    accepted: "Tensor | None" = None
    chain_only: "Tensor | None" = None

    @property
    def texts(self) -> tuple["Tensor", int, "Tensor", "Tensor"]:
        """``all_token_ids`` and its stride, ``idx_mapping``, and ``total_len``: what kernels need to read the texts."""
        return self.all_token_ids, self.all_token_ids.stride(0), self.idx_mapping, self.total_len


@dataclass(frozen=True)
class DeviceLimits:
    """Sizes for which a device drafter allocates its memory.

    Attributes:
        device: The device.
        max_num_reqs: Number of requests that the engine runs at once; each ``req_idx`` is below it.
        num_speculative_tokens: Number of draft tokens of a request and step.
        max_model_len: Largest number of tokens of a text.
        trees: Whether draft tokens form trees.
    """

    device: "torch.device"
    max_num_reqs: int
    num_speculative_tokens: int
    max_model_len: int
    trees: bool = False


class DeviceDrafter(ABC):
    """Base class of drafters that keep their state on the device.

    It is constructed before vLLM profiles the memory, and allocates all of its memory then. With tensor parallelism
    each rank runs its own drafter, on the same inputs, so all operations must be deterministic.

    Attributes:
        candidates: Number k of the target model's top next tokens in each `DeviceBatch`.
        state_path: File in which `save` keeps the learned state between runs; None for no such file.
        scores: [requests, K] float32 estimated probability that a draft token of the last `propose` is accepted, with
            all before it, on the device. vLLM's adaptive verification allocates draft tokens by them. None if the
            drafter does not estimate them.
        parents: [requests, K] int32 parent of each draft token of the last `propose`, on the device: an index of an
            earlier draft token, or -1 for the last token of the text. None if the drafter proposes chains. The engine
            may verify fewer than K tokens, the first ones.
    """

    candidates: int = 8
    state_path: str | None = None
    scores: "Tensor | None" = None
    parents: "Tensor | None" = None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory that the drafter holds."""

    @abstractmethod
    def start(self, req_idx: int, prompt: "Tensor", tenant: str | None = None) -> None:
        """Begin a request.

        Args:
            req_idx: Index of the request; another request may have it after `finish`.
            prompt: [t] int32 token ids of the prompt, on the device.
            tenant: Tenant that the request names, for drafters that do not share state between tenants.
        """

    @abstractmethod
    def observe(self, batch: DeviceBatch) -> None:
        """Learn from a step; it must not wait for the device."""

    @abstractmethod
    def propose(self, batch: DeviceBatch) -> "Tensor":
        """Propose chains or trees of draft tokens; it must not wait for the device.

        Returns:
            [requests, K] int64 token ids. Where a draft ends early, any valid token ids follow.
        """

    @abstractmethod
    def finish(self, req_idx: int, text: "Tensor", total_len: "Tensor") -> None:
        """Forget the request of an index; it must not wait for the device.

        With asynchronous scheduling the text may go on after the token at which the request ended, by what the step
        after it sampled.

        Args:
            req_idx: Index of the request.
            text: [max_model_len] int32 token ids of the text, on the device, and anything after them.
            total_len: [1] int32 number of tokens of the text, on the device.
        """

    def save(self, path: Path) -> None:  # noqa: B027 -- most drafters have no state to save
        """Write the learned state to a file atomically.

        Called from a background thread, if `state_path` is set; it may wait for the device.
        """
