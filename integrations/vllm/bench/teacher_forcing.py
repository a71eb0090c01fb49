"""An engine that decodes given texts, and tells what it thought of them: the far end of quality measurements."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .engine import Worker


class TeacherForcingWorker(Worker):
    """Counts seconds of decode steps, and makes requests emit texts that are given."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._reference: list[torch.Tensor] = []
        self._force: dict[str, list[int]] = {}
        self._logprobs: dict[str, list[torch.Tensor]] = {}
        self._count = 0
        self._wrap_sampling()

    def steps(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Seconds of ``count`` decode steps of all prompts together, and the text."""
        outputs, seconds = self._run(prompts, [count + 1] * len(prompts))
        return {"tokens": outputs, "seconds": seconds}

    def forced(
        self, prompts: list[list[int]], texts: list[list[int]], keep: bool | None, reference: str | None = None
    ) -> dict[str, Any]:
        """Decode given texts token by token after their prompts.

        Args:
            prompts: Token ids.
            texts: What follows each.
            keep: Keep the distributions as the reference for later calls; if False, compare with them; None: neither.
            reference: A file for them, which another engine can read; they stay in memory if not given.

        Returns:
            For each text and token ``nll`` in nats, and ``right``: whether it was the most probable one. When compared,
            also ``kl`` from the reference, and ``same``: whether the most probable token is the reference's.
        """
        self._force = {self._next(i): list(text) for i, text in enumerate(texts)}
        self._logprobs = {request: [] for request in self._force}
        self._run(prompts, [len(text) for text in texts])
        answer: dict[str, list[Any]] = {"nll": [], "right": [], "kl": [], "same": []}
        found = [torch.stack(rows) for rows in self._logprobs.values()]
        if keep is False and reference is not None:
            self._reference = torch.load(Path(reference))
        for i, (rows, text) in enumerate(zip(found, texts, strict=True)):
            wanted = torch.tensor(text)
            answer["nll"].append((-rows.gather(1, wanted[:, None])[:, 0]).tolist())
            answer["right"].append((rows.argmax(1) == wanted).tolist())
            if keep is False:
                before = self._reference[i]
                answer["kl"].append((before.exp() * (before - rows)).sum(1).tolist())
                answer["same"].append((before.argmax(1) == rows.argmax(1)).tolist())
        if keep and reference is not None:
            torch.save(found, Path(reference))
        elif keep:
            self._reference = found
        self._force, self._logprobs = {}, {}
        return answer

    def _next(self, i: int) -> str:
        return f"kv-{self._count + i}"

    def _name(self, row: int) -> str | None:
        """The forced request in a row of the batch."""
        request = self.runner.input_batch.req_ids[row]
        return next((n for n in self._force if request == n or request.startswith(f"{n}-")), None)

    def _run(
        self, prompts: list[list[int]], tokens: list[int], after_step: Callable[[], None] = lambda: None
    ) -> tuple[list[list[int]], list[float]]:
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
            after_step()
        return [done[n] for n in names], seconds

    def _wrap_sampling(self) -> None:
        """Let forced requests emit their text, and keep the distributions that they had."""
        original = self.runner._sample

        def sample(logits: Any, metadata: Any) -> Any:
            output = original(logits, metadata)
            if not self._force:
                return output
            batch = self.runner.input_batch
            for row in range(len(batch.req_ids)):
                name = self._name(row)
                at = batch.num_computed_tokens_cpu[row] + self.runner.query_start_loc.np[row + 1]
                at -= self.runner.query_start_loc.np[row] + batch.num_prompt_tokens[row]
                if name is None or at < 0:  # a chunk of a prompt
                    continue
                if name in self._logprobs:
                    self._logprobs[name].append(logits[row].float().log_softmax(-1))
                output.sampled_token_ids[row, 0] = self._force[name][at]
            return output

        self.runner._sample = sample
