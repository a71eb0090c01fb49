"""Worker of `pilotfish tune razor`: its engine reads repeated random tokens, and its attention heads are scored."""

from typing import Any

import torch

from ....kvcache import retrieval_heads
from .engine import Worker, main


class HeadsWorker(Worker):
    """Engine without plugins whose queries and keys are captured at each attention layer."""

    def facts(self) -> dict[str, Any]:
        """Return the facts about the engine that a plugin would receive."""
        from ..engine import selection

        return vars(selection.engine_facts(self.runner.vllm_config))

    def scores(self, tokens: list[int], period: int) -> dict[str, Any]:
        """Compute echo and induction scores of every query head on one sequence.

        The sequence is processed in one step, so that a layer's attention gets all queries and keys at once.

        Args:
            tokens: Token ids of the sequence.
            period: Length of the repeated block, in tokens.

        Returns:
            ``echo`` and ``induction``, [layers, query_heads], by layer number; and ``kv_heads``, the number of KV heads
            of a layer.
        """
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.utils import extract_layer_index

        layers = self.runner.vllm_config.compilation_config.static_forward_context
        scores_by_layer: dict[int, tuple[list[float], list[float]]] = {}
        watched = {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}

        def watch(name: str, impl: Any) -> None:
            original = impl.forward

            def forward(layer: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if len(query) >= len(tokens):
                    q, k = query[: len(tokens)], key[: len(tokens)]
                    echo, induction = retrieval_heads.head_scores(q, k, impl.scale, period)
                    scores_by_layer[extract_layer_index(name)] = echo.tolist(), induction.tolist()
                    self.progress(len(scores_by_layer) / len(watched))
                return original(layer, query, key, *args, **kwargs)

            impl.forward = forward

        for name, layer in watched.items():
            watch(name, layer.impl)
        try:
            self.generate([tokens], 1)
        finally:
            for layer in watched.values():
                del layer.impl.forward  # uncovers the method of the class
        if len(scores_by_layer) < len(watched):
            raise RuntimeError(f"{len(watched) - len(scores_by_layer)} layers did not process the sequence in one step")
        echo, induction = ([scores_by_layer[layer][i] for layer in sorted(scores_by_layer)] for i in (0, 1))
        kv_heads = next(iter(watched.values())).num_kv_heads
        return {"echo": echo, "induction": induction, "kv_heads": kv_heads}


if __name__ == "__main__":
    main(HeadsWorker)
