"""Worker of `bench vision`: the cost of a step with images, by part of the model."""

import time
from typing import Any

import numpy as np

from .engine import Worker, main


class VisionWorker(Worker):
    """Engine with a pruner whose vision encoder, selection and language model are timed."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        from ..vision import models

        self.times: dict[str, float] = {}
        self.layer_rows: list[int] = []
        model = self.runner.model
        self._timed(model, "embed_multimodal", "tower")
        self._timed(model, "forward", "language", prefill=True)
        self._timed(models, "prune_features", "selection")
        for layer in model.language_model.model.layers:
            layer.register_forward_pre_hook(lambda _, inputs: self.layer_rows.append(len(inputs[0])))

    def _timed(self, owner: Any, name: str, part: str, prefill: bool = False) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            rows = kwargs.get("positions", np.empty(1 << 20))
            if prefill and len(rows) < 64:  # a decode step
                return inner(*args, **kwargs)
            wall, cpu = time.perf_counter(), time.process_time()
            result = inner(*args, **kwargs)
            for kind, spent in (("s", time.perf_counter() - wall), ("cpu_s", time.process_time() - cpu)):
                self.times[f"{part}_{kind}"] = self.times.get(f"{part}_{kind}", 0.0) + spent
            return result

        setattr(owner, name, timed)

    def look(self, requests: list[dict[str, Any]], pruner: Any, run: int) -> dict[str, Any]:
        """Generate two tokens for each request, all together; return times, numbers of tokens and blocks, and GFLOP.

        Args:
            requests: Requests, each with a ``prompt`` and the paths of its ``images``.
            pruner: Pruner of these requests; None for that of the engine.
            run: Number of the run; it sets a pixel, so that no image is in a cache.
        """
        from PIL import Image
        from vllm import SamplingParams

        inputs = []
        for request in requests:
            images = []
            for path in request["images"]:
                image = Image.open(path).convert("RGB")
                image.putpixel((0, 0), (run % 256, run // 256 % 256, 0))
                images.append(image)
            prompt_input = {"prompt": request["prompt"], "multi_modal_data": {"image": images}}
            if pruner is not None:
                prompt_input["mm_processor_kwargs"] = {"pruner": pruner}
            inputs.append(prompt_input)
        self.times, self.layer_rows = {}, []
        self._first.clear()
        started = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        ended = time.perf_counter()
        block = self.runner.vllm_config.cache_config.block_size
        lengths = [len(o.prompt_token_ids or ()) for o in outputs]
        return {
            **self.times,
            "prompt_tokens": sum(lengths),
            "kv_blocks": sum(-(-(n + 2) // block) for n in lengths),
            "ttft_s": max(self._first.values()) - started,
            "total_s": ended - started,
            "gflops": self._gflops(lengths),
        }

    def _gflops(self, lengths: list[int]) -> float:
        """Return the GFLOP of the prompts' prefill in the language model's layers, computed from their shapes.

        For attention, the rows of a layer are divided among the requests in proportion to their lengths.
        """
        text = self.runner.vllm_config.model_config.hf_text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        inner, kv = text.num_attention_heads * head, text.num_key_value_heads * head
        weights = text.hidden_size * (2 * inner + 2 * kv + 3 * text.intermediate_size)
        total = 0.0
        for rows in self.layer_rows:
            if rows >= 64:
                parts = [rows * n / sum(lengths) for n in lengths]
                total += 2 * rows * weights + sum(2 * inner * n * n for n in parts)
        return total / 1e9


if __name__ == "__main__":
    main(VisionWorker)
