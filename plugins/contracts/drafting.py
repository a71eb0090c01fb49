"""Drafters: what they are told, and the trees that they propose."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Engine, Plugin

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

ROOT = -1  # the parent of a node that follows the last accepted token directly


@dataclass(frozen=True)
class DraftTree:
    """Tokens that may follow the last accepted one; a chain is a tree with one leaf.

    Attributes:
        tokens: [n] token ids, parents before their children.
        parents: [n] index of the parent in ``tokens``, `ROOT` for children of the last accepted token.
        scores: [n] estimated probability that the node is accepted, never above its parent's.
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
        """Nodes of the root-to-leaf path with the most expected accepted tokens (the sum of its scores), [depth]."""
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
    """What the target model thought at every position that one step verified for a request.

    Row 0 is the last token accepted before the step; the others are drafted tokens, in the order of their tree.

    Attributes:
        context: [m] tokens before row 0, the latest last; may be a short tail of the text.
        inputs: [n] the token at each row.
        parents: [n] the row that each row follows; `ROOT` for row 0.
        ids: [n, k] the model's most probable next tokens at each row, best first; -1 where there is none.
        probs: [n, k] their probabilities among the k.
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
        id: Its name.
        tokens: [t] token ids of its text so far, the root last.
        limit: How many tokens it can take.
        drafted: [d] what a draft model that the engine runs proposed; empty where there is none.
    """

    id: str
    tokens: Int32
    limit: int
    drafted: Int32 = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True)
class DraftBudget:
    """The largest tree worth proposing for one request."""

    nodes: int
    depth: int


class Drafter(Plugin, ABC):
    """Guesses the next tokens of requests. It never changes the output distribution: the engine verifies each guess."""

    default_depth: ClassVar[int] = 8  # longest path that is drafted when the user names no number
    default_nodes: ClassVar[int] = 64  # and, where trees are verified, most nodes
    candidates: int = 8  # how many of the model's next tokens `observe` is shown
    state_path: str | None = None  # where `save` and `load` keep the state between runs, if anywhere
    fixed_size: bool = False  # its trees have a size of their own: the engine verifies all of what it proposes

    @classmethod
    def needs_draft_model(cls, options: Any) -> bool:
        """Whether requests have to bring what a draft model proposed, which the engine then runs."""
        del options
        return False

    @classmethod
    def tokenizer(cls, options: Any) -> tuple[str, str] | None:
        """Fingerprint of the tokenizer whose ids it was given, see `retrieval.datastore.fingerprint`, and where."""
        del options
        return None

    @abstractmethod
    def __init__(self, options: Any, engine: Engine) -> None: ...

    @abstractmethod
    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Begin a request; ``prompt`` is [t] token ids."""

    @abstractmethod
    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Learn from a step: ``tokens`` [a] were accepted or sampled (none while a prompt is still processed)."""

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """A tree for each request, at most ``budget`` and the request's limit large; an empty one for no draft."""

    @abstractmethod
    def finish(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""

    def save(self, path: Path) -> None:
        """Write the learned state atomically."""

    def load(self, path: Path) -> None:
        """Read the state that `save` wrote; raises `ValueError` when it belongs to another model or version."""

    def stats(self) -> dict[str, float]:
        """Figures for reports: sizes, counts."""
        return {}
