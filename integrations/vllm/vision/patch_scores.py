"""How much each patch matters to its view: what `Picture.scores` holds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def cls_logits(layer: Any, hidden: Tensor) -> Tensor:
    """Logits between the [CLS] query and the keys of all patches, averaged over heads, before the softmax.

    Only the query of [CLS] meets the keys, so that it costs patches times width. Where heads are spread over
    tensor-parallel ranks, each gives its part of the mean.

    Args:
        layer: One of vLLM's CLIP encoder layers.
        hidden: [views, 1 + patches, width] what enters the layer.

    Returns:
        [views, patches] in float32.
    """
    attention = layer.self_attn
    projected, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    query, key, _ = projected.chunk(3, dim=-1)
    heads = (attention.num_heads_per_partition, attention.head_dim)
    query, key = query[:, 0].unflatten(-1, heads).float(), key[:, 1:].unflatten(-1, heads).float()
    logits = torch.einsum("vhd,vphd->vp", query, key) * (attention.scale / attention.num_heads)
    if attention.tp_size > 1:
        from vllm.distributed import tensor_model_parallel_all_reduce

        logits = tensor_model_parallel_all_reduce(logits)
    return logits


def mean_dissimilarity(features: Tensor) -> Tensor:
    """For towers without [CLS]: minus the cosine between a patch and the mean of its view, [views, patches]."""
    features = features.float()
    return -functional.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


class ClsAttentionScorer:
    """Takes the logits of [CLS] as a CLIP tower runs, in the layer behind the one that features are taken from.

    For LLaVA that is the tower's last, which the published code reads. vLLM builds a tower only as far as it needs
    features, so that the layer is added to it, for its weights; it passes on what it is given.
    """

    def __init__(self, tower: Any, config: Any, quant_config: Any, prefix: str) -> None:
        from vllm.model_executor.layers.attention import MMEncoderAttention
        from vllm.model_executor.models.clip import CLIPEncoderLayer

        scorer = self

        class ScoringLayer(CLIPEncoderLayer):
            def forward(self, hidden_states: Tensor) -> Tensor:
                scorer.record_layer(self, hidden_states)
                return hidden_states

        self.wanted = False
        self._taken: list[Tensor] = []
        layers: nn.ModuleList = tower.vision_model.encoder.layers
        if len(layers) < config.num_hidden_layers:
            path = f"{prefix}.vision_model.encoder.layers.{len(layers)}"
            layers.append(ScoringLayer(config, quant_config, prefix=path, attn_cls=MMEncoderAttention))
        else:
            layers[-1].register_forward_pre_hook(lambda layer, inputs: self.record_layer(layer, inputs[0]))

    def record_layer(self, layer: Any, hidden: Tensor) -> None:
        """What enters the layer, if anybody wants it."""
        if self.wanted:
            self._taken.append(cls_logits(layer, hidden))

    def begin(self, wanted: bool) -> None:
        """What runs from now on is one picture, whose scores are wanted or not."""
        self.wanted, self._taken = wanted, []

    def take(self) -> Tensor:
        """[views, patches] of all that ran since `begin`."""
        scores, self._taken = torch.cat(self._taken), []
        return scores
