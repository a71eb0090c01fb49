"""The far end of the KV benchmarks: one engine whose policy is changed between runs, and what only it can see.

Stock attention is a plan whose budget covers every context, so that all arms share one engine, one cache and one clock.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from ....kvcache.kernels import paged_decode
from ....kvcache.selection import ReadPlan, Role, Rule
from ....plugins.config import build_options
from .. import attach, correction
from .engine import Worker, main

STOCK = ReadPlan((), Rule(1 << 30, 0, 0, "sum", "page"))


class KVWorker(Worker):
    """An engine with a KV policy."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._kind = attach.admit(self.runner.vllm_config)["kv"]
        self._builders = [g.get_metadata_builder() for groups in self.runner.attn_groups for g in groups]
        self._reference: list[torch.Tensor] = []
        self._force: dict[str, list[int]] = {}
        self._logprobs: dict[str, list[torch.Tensor]] = {}
        self._count = 0
        self._update = self.core.scheduler.update_from_output  # without a policy's correction
        self._wrap_sampling()

    def policy(self, options: dict[str, Any] | None) -> dict[str, Any]:
        """Set the policy's options; None is stock attention."""
        plan = STOCK
        if options is not None:
            cls: Any = self._kind.cls
            plan = cls(build_options(cls.Options, options, "pilotfish.kv"), self._kind.engine).read_plan()
        for builder in self._builders:
            builder.plan = plan
        self.core.scheduler.update_from_output = self._update
        correction.correct(self.core.scheduler, plan)
        return {}

    def facts(self) -> dict[str, Any]:
        """What the engine's plugins are told about it."""
        return vars(self._kind.engine)

    def steps(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Seconds of ``count`` decode steps of all prompts together, and the text."""
        outputs, seconds = self._run(prompts, [count + 1] * len(prompts))
        return {"tokens": outputs, "seconds": seconds}

    def forced(self, prompts: list[list[int]], texts: list[list[int]], keep: bool | None) -> dict[str, Any]:
        """Decode given texts token by token after their prompts.

        Args:
            prompts: Token ids.
            texts: What follows each.
            keep: Keep the distributions as the reference for later calls; if False, compare with them; None: neither.

        Returns:
            For each text and token ``nll`` in nats, and ``right``: whether it was the most probable one. When compared,
            also ``kl`` from the reference, and ``same``: whether the most probable token is the reference's.
        """
        self._force = {self._next(i): list(text) for i, text in enumerate(texts)}
        self._logprobs = {request: [] for request in self._force}
        self._run(prompts, [len(text) for text in texts])
        answer: dict[str, list[Any]] = {"nll": [], "right": [], "kl": [], "same": []}
        found = [torch.stack(rows) for rows in self._logprobs.values()]
        for i, (rows, text) in enumerate(zip(found, texts, strict=True)):
            wanted = torch.tensor(text)
            answer["nll"].append((-rows.gather(1, wanted[:, None])[:, 0]).tolist())
            answer["right"].append((rows.argmax(1) == wanted).tolist())
            if keep is False:
                reference = self._reference[i]
                answer["kl"].append((reference.exp() * (reference - rows)).sum(1).tolist())
                answer["same"].append((reference.argmax(1) == rows.argmax(1)).tolist())
        if keep:
            self._reference = found
        self._force, self._logprobs = {}, {}
        return answer

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
        place_of = dict(zip(self._force, places or [None] * len(texts), strict=True))
        observer = Missed(self._kind.engine.layers, Rule(**rule), lambda row: place_of[self._name(row)])
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

    def _name(self, row: int) -> str:
        """The forced request in a row of the batch."""
        request = self.runner.input_batch.req_ids[row]
        return next(n for n in self._force if request == n or request.startswith(f"{n}-"))

    def _next(self, i: int) -> str:
        return f"kv-{self._count + i}"

    def _run(self, prompts: list[list[int]], tokens: list[int]) -> tuple[list[list[int]], list[float]]:
        """Greedy completions of given lengths, and the seconds of the steps in which all prompts decode."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        names = [self._next(i) for i in range(len(prompts))]
        self._count += len(prompts)
        for name, prompt, length in zip(names, prompts, tokens, strict=True):
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        done: dict[str, list[int]] = {}
        started: set[str] = set()
        seconds = []
        while engine.has_unfinished_requests():
            decoding = len(started) == len(names)
            began = time.perf_counter()
            outputs = engine.step()
            if decoding:
                seconds.append(time.perf_counter() - began)
            for output in outputs:
                started.add(output.request_id)
                done[output.request_id] = list(output.outputs[0].token_ids)
        return [done[n] for n in names], seconds

    def _wrap_sampling(self) -> None:
        """Let forced requests emit their text, and keep the distributions that they had."""
        original = self.runner._sample

        def sample(logits: Any, metadata: Any) -> Any:
            output = original(logits, metadata)
            if not self._force:
                return output
            batch = self.runner.input_batch
            for row, request in enumerate(batch.req_ids):
                name = next((n for n in self._force if request == n or request.startswith(f"{n}-")), None)
                at = batch.num_computed_tokens_cpu[row] + self.runner.query_start_loc.np[row + 1]
                at -= self.runner.query_start_loc.np[row] + batch.num_prompt_tokens[row]
                if name is None or at < 0:  # a chunk of a prompt
                    continue
                if name in self._logprobs:
                    self._logprobs[name].append(logits[row].float().log_softmax(-1))
                output.sampled_token_ids[row, 0] = self._force[name][at]
            return output

        self.runner._sample = sample


class Missed:
    """Observes every layer of every step, and sums what layers miss by reading each other's choice."""

    def __init__(self, layers: int, rule: Rule, place_of: Callable[[int], tuple[int, int] | None]) -> None:
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

    def __call__(self, rows: paged_decode.Rows, logits: torch.Tensor) -> None:
        """One layer's scores, [rows, query_heads, padded]; the last layer's end a step."""
        scores = logits.clone()
        choice = paged_decode.choose(rows, self.rule, paged_decode.importance(rows, self.rule, 1, scores))
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
