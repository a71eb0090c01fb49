"""What a draft model that the engine runs proposed, as a drafter that others can build on.

Such a chain comes without probabilities, so how far it holds is counted: the rate at which its i-th token was right
where all before it were.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..contracts import ROOT, Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Engine, Int32

PRIOR_RIGHT, PRIOR_SEEN = 1.2, 2.0  # before anything was counted
FADE = 0.995  # of older counts, each time one is added: texts change


class DraftModelDrafter(Drafter):
    """The engine's own drafts, scored."""

    name: ClassVar[str] = "engine"
    candidates = 1

    def __init__(self, options: Any, engine: Engine) -> None:
        del options
        depth = max(engine.num_speculative_tokens, 1)
        self._right, self._seen = np.full(depth, PRIOR_RIGHT), np.full(depth, PRIOR_SEEN)
        self._last: dict[str, Int32] = {}  # request -> the chain that was proposed last

    def start(self, request: str, prompt: Int32, tenant: str | None = None) -> None:
        """Nothing is kept of a prompt: the engine's model reads it."""

    def observe(self, request: str, tokens: Int32, candidates: Candidates) -> None:
        """Count how far the last chain was right."""
        del candidates
        drafted = self._last.pop(request, None)
        if drafted is None:
            return
        for i, (token, came) in enumerate(zip(drafted[: len(self._seen)], tokens, strict=False)):
            self._seen[i] = self._seen[i] * FADE + 1
            self._right[i] = self._right[i] * FADE + (token == came)
            if token != came:
                return

    def propose(self, requests: Sequence[DraftRequest], budget: DraftBudget) -> list[DraftTree]:
        """The chains that the requests bring, with the probability that all of each path is right."""
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
        """The rate at which the first token was right."""
        return {"engine_draft_first": float(self._right[0] / self._seen[0])}
