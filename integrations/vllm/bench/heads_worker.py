"""The far end of `pilotfish tune razor`: the engine reads repeated random tokens, and its heads are watched."""

from typing import Any

import torch

from ....kvcache import retrieval_heads
from .engine import Worker, main


class HeadsWorker(Worker):
    """An engine without plugins, whose attention layers hand over what enters them."""

    def facts(self) -> dict[str, Any]:
        """What the engine's plugins would be told about it."""
        from ..engine import selection

        return vars(selection.engine_facts(self.runner.vllm_config))

    def scores(self, tokens: list[int], period: int) -> dict[str, Any]:
        """Echo and induction scores of every query head on one sequence.

        The text is read in one step, so that a layer's attention sees all queries and keys at once.

        Returns:
            ``echo`` and ``induction`` [layers, query_heads], by layer number, and the ``kv_heads`` of a layer.
        """
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.utils import extract_layer_index

        layers = self.runner.vllm_config.compilation_config.static_forward_context
        found: dict[int, tuple[list[float], list[float]]] = {}
        watched = {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}

        def watch(name: str, impl: Any) -> None:
            original = impl.forward

            def forward(layer: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if len(query) >= len(tokens):
                    q, k = query[: len(tokens)], key[: len(tokens)]
                    echo, induction = retrieval_heads.head_scores(q, k, impl.scale, period)
                    found[extract_layer_index(name)] = echo.tolist(), induction.tolist()
                    self.progress(len(found) / len(watched))
                return original(layer, query, key, *args, **kwargs)

            impl.forward = forward

        for name, layer in watched.items():
            watch(name, layer.impl)
        try:
            self.generate([tokens], 1)
        finally:
            for layer in watched.values():
                del layer.impl.forward  # the class's own is back
        if len(found) < len(watched):
            raise RuntimeError(f"{len(watched) - len(found)} layers did not see the whole text in one step")
        echo, induction = ([found[layer][i] for layer in sorted(found)] for i in (0, 1))
        kv_heads = next(iter(watched.values())).num_kv_heads
        return {"echo": echo, "induction": induction, "kv_heads": kv_heads}


if __name__ == "__main__":
    main(HeadsWorker)
