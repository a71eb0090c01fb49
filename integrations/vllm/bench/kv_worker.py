"""The far end of the KV benchmarks: one engine whose policy is changed between runs, and what only it can see.

Stock attention is a plan whose budget covers every context, so that all arms share one engine, one cache and one clock.
"""

from collections.abc import Callable
from typing import Any

import torch

from ....kvcache.kernels import paged_decode
from ....kvcache.selection import ReadPlan, Role, SelectionRule
from ....plugins.config import build_options
from ..attention.sparse import kv_correction
from ..engine.selection import attach
from .engine import main
from .teacher_forcing import TeacherForcingWorker

STOCK = ReadPlan((), SelectionRule(1 << 30, 0, 0, "sum", "page"))


class KVWorker(TeacherForcingWorker):
    """An engine with a KV policy."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        attachment = attach("kv", self.runner.vllm_config)
        assert attachment is not None
        self._attachment = attachment
        self._builders = [g.get_metadata_builder() for groups in self.runner.attn_groups for g in groups]
        self._update = self.core.scheduler.update_from_output  # without a policy's correction

    def policy(self, options: dict[str, Any] | None) -> dict[str, Any]:
        """Set the policy's options; None is stock attention."""
        plan = STOCK
        if options is not None:
            cls: Any = self._attachment.cls
            plan = cls(build_options(cls.Options, options, "pilotfish.kv"), self._attachment.engine).read_plan()
        for builder in self._builders:
            builder.plan = plan
        self.core.scheduler.update_from_output = self._update
        kv_correction.reset_computed_tokens(self.core.scheduler, plan)
        return {}

    def facts(self) -> dict[str, Any]:
        """What the engine's plugins are told about it."""
        return vars(self._attachment.engine)

    def missed(
        self,
        prompts: list[list[int]],
        texts: list[list[int]],
        rule: dict[str, Any],
        places: list[tuple[int, int]] | None = None,
    ) -> dict[str, Any]:
        """What a layer misses of its attention when it reads another layer's choice.

        Squared for each head before the mean over heads and tokens is taken: a head that looks at one place and misses
        it does more harm than many that miss a little of what they average over.

        Args:
            prompts: Token ids.
            texts: What is decoded after each.
            rule: How positions are chosen, as a `Rule`'s fields.
            places: For each prompt the positions, from and to, whose attention alone counts; all if not given.

        Returns:
            ``missed`` [layers, layers], 0 to 1: row chooses, column reads.
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
    """Observes every layer of every step, and sums what layers miss by reading each other's choice."""

    def __init__(self, layers: int, rule: SelectionRule, place_of: Callable[[int], tuple[int, int] | None]) -> None:
        """Observe ``layers`` layers; ``place_of`` tells the positions that count in a row of the batch."""
        self.layers, self.rule, self.steps = layers, rule, 0
        self._place_of = place_of
        self._total = torch.zeros(layers, layers)
        self._weights: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []

    @property
    def mean(self) -> torch.Tensor:
        """[layers, layers], over the steps seen."""
        return self._total / max(self.steps, 1)

    def __call__(self, rows: paged_decode.DecodeBatch, logits: torch.Tensor) -> None:
        """One layer's scores, [rows, query_heads, padded]; the last layer's end a step."""
        scores = logits.clone()
        choice = paged_decode.select_tokens(rows, self.rule, paged_decode.token_scores(rows, self.rule, 1, scores))
        weights, mask = torch.zeros_like(logits), torch.zeros(rows.count, rows.padded)
        for r, n in enumerate(rows.context):
            weights[r, :, :n] = logits[r, :, :n].softmax(-1)
            mask[r, choice.positions(r)] = 1
            if place := self._place_of(rows.request[r]):
                weights[r, :, : place[0]] = 0
                weights[r, :, place[1] :] = 0
        self._weights.append(weights)
        self._masks.append(mask)
        if len(self._masks) == self.layers:
            w, m = torch.stack(self._weights), torch.stack(self._masks)
            seen = torch.einsum("crn,lrhn->clrh", m, w)
            self._total += (w.sum(-1) - seen).clamp_min(0).square().mean((2, 3))
            self.steps += 1
            self._weights.clear()
            self._masks.clear()


if __name__ == "__main__":
    main(KVWorker)
