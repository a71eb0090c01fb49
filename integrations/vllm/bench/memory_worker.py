"""The far end of `bench kv` for policies that free memory: an engine under load, and what its cache goes through."""

import time
from typing import Any

from .engine import main
from .forced import ForcedWorker


class MemoryWorker(ForcedWorker):
    """An engine with or without a policy whose blocks are counted."""

    def capacity(self) -> dict[str, Any]:
        """What the engine reports of its cache."""
        cache = self.runner.vllm_config.cache_config
        return {"tokens": cache.kv_cache_size_tokens, "concurrency": cache.kv_cache_max_concurrency}

    def load(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Complete all prompts, all asked for at once.

        Returns:
            ``seconds`` and ``steps`` until all are done, the most requests that decoded together (``peak``), how often
            one was ``preempted``, the fewest free blocks and those free at the end, and the completions.
        """
        from vllm import SamplingParams

        engine, scheduler = self.llm.llm_engine, self.core.scheduler
        pool, preempt = scheduler.kv_cache_manager.block_pool, scheduler._preempt_request
        found = {"steps": 0, "peak": 0, "preempted": 0, "blocks": pool.num_gpu_blocks - 1}
        least = pool.get_num_free_blocks()

        def counted(*args: Any, **kwargs: Any) -> Any:
            found["preempted"] += 1
            return preempt(*args, **kwargs)

        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            engine.add_request(f"load-{i}", {"prompt_token_ids": prompt}, sampling)
        scheduler._preempt_request = counted
        began, done = time.perf_counter(), {}
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    done[output.request_id] = list(output.outputs[0].token_ids)
                found["steps"] += 1
                decoding = sum(r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running)
                found["peak"] = max(found["peak"], decoding)
                least = min(least, pool.get_num_free_blocks())
        finally:
            scheduler._preempt_request = preempt
        return {
            **found,
            "seconds": time.perf_counter() - began,
            "least_free": least,
            "free_at_end": pool.get_num_free_blocks(),
            "tokens": [done[f"load-{i}"] for i in range(len(prompts))],
        }


if __name__ == "__main__":
    main(MemoryWorker)
