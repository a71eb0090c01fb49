"""Checks of a model's attention layers for the selected plugins; the kernels' self-tests need a cache and run later."""

from collections.abc import Mapping
from typing import Any

from ....plugins.contracts import KVPolicy
from ..engine.selection import attach, read_config


def check_attention_layers(vllm_config: Any, layers: Mapping[str, Any]) -> None:
    """Check that the selected plugins support all attention layers.

    Args:
        vllm_config: vLLM's configuration of the engine.
        layers: Attention layers by name.

    Raises:
        Unsupported: A layer has a feature that a plugin does not support.
    """
    config = read_config(vllm_config.additional_config)
    if config.drafter is not None and config.verification.verification == "tree":
        from .tree.common import check_tree_layers

        check_tree_layers(vllm_config, layers)
    attachment = attach("kv", vllm_config)
    if attachment is None:
        return
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    if policy.frees_blocks:
        from .windowed.common import check_windowed_layer

        for layer in layers.values():
            check_windowed_layer(layer, policy.name, vllm_config.model_config.model)
    elif (plan := policy.read_plan()) is not None:
        from .sparse.common import check_sparse_layers

        check_sparse_layers(plan, policy.name, vllm_config, layers)
