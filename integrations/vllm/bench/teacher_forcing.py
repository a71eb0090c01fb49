"""Worker of quality measurements: its engine decodes given texts and records the distributions of each token."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .engine import Worker


class TeacherForcingWorker(Worker):
    """Engine whose decode steps are timed, and whose requests can be forced to emit given texts."""

    def __init__(self, config: dict[str, Any]) -> None:
        # The V2 runner, the default on GPUs, keeps the tokens of a request on the device.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        super().__init__(config)
        self._reference: list[torch.Tensor] = []
        self._force: dict[str, list[int]] = {}
        self._logprobs: dict[str, list[torch.Tensor]] = {}
        self._count = 0
        self._wrap_sampling()

    def steps(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Run ``count`` decode steps of all prompts together; return ``tokens``, and ``seconds`` of each step."""
        outputs, seconds = self._run(prompts, [count + 1] * len(prompts))
        return {"tokens": outputs, "seconds": seconds}

    def forced(
        self, prompts: list[list[int]], texts: list[list[int]], keep: bool | None, reference: str | None = None
    ) -> dict[str, Any]:
        """Decode given texts token by token after their prompts.

        Args:
            prompts: Token ids of the prompts.
            texts: Token ids that follow each prompt.
            keep: True to keep the distributions as the reference of later calls, False to compare with the reference,
                None for neither.
            reference: File for the reference, which another engine can read; it stays in memory if not given.

        Returns:
            For each text and token, ``nll`` in nats, and ``right``: whether the token was the most probable one. If
            compared, also ``kl`` from the reference in nats, and ``same``: whether the most probable token is the same
            as in the reference.
        """
        self._force = {self._next(i): list(text) for i, text in enumerate(texts)}
        self._logprobs = {request: [] for request in self._force}
        self._run(prompts, [len(text) for text in texts])
        answer: dict[str, list[Any]] = {"nll": [], "right": [], "kl": [], "same": []}
        logprobs = [torch.stack(rows) for rows in self._logprobs.values()]
        if keep is False and reference is not None:
            self._reference = torch.load(Path(reference))
        for i, (rows, text) in enumerate(zip(logprobs, texts, strict=True)):
            expected = torch.tensor(text)
            answer["nll"].append((-rows.gather(1, expected[:, None])[:, 0]).tolist())
            answer["right"].append((rows.argmax(1) == expected).tolist())
            if keep is False:
                base = self._reference[i]
                answer["kl"].append((base.exp() * (base - rows)).sum(1).tolist())
                answer["same"].append((base.argmax(1) == rows.argmax(1)).tolist())
        if keep and reference is not None:
            torch.save(logprobs, Path(reference))
        elif keep:
            self._reference = logprobs
        self._force, self._logprobs = {}, {}
        return answer

    def _next(self, i: int) -> str:
        return f"kv-{self._count + i}"

    def _name(self, row: int) -> str | None:
        """Return the name of the forced request in a row of the batch, or None."""
        request = self.runner.input_batch.req_ids[row]
        return next((n for n in self._force if request == n or request.startswith(f"{n}-")), None)

    def _run(
        self, prompts: list[list[int]], tokens: list[int], after_step: Callable[[], None] = lambda: None
    ) -> tuple[list[list[int]], list[float]]:
        """Complete prompts greedily to given lengths; return the tokens, and seconds of steps in which all decode."""
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
        """Wrap the runner's sampling: forced requests emit their text, and their distributions are recorded."""
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
                    self._logprobs[name].append(logits[row].float().log_softmax(-1).cpu())
                output.sampled_token_ids[row, 0] = self._force[name][at]
            return output

        self.runner._sample = sample
