"""A drafter: it proposes the tokens that followed the last two tokens earlier in the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pilotfish import Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine, hookimpl


@dataclass(frozen=True)
class RepeatLastOptions:
    """Options of the example.

    Attributes:
        confidence: Estimated probability that a draft token is accepted.
    """

    confidence: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected between 0 and 1, got {self.confidence}")


class RepeatLast(Drafter):
    """Drafter that copies from the text of the request itself and keeps no state."""

    name: ClassVar[str] = "repeat_last"
    Options: ClassVar[type] = RepeatLastOptions

    def __init__(self, options: RepeatLastOptions, engine: Engine) -> None:
        self.options = options

    def start(self, request: str, prompt: np.ndarray, tenant: str | None = None) -> None: ...
    def observe(self, request: str, tokens: np.ndarray, candidates: Candidates) -> None: ...
    def finish(self, request: str) -> None: ...

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Propose a chain for each request."""
        return [self._chain(r.tokens, max(0, min(budget.nodes, budget.depth, r.limit))) for r in requests]

    def _chain(self, text: np.ndarray, depth: int) -> DraftTree:
        earlier = np.flatnonzero((text[:-2] == text[-2]) & (text[1:-1] == text[-1])) if len(text) > 2 else []
        copied = text[earlier[-1] + 2 :][:depth] if len(earlier) else text[:0]
        n = len(copied)
        scores = self.options.confidence ** np.arange(1, n + 1, dtype=np.float32)
        return DraftTree(copied.astype(np.int32), np.arange(-1, n - 1, dtype=np.int32), scores.astype(np.float32))


@hookimpl
def register_drafters(register) -> None:
    """Register the drafter."""
    register(RepeatLast)
