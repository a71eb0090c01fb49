"""vLLM's CPU attention backend over heads with caches of their own, of which most keep a window (`head_cache`).

Keys and values are written and read by our kernels, a few calls for a layer whatever its heads. What a step leaves out
is computed from the lengths of its requests alone, exactly as the cache manager does, so the two agree without talking.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ...kvcache import reference
from ...kvcache.head_window import HeadPlan, HeadWindow
from ...kvcache.kernels.head_cache import HeadCaches, WindowedStep, means_bytes
from ...plugins.contracts import KVPolicy, Unsupported
from . import attach, head_cache
from .sparse import Announcement, is_windowed, unserved


@dataclass
class WindowedMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a group of heads, and what all groups share of the step.

    Attributes:
        step: The query tokens, and what each of them leaves out.
        windowed: The longest context, when something is left out, else 0.
    """

    step: WindowedStep | None = None
    windowed: int = 0


class WindowedCPUBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with our metadata and our forward."""

    @staticmethod
    def get_impl_cls() -> type["WindowedImpl"]:
        """The attention of a layer."""
        return WindowedImpl

    @staticmethod
    def get_builder_cls() -> type["WindowedBuilder"]:
        """What builds the metadata of a step."""
        return WindowedBuilder


class WindowedBuilder(CPUAttentionMetadataBuilder):
    """Finds what windowed heads leave out in a step."""

    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self.query_heads = impl.num_heads  # of a whole layer
        self.num_heads = impl.num_queries_per_kv  # of what is a layer here: one KV head
        self.window: HeadWindow = impl.plan.window
        error = kernel_error(self.dtype, impl.num_queries_per_kv, self.head_dim, self.block_size)
        if error is not None:
            raise Unsupported(impl.policy, error, "leave the policy out", vllm_config.model_config.model)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> WindowedMetadata:
        """vLLM's metadata, and our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        ends, in_prompt = stock.seq_lens.tolist(), common_attn_metadata.is_prefilling.tolist()
        lengths = common_attn_metadata.query_start_loc_cpu.diff().tolist()
        begins = [end - length for end, length in zip(ends, lengths, strict=True)]

        def left_out(request: int, position: int) -> int:
            return self.window.left_out(position, self.block_size, in_prompt[request])

        step = WindowedStep(begins, ends, left_out, self.query_heads)
        return WindowedMetadata(**vars(stock), step=step, windowed=stock.max_seq_len if step.gaps.any() else 0)

    def update_block_table(
        self, metadata: WindowedMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> WindowedMetadata:
        """The same step over another group's blocks."""
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class WindowedImpl(CPUAttentionBackendImpl):
    """The attention of one layer."""

    policy: str
    plan: HeadPlan
    _announce: Announcement
    _whole: frozenset[int]  # KV heads that keep everything
    _heads: Sequence[Any] = ()  # cache layers, one for each KV head
    _caches: HeadCaches | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def split(self, layer: Any, layers: dict[str, Any], plan: HeadPlan, policy: str, announce: Announcement) -> None:
        """Give every KV head of ``layer``, whose attention this is, a cache layer among vLLM's ``layers``."""
        self.policy, self.plan, self._announce = policy, plan, announce
        _check_layer(self, layer.layer_name, self._vllm_config.model_config.model)
        self._whole = plan.whole[extract_layer_index(layer.layer_name)]
        self._heads = head_cache.split(layer, layers, self._whole, plan.window)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split the layer into heads: called when the model is loaded, before the engine asks for cache specs."""
        super().process_weights_after_loading(act_dtype)
        if not self._heads:  # the first layer splits all of them; weights that are loaded anew change nothing
            split_layers(self._vllm_config)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values to the blocks of every head."""
        del layer, kv_cache, slot_mapping  # the first head's; all are bound here
        context: Any = get_forward_context()
        metadata = context.attn_metadata
        if not metadata:  # warming up
            return
        caches = self._caches or self._look_at_caches()
        mine = [metadata[head.layer_name] for head in self._heads]
        slots = [context.slot_mapping[head.layer_name] for head in self._heads]
        caches.bind([m.block_table for m in mine], slots)
        caches.store(key[: len(slots[0])], value[: len(slots[0])])
        caches.update_means(mine[0].step)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: WindowedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's; see there for the shapes."""
        del layer, key, value, kv_cache, output_scale, output_block_scale
        if attn_metadata is None:  # warming up
            return output
        assert attn_metadata.step is not None and self._caches is not None
        if attn_metadata.windowed:
            self._announce(attn_metadata.windowed)
        self._caches.attend(query, self.scale, output, attn_metadata.step)
        return output

    def _look_at_caches(self) -> HeadCaches:
        caches = [head.kv_cache for head in self._heads]
        windowed = [head not in self._whole for head in range(len(caches))]
        self._caches = HeadCaches(caches, windowed, self.plan.window)
        return self._caches


def split_layers(vllm_config: Any) -> None:
    """Split all attention layers of a model by its policy's plan, and say so in the log.

    Raises:
        Unsupported: the engine or a layer cannot be served.
    """
    attachment = attach.admit(vllm_config)["kv"]
    policy: KVPolicy = attachment.cls(attachment.options, attachment.engine)
    plan = policy.head_plan()
    assert plan is not None  # such a policy has one
    layers = vllm_config.compilation_config.static_forward_context
    ours = [layer for layer in layers.values() if isinstance(getattr(layer, "impl", None), WindowedImpl)]
    announce = Announcement(policy.name)
    for layer in ours:
        layer.impl.split(layer, layers, plan, policy.name, announce)
    kept, total = sum(map(len, plan.whole)), sum(layer.impl.num_kv_heads for layer in ours)
    how = f"over CPU_ATTN; {kept} of {total} KV heads keep everything ({kept / total:.1%})"
    attach.logger.info(attach.start_up_table("kv", attachment, how))


def _check_layer(impl: WindowedImpl, name: str, model: str) -> None:
    """Refuse what the kernels do not compute."""
    reasons = ["its sliding window drops positions already"] if is_windowed(impl) else unserved(impl, 32)
    if reasons:
        raise Unsupported(impl.policy, reasons[0], "leave the policy out", model, name)


@functools.cache
def kernel_error(dtype: torch.dtype, share: int, head_size: int, block_size: int) -> str | None:
    """Self-test: a prompt and a decoded token by our kernels against attention computed plainly."""
    generator = torch.Generator().manual_seed(0)
    prompt = 3 * block_size + 9
    key, value = (torch.randn(prompt + 1, 1, head_size, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(prompt + 1, share, head_size, generator=generator).to(dtype)
    page = block_size * 2 * head_size + means_bytes(head_size) // dtype.itemsize
    cache = torch.zeros(5 * page, dtype=dtype).as_strided(
        (5, 1, block_size, 2 * head_size), (page, block_size * 2 * head_size, 2 * head_size, 1)
    )
    table = torch.tensor([[2, 0, 4, 1]], dtype=torch.int32)
    position = torch.arange(prompt + 1)
    slots = table[0, position // block_size].long() * block_size + position % block_size
    window = HeadWindow(1, block_size, 0, compensation=True, exact_prefill=False)
    caches = HeadCaches([cache], [True], window)
    output, scale, worst = torch.empty_like(query), head_size**-0.5, 0.0
    q, k, v = (x.double().numpy() for x in (query, key[:, 0], value[:, 0]))
    for begin, end in ((0, prompt), (prompt, prompt + 1)):
        caches.bind([table], [slots[begin:end]])
        step = WindowedStep([begin], [end], lambda _, n: window.left_out(n, block_size), share)
        caches.store(key[begin:end], value[begin:end])
        caches.update_means(step)
        caches.attend(query[begin:end], scale, output[begin:end], step)
        stretch = (block_size, block_size + window.left_out(end - 1, block_size))
        expected = reference.windowed_attention(q[end - 1], k[:end], v[:end], scale, stretch, compensation=True)
        worst = max(worst, abs(output[end - 1].double().numpy() - expected).max())
    return None if worst < 0.03 else f"the kernels misread the cache (self-test: off by {worst:.3g})"
