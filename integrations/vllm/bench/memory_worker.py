"""Worker of `bench kv` for policies that free memory: an engine under load, and counts of its KV blocks."""

import time
from typing import Any

from .engine import main
from .teacher_forcing import TeacherForcingWorker


class MemoryWorker(TeacherForcingWorker):
    """Engine, with or without a policy, whose KV blocks are counted."""

    def capacity(self) -> dict[str, Any]:
        """Return the KV cache size in ``tokens`` and the maximum ``concurrency``, as the engine reports them."""
        cache = self.runner.vllm_config.cache_config
        return {"tokens": cache.kv_cache_size_tokens, "concurrency": cache.kv_cache_max_concurrency}

    def hold(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Prefill prompts and begin to decode them, at most ``tokens`` tokens each; `go_on` decodes further.

        Returns:
            ``bytes`` of KV cache that the requests hold while they decode.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        self._held = [self._next(i) for i in range(len(prompts))]
        self._count += len(prompts)
        for name, prompt in zip(self._held, prompts, strict=True):
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {output.request_id for output in engine.step()}
        self.go_on(2)  # blocks are freed when the step after a prompt is scheduled
        pool = self.core.scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        groups = self.core.scheduler.kv_cache_config.kv_cache_groups  # a block has a page in every layer of a group
        return {"bytes": used * max(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups)}

    def go_on(self, count: int) -> dict[str, Any]:
        """Decode ``count`` further steps of the requests of `hold`, and return the ``seconds`` of each."""
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            self.llm.llm_engine.step()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}

    def let_go(self) -> dict[str, Any]:
        """Abort the requests of `hold`."""
        self.llm.llm_engine.abort_request(self._held)
        self.llm.llm_engine.step()
        return {}

    def load(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Complete all prompts, which are submitted at once.

        Returns:
            ``seconds`` and ``steps`` until all are done, the largest number of requests that decoded together
            (``peak``), the number of preemptions (``preempted``), the number of ``blocks``, the fewest free blocks
            (``least_free``), the free blocks at the end (``free_at_end``), and the completions (``tokens``).
        """
        scheduler = self.core.scheduler
        pool, preempt = scheduler.kv_cache_manager.block_pool, scheduler._preempt_request
        counts = {"steps": 0, "peak": 0, "preempted": 0, "blocks": pool.num_gpu_blocks - 1}
        counts["least_free"] = pool.get_num_free_blocks()

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts["preempted"] += 1
            return preempt(*args, **kwargs)

        def after_step() -> None:
            counts["steps"] += 1
            decoding = sum(r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running)
            counts["peak"] = max(counts["peak"], decoding)
            counts["least_free"] = min(counts["least_free"], pool.get_num_free_blocks())

        scheduler._preempt_request = counted
        began = time.perf_counter()
        try:
            completions, _ = self._run(prompts, [tokens] * len(prompts), after_step)
        finally:
            scheduler._preempt_request = preempt
        return {
            **counts,
            "seconds": time.perf_counter() - began,
            "free_at_end": pool.get_num_free_blocks(),
            "tokens": completions,
        }


if __name__ == "__main__":
    main(MemoryWorker)
