"""Worker of the KV benchmarks: an engine whose policy is changed between runs, and measurements inside its attention.

Stock attention is a read plan whose budget covers every context, so that all configurations share one engine, one KV
cache and one clock.
"""

from collections.abc import Callable
from typing import Any

import torch

from ....kvcache.kernels import paged_decode
from ....kvcache.selection import PAGE_SIZE, ReadPlan, Role, SelectionRule
from ....plugins.config import build_options
from ....plugins.manager import plugins
from ..attention.sparse import kv_correction
from ..engine.selection import attach
from .engine import main
from .teacher_forcing import TeacherForcingWorker

STOCK = ReadPlan((), SelectionRule(1 << 30, 0, 0, "sum", "page"))

LEAST = SelectionRule(2 * PAGE_SIZE, 0, 0, "max", "page")


class KVWorker(TeacherForcingWorker):
    """Engine with a KV policy that can be changed between runs."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        attachment = attach("kv", self.runner.vllm_config)
        assert attachment is not None
        self._attachment = attachment
        self._builders = [g.get_metadata_builder() for groups in self.runner.attn_groups for g in groups]
        self._update = self.core.scheduler.update_from_output  # the method without a policy's KV correction

    def policy(self, options: dict[str, Any] | None, name: str = "") -> dict[str, Any]:
        """Switch to a policy by its name and options, or to stock attention if the options are None."""
        plan = STOCK
        if options is not None:
            cls: Any = plugins().get("kv", name) if name else self._attachment.cls
            plan = cls(build_options(cls.Options, options, "pilotfish.kv"), self._attachment.engine).read_plan()
        return self._switch(plan)

    def least_attention(self) -> dict[str, Any]:
        """Switch to a plan by which every layer reads so few tokens that attention takes next to no time."""
        return self._switch(ReadPlan((Role.WINDOW,) * self._attachment.engine.layers, LEAST))

    def _switch(self, plan: ReadPlan) -> dict[str, Any]:
        for builder in self._builders:
            builder.plan = plan
        self.core.scheduler.update_from_output = self._update
        kv_correction.reset_computed_tokens(self.core.scheduler, plan)
        return {}

    def facts(self) -> dict[str, Any]:
        """Return the facts about the engine that its plugins receive."""
        return vars(self._attachment.engine)

    def missed(
        self,
        prompts: list[list[int]],
        texts: list[list[int]],
        rule: dict[str, Any],
        places: list[tuple[int, int]] | None = None,
    ) -> dict[str, Any]:
        """Measure the attention that a layer misses when it reads the tokens that another layer selected.

        The missed share is squared for each head before the mean over heads and tokens is taken: a head that attends to
        one token and misses it does more harm than many heads that miss a little of a broad average.

        Args:
            prompts: Token ids of the prompts.
            texts: Token ids that are decoded after each prompt.
            rule: Fields of the `SelectionRule` by which tokens are selected.
            places: For each prompt the positions (begin, end) whose attention alone counts; all if not given.

        Returns:
            ``missed``, [layers, layers], 0 to 1: the row selects, the column reads; and the number of ``steps``.
        """
        self._force = {self._next(i): list(text) for i, text in enumerate(texts)}
        place_of: dict[str | None, Any] = dict(zip(self._force, places or [None] * len(texts), strict=True))
        observer = MissedAttention(
            self._attachment.engine.layers, SelectionRule(**rule), lambda row: place_of.get(self._name(row))
        )
        for builder in self._builders:
            builder.plan = ReadPlan((Role.SELECT,) * observer.layers, observer.rule)
            builder.observe = observer
        try:
            self._run(prompts, [len(text) for text in texts])
        finally:
            for builder in self._builders:
                builder.observe = None
            self._force = {}
        return {"missed": observer.mean.tolist(), "steps": observer.steps}


class MissedAttention:
    """Observer of all layers that sums the attention missed by each layer that reads another layer's selection."""

    def __init__(self, layers: int, rule: SelectionRule, place_of: Callable[[int], tuple[int, int] | None]) -> None:
        """Observe ``layers`` layers; ``place_of`` returns the positions that count in a row of the batch, or None."""
        self.layers, self.rule, self.steps = layers, rule, 0
        self._place_of = place_of
        self._total = torch.zeros(layers, layers)
        self._weights: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the observed steps, [layers, layers]."""
        return self._total / max(self.steps, 1)

    def __call__(self, rows: paged_decode.DecodeBatch, logits: torch.Tensor) -> None:
        """Add the scores of one layer, [rows, query_heads, padded]; those of the last layer complete a step."""
        scores = logits.clone()
        selected = paged_decode.select_tokens(rows, self.rule, paged_decode.token_scores(rows, self.rule, 1, scores))
        weights, mask = torch.zeros_like(logits), torch.zeros(rows.count, rows.padded)
        for r, n in enumerate(rows.context):
            weights[r, :, :n] = logits[r, :, :n].softmax(-1)
            mask[r, selected.positions(r)] = 1
            if place := self._place_of(rows.request[r]):
                weights[r, :, : place[0]] = 0
                weights[r, :, place[1] :] = 0
        self._weights.append(weights)
        self._masks.append(mask)
        if len(self._masks) == self.layers:
            w, m = torch.stack(self._weights), torch.stack(self._masks)
            covered = torch.einsum("crn,lrhn->clrh", m, w)
            self._total += (w.sum(-1) - covered).clamp_min(0).square().mean((2, 3))
            self.steps += 1
            self._weights.clear()
            self._masks.clear()


if __name__ == "__main__":
    main(KVWorker)
