"""What the sparse backends of all platforms share: the policy's plan, what it cannot serve, ranks that agree."""

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from .....kvcache.selection import ReadPlan, Role, SelectionRule
from .....plugins.contracts import KVPolicy, Unsupported
from ...engine import log
from ...engine.selection import attach
from .. import compatibility
from ..compatibility import LogWhenActive, is_windowed, unsupported_features


class LayerRoleMixin:
    """The attention of one layer, which knows its part in a plan."""

    _index: int | None = None  # of the layer, once its name was seen

    def role(self, layer: Any, plan: ReadPlan) -> Role:
        """What ``layer``, whose attention this is, does by a plan."""
        index = self._index
        if index is None:
            index = self._index = extract_layer_index(layer.layer_name)
        return plan.roles[index]


def read_plan_for(
    vllm_config: Any, layer_names: list[str], kernel_error: str | None, how: str
) -> tuple[ReadPlan, LogWhenActive]:
    """The selected policy's plan, once it is sure that these layers can be served; says so in the log.

    Args:
        vllm_config: Of the engine.
        layer_names: Layers that share a metadata builder.
        kernel_error: What the self-test of the kernels found.
        how: How the policy is attached, for the log.

    Raises:
        Unsupported: a layer computes what our kernels do not, or the self-test failed.
    """
    attachment = attach("kv", vllm_config)
    assert attachment is not None
    compatibility.check(attachment, vllm_config)
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    plan, model = policy.read_plan(), vllm_config.model_config.model
    assert plan is not None  # `attach.attention_backend` asked
    _check_layers(plan, policy.name, vllm_config, layer_names)
    if kernel_error is not None:
        raise Unsupported(policy.name, kernel_error, "leave the policy out", model)
    log.logger.info(log.start_up_table("kv", attachment, f"{how} in {len(layer_names)} layers"))
    return plan, LogWhenActive(policy.name)


def _check_layers(plan: ReadPlan, plugin: str, vllm_config: Any, layer_names: list[str]) -> None:
    """Refuse what the kernels do not compute, by layer."""
    model = vllm_config.model_config.model
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).items():
        impl: Any = layer.impl
        if not is_windowed(impl):
            if reasons := unsupported_features(impl, 16):
                raise Unsupported(plugin, reasons[0], "leave the policy out", model, name)
        elif plan.roles[extract_layer_index(name)] is Role.SELECT:
            raise Unsupported(
                plugin,
                "its sliding window hides most positions, so that it cannot choose",
                "choose select_layers among the layers without a window",
                model,
                name,
            )


def reduce_over_ranks(scores: torch.Tensor, rule: SelectionRule) -> None:
    """A choice that all heads share is shared by the heads of other tensor-parallel ranks too; in place.

    Args:
        scores: [requests, sets, units] importance.
        rule: How positions are chosen.
    """
    group = get_tp_group()
    if group.world_size > 1 and scores.shape[1] == 1:
        op = torch.distributed.ReduceOp.MAX if rule.head_aggregation == "max" else torch.distributed.ReduceOp.SUM
        on_cpu = scores.device.type == "cpu"
        torch.distributed.all_reduce(scores, op=op, group=group.cpu_group if on_cpu else group.device_group)
