"""Code shared by the sparse backends of all platforms: read plan, layer checks, reduction over ranks."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from .....kvcache.selection import ReadPlan, Role, SelectionRule
from .....plugins.contracts import KVPolicy, Unsupported
from ...engine import log
from ...engine.selection import attach, kv_policy
from .. import compatibility
from ..compatibility import LogWhenActive, has_sliding_window, unsupported_features


class LayerRoleMixin:
    """Mixin for the attention implementation of one layer that looks up the layer's role in a read plan."""

    _index: int | None = None  # layer index, set at the first call

    def role(self, layer: Any, plan: ReadPlan) -> Role:
        """Return the role of ``layer``, the layer of this implementation, in a plan."""
        index = self._index
        if index is None:
            index = self._index = extract_layer_index(layer.layer_name)
        return plan.roles[index] if index < len(plan.roles) else Role.FULL  # layers of a draft model follow


def selected_policy(vllm_config: Any) -> KVPolicy:
    """Return the selected KV policy."""
    policy = kv_policy(vllm_config)
    assert policy is not None  # else the backend would be vLLM's
    return policy


class PageBoundsMixin(LayerRoleMixin):
    """Mixin for the attention implementation of one layer that keeps bounds of pages, if its role needs them.

    The bounds are a separate tensor, which is updated with every write to the KV cache. So prefix caching, preemption
    and chunked prefill need no further code.

    Attributes:
        bounds_kernels: Module with the functions ``allocate_bounds`` and ``update_bounds``.
    """

    bounds_kernels: ClassVar[Any]
    _bounds: torch.Tensor | None = None
    _cache: tuple[int, torch.Size] | None = None  # address and shape of the cache to which the bounds belong

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plan = selected_policy(get_current_vllm_config()).read_plan()
        assert plan is not None
        self._first_plan = plan

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the cache, and update the bounds of their pages."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self.role(layer, self._first_plan) in (Role.PAGE_BOUNDS, Role.SELECT):
            self.bounds_kernels.update_bounds(kv_cache, self.bounds_of(kv_cache), slot_mapping[: len(key)])

    def bounds_of(self, cache: torch.Tensor) -> torch.Tensor:
        """Return the bounds of the pages of a cache; they are allocated at the first call."""
        key = cache.data_ptr(), cache.shape
        if self._bounds is None or key != self._cache:  # vLLM profiles with a smaller cache
            self._bounds, self._cache = self.bounds_kernels.allocate_bounds(cache), key
        return self._bounds


def read_plan_for(
    vllm_config: Any, layer_names: list[str], kernel_error: str | None, how: Callable[[SelectionRule], str]
) -> tuple[ReadPlan, LogWhenActive]:
    """Check that the layers can be served, log the attached policy, and return its read plan.

    Args:
        vllm_config: vLLM's configuration of the engine.
        layer_names: Names of the layers that share a metadata builder.
        kernel_error: Error of the kernels' self-test; None if it passed.
        how: Function from the selection rule to a description of how the policy is attached, for the log.

    Returns:
        The read plan, and a callable that logs the first sparse step.

    Raises:
        Unsupported: A layer has a feature that our kernels do not support, or the self-test failed.
    """
    attachment = attach("kv", vllm_config)
    assert attachment is not None
    compatibility.check(attachment, vllm_config)
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    plan, model = policy.read_plan(), vllm_config.model_config.model
    assert plan is not None  # policies without one have other backends, see `backends.attention_backend`
    check_sparse_layers(
        plan, policy.name, vllm_config, get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    )
    if kernel_error is not None:
        raise Unsupported(policy.name, kernel_error, "run without the policy", model)
    log.logger.info(log.start_up_table("kv", attachment, f"{how(plan.rule)} in {len(layer_names)} layers"))
    return plan, LogWhenActive(policy.name)


def check_sparse_layers(plan: ReadPlan, plugin: str, vllm_config: Any, layers: Mapping[str, Any]) -> None:
    """Check that the kernels support all layers.

    Args:
        plan: Read plan of the policy.
        plugin: Name of the policy.
        vllm_config: vLLM's configuration of the engine.
        layers: Attention layers by name.

    Raises:
        Unsupported: A layer has a feature that the kernels do not support.
    """
    model = vllm_config.model_config.model
    for name, layer in layers.items():
        impl: Any = layer.impl
        if not has_sliding_window(impl):
            if reasons := unsupported_features(impl, 16):
                raise Unsupported(plugin, reasons[0], "run without the policy", model, name)
        elif plan.roles[extract_layer_index(name)] is Role.SELECT:
            raise Unsupported(
                plugin,
                "a sliding-window layer cannot select tokens, since it does not attend to most of them",
                "set select_layers to layers without a sliding window",
                model,
                name,
            )


def reduce_over_ranks(scores: torch.Tensor, rule: SelectionRule) -> None:
    """Reduce scores over tensor-parallel ranks, in place, if all heads share one selection.

    Args:
        scores: [requests, head groups, units] scores of tokens or pages.
        rule: Selection rule, whose head aggregation decides between sum and maximum.
    """
    group = get_tp_group()
    if group.world_size > 1 and scores.shape[1] == 1:
        op = torch.distributed.ReduceOp.MAX if rule.head_aggregation == "max" else torch.distributed.ReduceOp.SUM
        on_cpu = scores.device.type == "cpu"
        torch.distributed.all_reduce(scores, op=op, group=group.cpu_group if on_cpu else group.device_group)
