"""The far end of the engine tests: the benchmark's worker, and questions that only tests ask."""

from typing import Any

from pilotfish.integrations.vllm.bench.engine import Worker, main


class TestWorker(Worker):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.preemptions = 0
        preempt = self.core.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.core.scheduler._preempt_request = counted
        self.least_free = 1 << 30
        schedule = self.core.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.least_free = min(self.least_free, self._pool.get_num_free_blocks())
            return output

        self.core.scheduler.schedule = watched

    @property
    def _pool(self) -> Any:
        return self.core.scheduler.kv_cache_manager.block_pool

    def blocks(self) -> dict[str, Any]:
        """The cache's blocks: all, free now, and the fewest that were free since this was asked last."""
        least, self.least_free = self.least_free, 1 << 30
        cache = self.runner.vllm_config.cache_config
        return {
            "all": self._pool.num_gpu_blocks - 1,  # one is vLLM's own
            "free": self._pool.get_num_free_blocks(),
            "least": least,
            "concurrency": cache.kv_cache_max_concurrency,
            "tokens": cache.kv_cache_size_tokens,
        }

    def sample(
        self, prompts: list[Any], sampling: list[dict[str, Any]], adapters: list[str] | None = None
    ) -> dict[str, Any]:
        """Complete prompts (token ids or text), each with its own sampling parameters and LoRA adapter."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import StructuredOutputsParams

        def params(values: dict[str, Any]) -> SamplingParams:
            if schema := values.pop("json_schema", None):
                values["structured_outputs"] = StructuredOutputsParams(json=schema)
            return SamplingParams(**values)

        self._request_steps = self._drafted = self.preemptions = 0
        self._first.clear()
        inputs: list[Any] = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
        folders = sorted(set(adapters or []))
        lora = adapters and [LoRARequest(a, folders.index(a) + 1, a) for a in adapters]
        outputs = self.llm.generate(inputs, [params(dict(s)) for s in sampling], lora_request=lora, use_tqdm=False)
        answers = [a for o in outputs for a in o.outputs]  # n answers of each prompt
        return {
            "tokens": [list(a.token_ids) for a in answers],
            "text": [a.text for a in answers],
            "finish": [a.finish_reason for a in answers],
            "logprobs": [
                None if a.logprobs is None else [{t: p.logprob for t, p in step.items()} for step in a.logprobs]
                for a in answers
            ],
            "emitted": sum(len(a.token_ids) - 1 for a in answers),
            "request_steps": self._request_steps,
            "drafted": self._drafted,
            "preemptions": self.preemptions,
        }

    def state(self) -> dict[str, Any]:
        """What the drafter holds, and what of vLLM was replaced or wrapped."""
        drafter = self._ours
        plugin = getattr(drafter, "plugin", None)
        return {
            "requests": sorted(getattr(drafter, "_requests", {})),
            "plugin": None if plugin is None else plugin.stats(),
            "counts": getattr(drafter, "counts", None),
            "wrapped": sorted(
                n for n in ("_sample", "_on_request_state_removed", "shutdown") if n in vars(self.runner)
            ),
            "classes": [type(x).__module__ + "." + type(x).__qualname__ for x in self._parts()],
            "drafter_max_len": getattr(self.runner, "effective_drafter_max_model_len", None),
        }

    def _parts(self) -> list[Any]:
        layers = self.runner.compilation_config.static_forward_context.values()
        return [
            self.core.scheduler,
            self.core.model_executor,
            self.runner,
            self.runner.sampler,
            self.runner.model,
            *[layer.impl for layer in layers],
        ]

    def attention(self, plan: dict[str, Any] | None = None) -> dict[str, Any]:
        """The attention classes of all layers; with ``plan``, change what the KV policy's layers read."""
        layers = self.runner.compilation_config.static_forward_context.values()
        if plan is not None:
            from pilotfish.kvcache.selection import ReadPlan, Role, SelectionRule

            roles = tuple(Role[name] for name in plan["roles"])
            for groups in self.runner.attn_groups:
                for group in groups:
                    group.get_metadata_builder().plan = ReadPlan(roles, SelectionRule(**plan["rule"]))
        current = self.runner.attn_groups[0][0].get_metadata_builder().plan
        return {
            "impl": sorted({type(layer.impl).__name__ for layer in layers}),
            "isa": sorted({getattr(layer, "isa", "") for layer in layers}),
            "select": [i for i, role in enumerate(current.roles) if role.name == "SELECT"],
        }

    def corrected(self) -> dict[str, Any]:
        """How many tokens were computed anew."""
        return {"tokens": self.core.scheduler.pilotfish_corrector.corrected}

    def version(self) -> dict[str, Any]:
        """The version of vLLM."""
        import vllm

        return {"vllm": vllm.__version__}

    def device_drafting(self) -> dict[str, Any]:
        """How a drafter on the V2 runner is attached, and what it holds."""
        config = self.llm.llm_engine.vllm_config
        speculator = self.runner.speculator
        return {
            "async_scheduling": config.scheduler_config.async_scheduling,
            "v2_runner": config.use_v2_model_runner,
            "speculator": type(speculator).__name__,
            "counts": speculator.counts,
            "requests": len(speculator.running) + len(speculator._waiting),
            "held": len(self.runner.req_states.req_id_to_index),
        }

    def draft_always(self) -> dict[str, Any]:
        """Make drafted tokens cost nothing, so that all are verified."""
        cost = self.runner.drafter.cost
        cost.coefficients, cost.observe = lambda requests: (1.0, 0.0, 0.0), lambda *step: None
        return {}

    def trees(self) -> dict[str, Any]:
        """What tree verification has done."""
        return {"moved": self.runner.drafter.trees.num_moved_tokens}

    def integrity(self, prompts: list[list[int]], max_tokens: int, looks: int) -> dict[str, Any]:
        """How far the cache of drafted requests is from that of the same tokens, processed as a prompt.

        Requests join one after the other; after every step, what each has in the cache is read.
        """
        import random

        import torch

        seen: list[tuple[list[int], torch.Tensor]] = []
        engine = self.llm.llm_engine
        waiting = list(enumerate(prompts))
        before = self.runner.drafter.trees.num_moved_tokens
        while waiting or engine.has_unfinished_requests():
            if waiting:
                number, prompt = waiting.pop(0)
                self._add(f"kv-{number}", prompt, max_tokens)
            engine.step()
            for request in self.core.scheduler.running:
                done = request.num_computed_tokens
                if done > len(request.prompt_token_ids):
                    seen.append((list(request.all_token_ids[:done]), self._cache(request.request_id, done)))
        moved, worst = self.runner.drafter.trees.num_moved_tokens - before, 0.0
        for number, (tokens, cache) in enumerate(random.Random(0).sample(seen, looks)):
            self._add(f"fresh-{number}", tokens, 2)
            while not self.core.scheduler.running:
                engine.step()
            while self.core.scheduler.running and self.core.scheduler.running[0].num_computed_tokens < len(tokens):
                engine.step()
            fresh = self._cache(self.core.scheduler.running[0].request_id, len(tokens))
            worst = max(worst, float((cache - fresh).abs().max()))
            while engine.has_unfinished_requests():
                engine.step()
        return {"moved": moved, "steps": len(seen), "worst": worst, "scale": float(seen[0][1].abs().max())}

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def _cache(self, request: str, count: int) -> Any:
        """Keys and values of a request's first tokens, [layers, count, kv_heads, 2 * head_size]."""
        import torch

        batch, layers = self.runner.input_batch, []
        table = batch.block_table[0].get_cpu_tensor()[batch.req_id_to_index[request]]
        for layer in self.runner.compilation_config.static_forward_context.values():
            _, heads, block, width = layer.kv_cache.shape
            pages = layer.kv_cache[table[: -(-count // block)].long()].view(-1, heads, 2, block * width // 2)
            keys = pages[:, :, 0].reshape(-1, heads, width // 2, block).transpose(2, 3)  # K lies transposed
            values = pages[:, :, 1].reshape(-1, heads, block, width // 2)
            both = torch.cat([keys, values], -1).permute(0, 2, 1, 3).reshape(-1, heads, width)
            layers.append(both[:count].clone())
        return torch.stack(layers)

    def metrics(self) -> dict[str, float]:
        """Pilotfish's counters in this process, by name; labels are added up."""
        import prometheus_client

        values: dict[str, float] = {}
        for family in prometheus_client.REGISTRY.collect():
            for sample in family.samples:
                if sample.name.startswith("pilotfish_") and sample.name.endswith("_total"):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def shut_down(self) -> dict[str, Any]:
        """What a server does when it ends."""
        self.core.shutdown()
        return {}


if __name__ == "__main__":
    main(TestWorker)
