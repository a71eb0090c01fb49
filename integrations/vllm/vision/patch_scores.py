"""Importance scores of patches within their view, for `ImageFeatures.scores`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def cls_logits(layer: Any, hidden: Tensor) -> Tensor:
    """Compute the attention logits (before the softmax) of the [CLS] query for all patches, averaged over heads.

    Only the [CLS] query is multiplied with the keys, at a cost of patches times width. Under tensor parallelism each
    rank contributes the part of its heads to the mean.

    Args:
        layer: A CLIP encoder layer of vLLM.
        hidden: [views, 1 + patches, width] input of the layer.

    Returns:
        [views, patches] float32.
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
    """Compute the negative cosine similarity of each patch to the mean of its view, for vision towers without [CLS].

    Args:
        features: [views, patches, width].

    Returns:
        [views, patches] float32.
    """
    features = features.float()
    return -functional.cosine_similarity(features, features.mean(1, keepdim=True), dim=-1)


class ClsAttentionScorer:
    """Recorder of [CLS] logits while a CLIP tower runs, in the layer after the one that features are taken from.

    For LLaVA that is the last layer of the tower, as in the published code. vLLM builds a tower only up to the layer
    whose features it uses, so the next layer is added for its weights; its forward pass returns its input.

    Args:
        tower: vLLM's vision tower.
        config: Hugging Face configuration of the vision tower.
        quant_config: vLLM's quantisation configuration.
        prefix: Prefix of the tower's weight names.
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
        """Record the logits of a layer's input [views, 1 + patches, width], if scores are wanted."""
        if self.wanted:
            self._taken.append(cls_logits(layer, hidden))

    def begin(self, wanted: bool) -> None:
        """Start a new image, and set whether its scores are wanted."""
        self.wanted, self._taken = wanted, []

    def take(self) -> Tensor:
        """Return the scores [views, patches] of all views since `begin`."""
        scores, self._taken = torch.cat(self._taken), []
        return scores
