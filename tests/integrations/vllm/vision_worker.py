"""The far end of engine tests with pictures."""

from typing import Any

from worker import TestWorker  # beside this file

from pilotfish.integrations.vllm.bench.engine import main


class PicturesWorker(TestWorker):
    def look(self, requests: list[dict[str, Any]], max_tokens: int = 12) -> dict[str, Any]:
        """Complete prompts with pictures, all together; an error of a request is its answer, none goes on then."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        more = {k: requests[0][k] for k in ("prompt_logprobs",) if k in requests[0]}
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)
        try:
            inputs = [self._input(r) for r in requests]
            adapters = [LoRARequest("adapter", 1, r["adapter"]) if "adapter" in r else None for r in requests]
            outputs = self.llm.generate(inputs, params, lora_request=adapters, use_tqdm=False)
        except ValueError as error:
            return {"error": str(error)}
        return {
            "prompt": [len(o.prompt_token_ids or ()) for o in outputs],
            "cached": [o.num_cached_tokens for o in outputs],
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        }

    def _input(self, request: dict[str, Any]) -> Any:
        from PIL import Image

        made: dict[str, Any] = {"prompt": request["prompt"]}
        if pictures := request.get("pictures"):
            made["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in pictures]}
        if "pruner" in request:
            made["mm_processor_kwargs"] = {"pruner": request["pruner"]}
        if "uuids" in request:
            made["multi_modal_uuids"] = {"image": request["uuids"]}
        return made

    def look_staggered(self, requests: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
        """The same, each asked for some steps after the one before, each with a length of its own."""
        from vllm import SamplingParams

        engine, found = self.llm.llm_engine, {}
        waiting = list(enumerate(zip(requests, lengths, strict=True)))
        while waiting or engine.has_unfinished_requests():
            if waiting:
                number, (request, length) = waiting.pop(0)
                params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                engine.add_request(str(number), self._input(request), params)
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id)] = list(output.outputs[0].token_ids)
        return {"tokens": [found[i] for i in range(len(requests))]}

    def layers(self, request: dict[str, Any]) -> dict[str, Any]:
        """What enters the layers as a prompt is read: embeddings, which of them are visual, positions in each layer."""
        model = self.runner.model
        inside, entered = model.language_model.model, []
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: entered.append((inputs[0].tolist(), inputs[1])))
            for layer in inside.layers
        ]
        last = []
        hooks.append(inside.norm.register_forward_pre_hook(lambda _, inputs: last.append(len(inputs[0]))))
        answer = self.look([request], max_tokens=1)
        for hook in hooks:
            hook.remove()
        positions, embeds = [at for at, _ in entered], entered[0][1]
        visual = model._visual[: len(embeds)].tolist()
        return {"embeds": embeds.tolist(), "visual": visual, "positions": positions, "last": last[0], **answer}


if __name__ == "__main__":
    main(PicturesWorker)
