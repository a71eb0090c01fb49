"""vLLM's CPU attention backend over heads with caches of their own, of which most keep a window (`head_cache`).

Requests that process a prompt with nothing left out go through vLLM's kernel, one call for each KV head; every other
query token through ours, one call for a layer. What a step leaves out is computed from the lengths of its requests
alone, exactly as the cache manager does, so the two agree without talking.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from ...kvcache import reference
from ...kvcache.head_window import HeadPlan, HeadWindow
from ...kvcache.kernels.head_cache import HeadCaches, WindowedStep, means_bytes
from ...kvcache.kernels.paged_decode import Rows
from ...plugins.contracts import KVPolicy, Unsupported
from . import attach, head_cache
from .cpu_builder import CPUBuilder
from .sparse import Announcement, is_windowed, unserved


@dataclass
class WindowedMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a group of heads, and what all groups share of the step.

    Attributes:
        step: Positions, and the query tokens that our kernel serves.
        stock: Whether vLLM's kernel serves a request.
        windowed: The longest context, when something is left out, else 0.
    """

    step: WindowedStep | None = None
    stock: bool = True
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


class WindowedBuilder(CPUBuilder):
    """Finds what windowed heads leave out in a step."""

    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self.query_heads = impl.num_heads  # of a whole layer
        self.num_heads = impl.num_queries_per_kv  # of what is a layer here: one KV head
        self.window: HeadWindow = impl.plan.window
        error = kernel_error(self.dtype, impl.num_queries_per_kv, self.head_dim, self.block_size, self.isa)
        if error is not None:
            raise Unsupported(impl.policy, error, "leave the policy out", vllm_config.model_config.model)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> WindowedMetadata:
        """vLLM's metadata, and our part of the step."""
        common = common_attn_metadata
        stock = super().build(common_prefix_len, common, fast_build)
        starts, ends = common.query_start_loc_cpu.tolist(), stock.seq_lens.tolist()
        begins = [end - (starts[r + 1] - starts[r]) for r, end in enumerate(ends)]
        in_prompt = common.is_prefilling.tolist()
        left_out = functools.partial(self.window.left_out, block_size=self.block_size)
        # A prompt of which nothing is left out is read by vLLM's kernel.
        ours = [r for r, end in enumerate(ends) if end - begins[r] == 1 or left_out(end - 1, in_prompt=in_prompt[r])]
        tokens = [(r, begins[r] + i, starts[r] + i) for r in ours for i in range(ends[r] - begins[r])]
        request, before, row = ([token[i] for token in tokens] for i in range(3))
        rows = Rows(request, row, [n + 1 for n in before], self.query_heads) if tokens else None
        gaps = [left_out(n, in_prompt=in_prompt[r]) for r, n in zip(request, before, strict=True)]
        step = WindowedStep(begins, ends, rows, gaps)
        if 0 < len(ours) < common.num_reqs:
            stock = self.without(stock, ours)
        windowed = stock.max_seq_len if any(gaps) else 0
        return WindowedMetadata(**vars(stock), step=step, stock=len(ours) < common.num_reqs, windowed=windowed)

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
        del key, value, kv_cache, output_scale, output_block_scale
        if attn_metadata is None:  # warming up
            return output
        metadata: Any = get_forward_context().attn_metadata
        step, count, share = attn_metadata.step, attn_metadata.num_actual_tokens, self.num_queries_per_kv
        assert step is not None
        if attn_metadata.stock:
            for h, head in enumerate(self._heads):
                heads = slice(h * share, (h + 1) * share)
                part = torch.empty(count, share, self.head_size, dtype=output.dtype)
                self._stock(layer, query[:count, heads].contiguous(), head.kv_cache, metadata[head.layer_name], part)
                output[:count, heads] = part
        if step.rows is not None:
            assert self._caches is not None
            if attn_metadata.windowed:
                self._announce(attn_metadata.windowed)
            self._caches.attend(query, self.scale, output, step)
        return output

    def _stock(
        self, layer: Any, query: torch.Tensor, cache: torch.Tensor, metadata: CPUAttentionMetadata, output: torch.Tensor
    ) -> None:
        """VLLM's kernel over one head's cache."""
        blocks, _, block_size, _ = cache.shape
        keys, values = cache.view(blocks, 1, 2 * block_size, self.head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=metadata.query_start_loc,
            seq_lens=metadata.seq_lens,
            scale=self.scale,
            causal=metadata.causal,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=metadata.block_table,
            softcap=0,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )

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
def kernel_error(dtype: torch.dtype, share: int, head_size: int, block_size: int, isa: str) -> str | None:
    """Self-test: what our kernel stores and vLLM's reads, and what ours reads, against attention computed plainly."""
    generator = torch.Generator().manual_seed(0)
    context = 3 * block_size + 9
    key, value = (torch.randn(context, 1, head_size, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(1, share, head_size, generator=generator).to(dtype)
    page = block_size * 2 * head_size + means_bytes(head_size) // dtype.itemsize
    cache = torch.zeros(5 * page, dtype=dtype).as_strided(
        (5, 1, block_size, 2 * head_size), (page, block_size * 2 * head_size, 2 * head_size, 1)
    )
    table = torch.tensor([[2, 0, 4, 1]], dtype=torch.int32)
    position = torch.arange(context)
    slots = table[0, position // block_size].long() * block_size + position % block_size
    window = HeadWindow(1, block_size, 0, compensation=True, exact_prefill=True)
    caches = HeadCaches([cache], [True], window)
    caches.bind([table], [slots])
    caches.store(key, value)
    left_out = window.left_out(context - 1, block_size)
    rows = Rows([0], [0], [context], share)
    caches.update_means(WindowedStep([0], [context], None, []))
    ours, theirs, scale = torch.empty_like(query), torch.empty_like(query), head_size**-0.5
    caches.attend(query, scale, ours, WindowedStep([context - 1], [context], rows, [left_out]))

    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=share,
        num_kv_heads=1,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    keys, values = cache.view(5, 1, 2 * block_size, head_size).chunk(2, dim=2)
    ops.cpu_attention_with_kv_cache(
        query, keys, values, theirs, starts, lengths, scale, True, None, -1, table, 0, schedule, None
    )

    q, k, v = (x.double().numpy() for x in (query[0], key[:, 0], value[:, 0]))
    worst = 0.0
    for output, stretch in ((ours, (block_size, block_size + left_out)), (theirs, (0, 0))):
        expected = reference.windowed_attention(q, k, v, scale, stretch, compensation=True)
        worst = max(worst, abs(output[0].double().numpy() - expected).max())
    return None if worst < 0.03 else f"the kernels misread the cache layout '{isa}' (self-test: off by {worst:.3g})"
