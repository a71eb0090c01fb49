"""The contract of drafters: what they observe of every decode step, and the draft trees that they propose.

In each step the engine calls, in this order, `Drafter.start` for new requests, `Drafter.observe` for each request of
the step, and `Drafter.propose` once for all requests that want a draft. It calls `Drafter.finish` when a request ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Engine, Plugin
from .device_drafting import DeviceDrafter, DeviceLimits

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

ROOT = -1  # parent of a node that follows the last accepted token directly


@dataclass(frozen=True)
class DraftTree:
    """A tree of draft tokens, which may follow the last accepted token; a chain is a tree with one leaf.

    Attributes:
        tokens: [n] token ids, parents before their children.
        parents: [n] index of the parent in ``tokens``; `ROOT` for children of the last accepted token.
        scores: [n] estimated probability that the node is accepted, at most that of its parent.
    """

    tokens: Int32
    parents: Int32
    scores: Float32

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if len(self.parents) != n or len(self.scores) != n:
            raise ValueError(f"{n} tokens, {len(self.parents)} parents and {len(self.scores)} scores")
        if n and not (self.parents < np.arange(n)).all():
            raise ValueError("a parent stands after its child")
        if n and self.parents.min() < ROOT:
            raise ValueError(f"parent {self.parents.min()} is below {ROOT}")

    def __len__(self) -> int:
        return len(self.tokens)

    def best_path(self) -> Int32:
        """Return the nodes of the root-to-leaf path with the largest expected number of accepted tokens, [depth].

        The expected number is the sum of the path's scores.
        """
        if not len(self):
            return np.empty(0, np.int32)
        value = self.scores.astype(np.float64)
        for node, parent in enumerate(self.parents.tolist()):
            if parent != ROOT:
                value[node] += value[parent]
        path = [int(value.argmax())]
        while self.parents[path[-1]] != ROOT:
            path.append(int(self.parents[path[-1]]))
        return np.array(path[::-1], np.int32)


@dataclass(frozen=True)
class Candidates:
    """The target model's top-k next tokens at each position that one step verified for a request.

    Row 0 is the last token accepted before the step. The other rows are the draft tokens, in the order of their tree.

    Attributes:
        context: [m] tokens before row 0, the latest last; may be only the end of the text.
        inputs: [n] token of each row.
        parents: [n] row of the preceding token; `ROOT` for row 0.
        ids: [n, k] most probable next tokens of each row, best first; -1 for a missing candidate.
        probs: [n, k] probabilities of these tokens, normalised over the k candidates.
    """

    context: Int32
    inputs: Int32
    parents: Int32
    ids: Int32
    probs: Float32


@dataclass(frozen=True)
class DraftRequest:
    """A request that wants a draft.

    Attributes:
        id: Id of the request.
        tokens: [t] token ids of the request's text so far; the last one is the root of the tree.
        limit: Largest number of draft tokens that the request can take.
        drafted: [d] tokens proposed by the engine's draft model; empty without a draft model.
    """

    id: str
    tokens: Int32
    limit: int
    drafted: Int32 = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True)
class DraftBudget:
    """The size of the largest tree that is useful for one request.

    Attributes:
        nodes: Largest number of nodes.
        depth: Largest length of a path.
    """

    nodes: int
    depth: int


class Drafter(Plugin, ABC):
    """Base class of drafters, which propose the next tokens of requests for speculative decoding.

    The target model verifies all draft tokens, so a drafter never changes the distribution of outputs. Drafters run in
    the engine's worker process, on the first tensor-parallel rank. At start, a few steps are run on a second instance,
    so that compiled code is ready for the first request.

    Attributes:
        default_depth: Longest path that is drafted if the user does not set ``num_speculative_tokens``.
        default_nodes: Largest number of nodes, with tree verification, if the user does not set one.
        candidates: Number k of the target model's top next tokens that `observe` gets.
        state_path: File in which `save` and `load` keep the learned state between runs; None for no such file.
        fixed_size: Whether the engine verifies each proposed tree as a whole. Else it truncates trees to the size that
            pays, by their scores and the measured cost of a step.
    """

    default_depth: ClassVar[int] = 8
    default_nodes: ClassVar[int] = 64
    candidates: int = 8
    state_path: str | None = None
    fixed_size: bool = False

    @classmethod
    def needs_draft_model(cls, options: Any) -> bool:
        """Return whether the drafter uses `DraftRequest.drafted`, so that the engine must run a draft model."""
        del options
        return False

    @classmethod
    def tokenizer(cls, options: Any) -> tuple[str, str] | None:
        """Return the tokenizer that the model must have, for a drafter with a datastore of token ids.

        Returns:
            The tokenizer's fingerprint, see `drafting.datastore.vocabulary_fingerprint`, and its origin, for error
            messages; None if any tokenizer fits.
        """
        del options
        return None

    @classmethod
    def device_drafter(cls, options: Any, engine: Engine, limits: DeviceLimits) -> DeviceDrafter | None:
        """Return the drafter's counterpart on the device, for vLLM's V2 model runner; None if there is none."""
        del options, engine, limits
        return None

    @classmethod
    def check_device(cls, options: Any, engine: Engine, trees: bool = False) -> None:
        """Check that the counterpart on the device supports the options.

        Args:
            options: Instance of ``Options``.
            engine: Properties of the engine.
            trees: Whether the drafts form trees.

        Raises:
            Unsupported: It does not support one.
        """
        del options, engine, trees

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    @abstractmethod
    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Begin a request; called before the first `observe` with its id.

        Args:
            request: Id of the request.
            prompt: [t] token ids of the request's text before the step, in general its prompt.
            tenant: Tenant that the request names, for drafters that do not share state between tenants.
        """

    @abstractmethod
    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Learn from a step; called for each request of the step.

        Args:
            request: Id of the request.
            tokens: [a] tokens that the step accepted or sampled; empty while the prompt is processed in chunks.
            candidates: The target model's top next tokens at the positions of the step.
        """

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Propose draft trees; called once per step.

        Args:
            requests: Requests that want a draft.
            budget: Size of the largest useful tree; each request's `DraftRequest.limit` applies as well.

        Returns:
            One tree for each request, in the same order; an empty tree for no draft.
        """

    @abstractmethod
    def finish(self, request: str) -> None:
        """Forget a request; called when it has ended. Unknown ids are ignored."""

    def save(self, path: Path) -> None:
        """Write the learned state to a file atomically.

        Called from a background thread, when the engine is idle and about once a minute under load, if `state_path` is
        set.
        """

    def load(self, path: Path) -> None:
        """Read the state that `save` wrote; the drafter itself calls this when it is constructed.

        Raises:
            ValueError: The state belongs to another model or version.
        """

    def stats(self) -> dict[str, float]:
        """Return numbers for logs and reports, such as sizes and counts."""
        return {}
