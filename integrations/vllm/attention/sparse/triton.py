"""Sparse attention on vLLM's GPU backends: layers that read only the tokens that an earlier layer selected.

Replaces ``TRITON_ATTN`` (here) and ``FLASH_ATTN`` (`flash_attn`) if a KV policy is selected. Full-attention layers use
vLLM's kernel; a layer that selects tokens also scores the cache (`kvcache.kernels.paged_triton`). Sparse layers use
vLLM's kernel with a block table of the selected pages only or, if heads do not share a selection or single tokens are
selected, our kernel. Requests that process a prompt or fit the budget keep their block table, so that one call serves
a mixed batch.

Which requests are sparse is decided on the device, so that full CUDA graphs can be captured.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from .....kvcache import reference
from .....kvcache.kernels import page_bounds_triton, paged_triton
from .....kvcache.kernels.paged_triton import DeviceBatch
from .....kvcache.selection import PAGE_SIZE, ReadPlan, Role, SelectionRule
from .....plugins.contracts import Unsupported
from .. import compatibility
from . import common


@dataclass(frozen=True)
class SelectedRead:
    """What sparse requests read in a layer, all of which read the same units.

    Attributes:
        rule: Rule by which the units were selected.
        metadata: Metadata for vLLM's kernel, which reads the selected pages of sparse requests and all of the others.
        kept: Selected units if our kernel reads them, else None.
    """

    rule: SelectionRule
    metadata: Any
    kept: torch.Tensor | None


@dataclass
class SparseGPUStep:
    """Our part of a step's metadata, shared by its layers.

    Attributes:
        plan: Read plan of the policy.
        batch: Requests of the step.
        stock: vLLM's metadata of the step.
        selected: What sparse layers read, by the latest selection; None before the first.
    """

    plan: ReadPlan
    batch: DeviceBatch
    stock: Any
    selected: SelectedRead | None = None
    _window: SelectedRead | None = None

    def read_of(self, role: Role, block_size: int) -> SelectedRead | None:
        """Return what sparse requests read in a layer; None if they read everything."""
        if role is Role.SPARSE:
            return self.selected
        if role is Role.WINDOW and self._window is None:
            rule = self.plan.rule.window
            self._window = self._read(paged_triton.select_window(self.batch, rule), rule, block_size)
        return self._window if role is Role.WINDOW else None

    def select_tokens(
        self, query: torch.Tensor, cache: torch.Tensor, scale: float, bounds: torch.Tensor | None = None
    ) -> None:
        """Select tokens by the attention of one layer.

        Args:
            query: [tokens, query_heads, head_size].
            cache: [blocks, kv_heads, block_size, 2 * head_size] KV cache of the layer.
            scale: Softmax scale.
            bounds: Bounds of the layer's pages, to select among candidates; not given to select among all tokens.
        """
        rule, (kv_heads, block_size) = self.plan.rule, cache.shape[1:3]
        at_once = paged_triton.requests_at_once(rule, query.shape[1], kv_heads, self.batch.max_seq_len)
        kept = []
        for part in self.batch.parts(at_once):
            if bounds is None:
                kept.append(_selected(query, cache, part, rule, scale))
                continue
            scores = page_bounds_triton.page_scores(query, bounds, part, rule.candidates, scale, block_size)
            common.reduce_over_ranks(scores, rule.candidate_rule)
            among = page_bounds_triton.select_candidates(scores, part, rule, block_size)
            kept.append(among.units_of_context(_selected(query, cache, among.batch, rule, scale), rule))
        self.selected = self._read(torch.cat(kept), rule, block_size)

    def _read(self, kept: torch.Tensor, rule: SelectionRule, block_size: int) -> SelectedRead:
        metadata = copy.copy(self.stock)
        metadata.scheduler_metadata = None  # FlashAttention's schedule was computed for the full table
        if paged_triton.can_shorten_block_table(rule, block_size):
            table = paged_triton.shorten_block_table(kept, self.batch, rule, block_size)
            metadata.block_table, metadata.seq_lens = table
            return SelectedRead(rule, metadata, None)
        # vLLM's kernel does almost no work for these requests, and ours overwrites its output
        metadata.seq_lens = torch.where(self.batch.is_sparse(rule), 1, self.batch.seq_lens)
        return SelectedRead(rule, metadata, kept)


def _selected(
    query: torch.Tensor, cache: torch.Tensor, batch: DeviceBatch, rule: SelectionRule, scale: float
) -> torch.Tensor:
    """Return the units of highest attention of each request, with the same result on all tensor-parallel ranks."""
    scores = paged_triton.token_scores(query, cache, batch, rule, scale)
    common.reduce_over_ranks(scores, rule)
    return paged_triton.select_tokens(scores, batch, rule)


class SparseGPUMetadataBuilder:
    """Mixin that adds our part of a step to vLLM's metadata builder, which has to follow it in the bases.

    Attributes:
        plan: Read plan of the policy.
        announce: Callable that logs the first sparse step.
    """

    over: ClassVar[str]  # name of vLLM's backend
    _capturing = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        head_size, dtype = kv_cache_spec.head_size, vllm_config.model_config.dtype
        error = self_test_sparse_gpu(head_size, dtype, device)
        self._longest = vllm_config.model_config.max_model_len
        kv_heads = kv_cache_spec.num_kv_heads
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        requests = vllm_config.scheduler_config.max_num_seqs

        def how(rule: SelectionRule) -> str:
            at_once = min(requests, paged_triton.requests_at_once(rule, heads, kv_heads, self._longest))
            size = paged_triton.score_bytes(rule, at_once, heads, kv_heads, self._longest)
            scores = f"scores of up to {size / 2**20:.0f} MiB"
            if rule.candidates:
                scores += f" and page bounds of 1/{kv_cache_spec.block_size} of each selection layer's KV cache"
            return f"over {self.over}, {scores} not counted in vLLM's memory profiling,"

        self.plan, self.announce = common.read_plan_for(vllm_config, layer_names, error, how)
        if self.plan.rule.candidates and PAGE_SIZE % kv_cache_spec.block_size:
            reason = f"candidates are pages of {PAGE_SIZE} tokens, and KV blocks have {kv_cache_spec.block_size}"
            remedy, model = "use --block-size 16 or 32, or select=exact", vllm_config.model_config.model
            raise Unsupported(common.selected_policy(vllm_config).name, reason, remedy, model)
        self._compilation_config = vllm_config.compilation_config

    @property
    def _full_cudagraphs(self) -> bool:
        """Whether steps are captured in full CUDA graphs; the V2 model runner decides this after it made the builders.

        A captured graph cannot depend on the lengths of a step: it always selects, for the maximum context length.
        """
        return self._compilation_config.cudagraph_mode.has_full_cudagraphs()

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Build the metadata for CUDA graph capture; its dummy requests must not be logged as the first sparse step."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._capturing = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build vLLM's metadata, extended by our part of the step."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        return self._with_step(stock)

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """Build the metadata of the same step for the blocks of another layer group."""
        stock = super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]
        return self._with_step(stock)

    def _with_step(self, stock: Any) -> Any:
        stock.step = None
        if stock.causal is True and (self._full_cudagraphs or stock.max_seq_len > self.plan.rule.budget):
            table = stock.block_table
            longest = self._longest if self._full_cudagraphs else stock.max_seq_len
            if stock.max_seq_len > self.plan.rule.budget and not self._capturing:
                self.announce(stock.max_seq_len)
            batch = DeviceBatch(stock.query_start_loc, stock.seq_lens, table, longest)
            stock.step = SparseGPUStep(self.plan, batch, copy.copy(stock))
        return stock


class SparseGPUImpl(common.LayerRoleMixin):
    """Mixin for the attention implementation of one layer; vLLM's has to follow it in the bases."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Return False: our kernel does not quantise its output."""
        del quant_key
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention; shapes are those of vLLM's `AttentionImpl.forward`."""
        step: SparseGPUStep | None = getattr(attn_metadata, "step", None)
        scales = output_scale, output_block_scale
        stock: Any = super().forward  # type: ignore[misc]
        if step is None or compatibility.has_sliding_window(self):
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        role, scale = self.role(layer, step.plan), self.scale  # type: ignore[attr-defined]
        if role is Role.SELECT and not step.plan.full_selection:
            step.select_tokens(query, kv_cache, scale, self._candidate_bounds(kv_cache, step))
            role = Role.SPARSE  # the layer reads what it selected
        if (read := step.read_of(role, kv_cache.shape[2])) is not None:
            stock(layer, query, key, value, kv_cache, read.metadata, output, *scales)
            if read.kept is not None:
                paged_triton.paged_decode_attention(query, kv_cache, step.batch, read.rule, scale, output, read.kept)
            return output
        stock(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if role is Role.SELECT:
            step.select_tokens(query, kv_cache, scale, self._candidate_bounds(kv_cache, step))
        return output

    def _candidate_bounds(self, cache: torch.Tensor, step: SparseGPUStep) -> torch.Tensor | None:
        """Return the bounds of the layer's pages if tokens are selected among candidates."""
        del cache, step
        return None


class SparseTritonImpl(SparseGPUImpl, TritonAttentionImpl):
    """Attention implementation of one layer, on ``TRITON_ATTN``."""


class SparseTritonMetadataBuilder(SparseGPUMetadataBuilder, TritonAttentionMetadataBuilder):
    """Metadata builder on ``TRITON_ATTN``."""

    over: ClassVar[str] = "TRITON_ATTN"


class SparseTritonBackend(TritonAttentionBackend):
    """Subclass of ``TRITON_ATTN`` with our metadata builder and attention implementation."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """Return the class of the attention implementation."""
        return SparseTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """Return the class of the metadata builder."""
        return SparseTritonMetadataBuilder


def self_test_sparse_gpu(head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compare token selection and sparse attention on a small cache with reference attention.

    Returns:
        An error message, or None if they agree.
    """
    generator = torch.Generator().manual_seed(0)
    rule, context = SelectionRule(128, 4, 32, "kv_head", "token"), 300
    query, cache = (
        torch.randn(shape, generator=generator).to(dtype).to(device)
        for shape in ((1, 4, head_size), (20, 2, 16, 2 * head_size))
    )
    numbers = {"dtype": torch.int32, "device": device}
    blocks = torch.randperm(20, generator=generator)[:19].to(**numbers)
    batch = DeviceBatch(torch.tensor([0, 1], **numbers), torch.tensor([context], **numbers), blocks[None], context)
    output, scale = torch.zeros_like(query), head_size**-0.5
    selected = paged_triton.select_tokens(paged_triton.token_scores(query, cache, batch, rule, scale), batch, rule)
    paged_triton.paged_decode_attention(query, cache, batch, rule, scale, output, selected)

    text = cache[blocks.long()].transpose(1, 2).reshape(-1, 2, 2 * head_size)[:context].double().cpu().numpy()
    worst = 0.0
    for head in range(4):
        positions = selected[0, head // 2].tolist()
        keys, values = text[positions, :, :head_size], text[positions, :, head_size:]
        _, expected = reference.attention(query[0].double().cpu().numpy(), keys, values, scale)
        worst = max(worst, abs(output[0, head].double().cpu().numpy() - expected[head]).max())
    return None if worst < 0.03 else f"the kernels misread the cache (self-test: off by {worst:.3g})"
