"""The drafts of the engine's draft model, as a drafter on which other drafters can build.

The engine passes the draft model's tokens without probabilities. So the drafter counts how often the i-th token was
accepted, given that all tokens before it were.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..contracts import ROOT, Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine, Int32

PRIOR_RIGHT, PRIOR_SEEN = 1.2, 2.0  # initial counts of accepted and verified tokens
FADE = 0.995  # decay of the counts at each update, since texts change


class DraftModelDrafter(Drafter):
    """Drafter that proposes the chains of the engine's draft model, with estimated acceptance probabilities."""

    name: ClassVar[str] = "engine"
    candidates = 1

    def __init__(self, options: Any, engine: Engine) -> None:
        del options
        depth = max(engine.num_speculative_tokens, 1)
        self._right, self._seen = np.full(depth, PRIOR_RIGHT), np.full(depth, PRIOR_SEEN)
        self._last: dict[str, Int32] = {}  # request -> its last proposed chain

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Do nothing: the engine's draft model reads the prompt."""

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Count the accepted tokens of the last chain."""
        del candidates
        drafted = self._last.pop(request, None)
        if drafted is None:
            return
        for i, (token, accepted) in enumerate(zip(drafted[: len(self._seen)], tokens, strict=False)):
            self._seen[i] = self._seen[i] * FADE + 1
            self._right[i] = self._right[i] * FADE + (token == accepted)
            if token != accepted:
                return

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """Return the draft model's chains; a token's score is the probability that the path up to it is accepted."""
        return [self._chain(request, budget) for request in requests]

    def _chain(self, request: DraftRequest, budget: DraftBudget) -> DraftTree:
        tokens = request.drafted[: max(min(budget.depth, budget.nodes, request.limit, len(self._seen)), 0)]
        self._last[request.id] = tokens
        scores = np.cumprod(self._right / self._seen)[: len(tokens)].astype(np.float32)
        return DraftTree(tokens, np.arange(ROOT, len(tokens) - 1, dtype=np.int32), scores)

    def finish(self, request: str) -> None:
        """Forget the request."""
        self._last.pop(request, None)

    def stats(self) -> dict[str, float]:
        """Return the acceptance rate of the first draft token."""
        return {"engine_draft_first": float(self._right[0] / self._seen[0])}
